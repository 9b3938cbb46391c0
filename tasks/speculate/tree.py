"""Drafts as a tree: of all continuations that the heads think of, the likeliest nodes.

A node is a token behind its parent's. Its probability is that of its whole path, so a child is
never likelier than its parent, and the likeliest N nodes of all always hang together. How many
tokens a pass is expected to bring is one more than the sum of those probabilities, which
`pace.py` weighs against the cost of a wider pass. `draft.py` makes trees.

Shapes: B rows, A nodes to choose from, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tree:
    """tokens_BN: node 0 is the token that is sure. parents_BN: place of the parent, which comes
    before; of node 0 itself. depth_BN: 0 for node 0. chance_BN: of the path to be right, falling
    with N. levels: no node is deeper; known without asking the device.
    """

    tokens_BN: torch.Tensor
    parents_BN: torch.Tensor
    depth_BN: torch.Tensor
    chance_BN: torch.Tensor
    levels: int

    def first(self, nodes: int) -> Tree:
        """The likeliest nodes of it: as good as a tree that was made with so many."""
        return Tree(
            self.tokens_BN[:, :nodes],
            self.parents_BN[:, :nodes],
            self.depth_BN[:, :nodes],
            self.chance_BN[:, :nodes],
            min(self.levels, nodes - 1),
        )

    def ancestors(self) -> torch.Tensor:
        """[B, N, N]: whether the second is the first or comes before it on its path."""
        rows, nodes = self.tokens_BN.shape
        seen_BNN = torch.zeros((rows, nodes, nodes), dtype=torch.bool, device=self.depth_BN.device)
        at_BN = torch.arange(nodes, device=self.depth_BN.device).expand(rows, nodes)
        for _ in range(self.levels + 1):
            seen_BNN.scatter_(2, at_BN[..., None], True)
            at_BN = self.parents_BN.gather(1, at_BN)
        return seen_BNN


def root_alone(root_B: torch.Tensor) -> Tree:
    """No drafts: a pass over the one token that is sure."""
    zero_B1 = torch.zeros_like(root_B)[:, None]
    one_B1 = torch.ones_like(zero_B1, dtype=torch.float32)
    return Tree(root_B[:, None], zero_B1, zero_B1, one_B1, 0)


def likeliest(whole: list[torch.Tensor], nodes: int, levels: int) -> Tree:
    """The likeliest nodes in the order of their chances. Sorted stably, levels in order, a node
    comes behind its parent even where both are as likely."""
    tokens_BA, parents_BA, depth_BA, chance_BA = whole
    order_BA = chance_BA.sort(dim=1, descending=True, stable=True).indices
    place_BA = torch.empty_like(order_BA).scatter_(
        1, order_BA, torch.arange(order_BA.shape[1], device=order_BA.device).expand_as(order_BA)
    )
    keep_BN = order_BA[:, :nodes]
    parents_BN = place_BA.gather(1, parents_BA.gather(1, keep_BN))
    return Tree(
        tokens_BA.gather(1, keep_BN),
        parents_BN,
        depth_BA.gather(1, keep_BN),
        chance_BA.gather(1, keep_BN).exp(),
        min(levels, nodes - 1),
    )
