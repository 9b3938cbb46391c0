"""From x to a tree of drafts: what the heads and the state think comes next, the likeliest first.

All of a row's paths are followed at once, level by level. What the state adds to a candidate's
logit, w (C s) = (w C) s, and what it reads of a token, A_e E[y], are tables over the vocabulary,
made once: a level then costs a few products of the state's width, and reads neither lm_head nor
embeddings.

Shapes: B rows, K heads, M candidates of a head and one for all other tokens, F paths that are
followed (the beam), N nodes, V vocabulary, D hidden width, S width of the state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .heads import TurboHeads
from .tree import Tree, likeliest, root_alone

#: Candidates of each head: the state only raises what is among them (docs/log.md has figures).
CANDIDATES = 32
#: Paths that are followed.
BEAM = 10
#: Tokens whose rows of a table are made at a time.
CHUNK = 8192
#: Of all tokens that are no candidate together, at least: rounding may leave nothing.
LEAST = 1e-6


class Drafter:
    """Heads with the lm_head and the embeddings of their model, ready to draft.

    It holds two tables of [V, S] in the dtype of the heads beside them, if they have a state; one
    has a row more.
    """

    @torch.inference_mode()
    def __init__(
        self,
        heads: TurboHeads,
        lm_head: Callable[[torch.Tensor], torch.Tensor],
        scored: torch.Tensor,
        embed: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """heads: in the model's dtype. lm_head: logits of what it is given. scored: its weight,
        [V, D]. embed: tokens to [.., D]."""
        self.heads, self.lm_head = heads, lm_head
        if heads.config.state:
            every = torch.split(torch.arange(len(scored), device=scored.device), CHUNK)
            bonus = [heads.bonus_of(scored[ids]) for ids in every]
            # A row more: all tokens that are no candidate, which the state does not change.
            self.bonus_VS = torch.cat([*bonus, torch.zeros_like(bonus[0][:1])])
            self.read_VS = torch.cat([heads.read(embed(ids)) for ids in every])

    @torch.inference_mode()
    def tree(
        self, x_BD: torch.Tensor, root_B: torch.Tensor, nodes: int, depth: int | None = None
    ) -> Tree:
        """The likeliest `nodes` nodes behind each row's root.

        x_BD: what the lm_head read where it gave the root. depth: heads that are used; None: all.
        """
        count = self.heads.config.heads
        count = min(depth or count, count, nodes - 1)
        if count == 0:
            return root_alone(root_B)
        # log p of each head's candidates, before the state's part.
        logp_KBV = self.heads.logits(x_BD, self.lm_head, count).float().log_softmax(-1)
        logp_KBM, ids_KBM = logp_KBV.topk(min(CANDIDATES, logp_KBV.shape[-1]), dim=-1)
        follow = self._stateful if self.heads.config.state else self._stateless
        # A level has all but the root at most, and what is kept has its parent among them.
        whole = follow(x_BD, root_B, logp_KBM, ids_KBM, min(BEAM, nodes - 1))
        return likeliest(whole, min(nodes, whole[0].shape[1]), count)

    def _stateful(
        self,
        x_BD: torch.Tensor,
        root_B: torch.Tensor,
        logp_KBM: torch.Tensor,
        ids_KBM: torch.Tensor,
        beam: int,
    ) -> list[torch.Tensor]:
        heads = self.heads
        # All other tokens together are one candidate more.
        other_KB1 = torch.log1p(-logp_KBM.exp().sum(-1, keepdim=True).clamp(max=1 - LEAST))
        logp_KBM = torch.cat([logp_KBM, other_KB1], -1)
        scored_KBM = F.pad(ids_KBM, (0, 1), value=len(self.bonus_VS) - 1)
        bonus_KBMS = F.embedding(scored_KBM, self.bonus_VS).to(logp_KBM.dtype)
        begun_B1S = heads.begin(x_BD)[:, None]
        state_BFS = heads.follow(None, self.read_VS[root_B][:, None], begun_B1S)
        paths = Paths(root_B)
        for k, ids_BM in enumerate(ids_KBM):
            raised_BFM = torch.baddbmm(
                logp_KBM[k][:, None], state_BFS.to(logp_KBM.dtype), bonus_KBMS[k].mT
            )
            from_BF = paths.grow(raised_BFM.log_softmax(-1)[..., :-1], ids_BM, beam)
            if k + 1 < len(ids_KBM):
                read_BFS = self.read_VS[paths.tokens[-1]]
                state_BFS = heads.follow(chosen(state_BFS, from_BF), read_BFS, begun_B1S)
        return paths.whole()

    @staticmethod
    def _stateless(
        x_BD: torch.Tensor,
        root_B: torch.Tensor,
        logp_KBM: torch.Tensor,
        ids_KBM: torch.Tensor,
        beam: int,
    ) -> list[torch.Tensor]:
        paths = Paths(root_B)
        for logp_BM, ids_BM in zip(logp_KBM, ids_KBM, strict=True):
            paths.grow(logp_BM[:, None], ids_BM, beam)
        return paths.whole()


def chosen(part_BXS: torch.Tensor, pick_BF: torch.Tensor) -> torch.Tensor:
    """[B, F, S]: of each row the vectors that are picked. Whole vectors, where `gather` would look
    up each number by itself."""
    rows, count = part_BXS.shape[:2]
    first_B1 = torch.arange(0, rows * count, count, device=pick_BF.device)[:, None]
    line = part_BXS.flatten(0, 1).index_select(0, (first_B1 + pick_BF).flatten())
    return line.view(*pick_BF.shape, -1)


class Paths:
    """The paths that are followed behind each root, and all that were on the way."""

    def __init__(self, root_B: torch.Tensor) -> None:
        self.made = 1
        self.logp_BF = torch.zeros((len(root_B), 1), device=root_B.device)
        self.nodes_BF = torch.zeros_like(root_B)[:, None]
        self.tokens, self.parents = [root_B[:, None]], [self.nodes_BF]
        self.logps = [self.logp_BF]

    def grow(self, logp_BFM: torch.Tensor, ids_BM: torch.Tensor, beam: int) -> torch.Tensor:
        """Of all paths with one candidate more the likeliest `beam`: each one's place among the
        paths before, [B, F]. logp_BFM: of the candidates; F may be 1."""
        candidates = ids_BM.shape[1]
        path_BC = (self.logp_BF[..., None] + logp_BFM).flatten(1)
        self.logp_BF, pick_BF = path_BC.topk(min(beam, path_BC.shape[1]), dim=1)
        from_BF, which_BF = pick_BF // candidates, pick_BF % candidates
        self.parents.append(self.nodes_BF.gather(1, from_BF))
        self.tokens.append(ids_BM.gather(1, which_BF))
        self.logps.append(self.logp_BF)
        count = pick_BF.shape[1]
        self.nodes_BF = torch.arange(self.made, self.made + count, device=pick_BF.device)
        self.nodes_BF = self.nodes_BF.expand(len(pick_BF), -1)
        self.made += count
        return from_BF

    def whole(self) -> list[torch.Tensor]:
        """Tokens, parents, depths and log p of all nodes, level by level, [B, A] each."""
        depths = [torch.full_like(level, at) for at, level in enumerate(self.tokens)]
        parts = (self.tokens, self.parents, depths, self.logps)
        return [torch.cat(part, 1) for part in parts]
