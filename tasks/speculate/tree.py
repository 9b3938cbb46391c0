"""Drafts as a tree: of all continuations that the heads think of, the likeliest nodes.

A node is a token behind its parent's. Its probability is that of its whole path, so a child is
never likelier than its parent, and the likeliest N nodes of all always hang together. How many
tokens a pass is expected to bring is one more than the sum of those probabilities: `Tree.gain`
is what `pace.py` weighs against the cost of a wider pass.

Shapes: B rows, K heads, M candidates of a head, F paths that are followed (the beam), N nodes,
V vocabulary, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .heads import TurboHeads

#: Candidates of each head, and paths that are followed.
CANDIDATES = 10
BEAM = 10


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


def draft(
    heads: TurboHeads,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    scored: torch.Tensor,
    embed: Callable[[torch.Tensor], torch.Tensor],
    x_BD: torch.Tensor,
    root_B: torch.Tensor,
    nodes: int,
    depth: int | None = None,
) -> Tree:
    """The likeliest `nodes` nodes behind each row's root.

    lm_head: logits of what it is given. scored: its weight, [V, D]. embed: tokens to [.., D].
    x_BD: what the lm_head read where it gave the root. depth: heads that are used; None: all.
    """
    rows, count = len(x_BD), min(depth or heads.config.heads, heads.config.heads, nodes - 1)
    if count == 0:
        return root_alone(root_B)
    # A level has all but the root at most, and what is kept has its parent among them.
    beam = min(BEAM, nodes - 1)
    logits_KBV = heads.logits(x_BD, lm_head, count).float()
    total_KB1 = logits_KBV.logsumexp(-1, keepdim=True)
    best_KBM, ids_KBM = logits_KBV.topk(min(CANDIDATES, logits_KBV.shape[-1]), dim=-1)
    stateful = heads.config.state > 0
    if stateful:
        begun_B1S = heads.begin(x_BD)[:, None]
        # What all tokens but the candidates have, which the state does not change.
        rest_KB1 = _rest(best_KBM, total_KB1)
        # Of all candidates at once: what each level has left to do is of the state's width.
        bonus_KBMS = heads.bonus_of(scored[ids_KBM])
        read_KBMS = heads.read(embed(ids_KBM))
        read_BFS = heads.read(embed(root_B))[:, None]
    else:
        chances_KBM = best_KBM - total_KB1

    chance_BF = torch.zeros((rows, 1), device=x_BD.device)
    token_BF, node_BF = root_B[:, None], torch.zeros_like(root_B)[:, None]
    state_BFS: torch.Tensor | None = None
    tokens, parents, chances = [token_BF], [node_BF], [chance_BF]
    made = 1
    for k in range(count):
        ids_BM = ids_KBM[k]
        if stateful:
            state_BFS = heads.follow(state_BFS, read_BFS, begun_B1S)
            bonus_BFM = state_BFS @ bonus_KBMS[k].transpose(1, 2)
            mine_BFM = best_KBM[k][:, None] + bonus_BFM.float()
            both_BF2 = torch.stack(
                [mine_BFM.logsumexp(-1), rest_KB1[k].expand(-1, mine_BFM.shape[1])], -1
            )
            # Rounding may end a little above; no child is likelier than its parent.
            logp_BFM = (mine_BFM - both_BF2.logsumexp(-1, keepdim=True)).clamp(max=0)
        else:
            logp_BFM = chances_KBM[k][:, None]
        path_BC = (chance_BF[..., None] + logp_BFM).flatten(1)
        chance_BF, pick_BF = path_BC.topk(min(beam, path_BC.shape[1]), dim=1)
        from_BF = pick_BF // ids_BM.shape[1]
        parents.append(node_BF.gather(1, from_BF))
        which_BF = pick_BF % ids_BM.shape[1]
        token_BF = ids_BM.gather(1, which_BF)
        if state_BFS is not None:
            wide_BFS = (-1, -1, state_BFS.shape[2])
            state_BFS = state_BFS.gather(1, from_BF[..., None].expand(wide_BFS))
            read_BFS = read_KBMS[k].gather(1, which_BF[..., None].expand(wide_BFS))
        node_BF = torch.arange(made, made + chance_BF.shape[1], device=x_BD.device).expand(rows, -1)
        made += chance_BF.shape[1]
        tokens.append(token_BF)
        chances.append(chance_BF)
    depths = [torch.full_like(level, at) for at, level in enumerate(tokens)]
    whole = [torch.cat(parts, 1) for parts in (tokens, parents, depths, chances)]
    return _likeliest(whole, min(nodes, made), count)


def _rest(best_KBM: torch.Tensor, total_KB1: torch.Tensor) -> torch.Tensor:
    """log of the total less that of the candidates, of which rounding may leave nothing."""
    share_KB1 = (best_KBM.logsumexp(-1, keepdim=True) - total_KB1).clamp(max=-1e-6)
    return total_KB1 + torch.log1p(-share_KB1.exp())


def _likeliest(whole: list[torch.Tensor], nodes: int, levels: int) -> Tree:
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
