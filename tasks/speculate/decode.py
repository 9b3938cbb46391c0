"""The decoding loop: draft, verify in one pass, keep what the model itself would have written.

Every row has one token that is sure and not yet in the cache, its root. A pass runs root and
drafts of all rows through the model, each seeing its own path alone; what the model writes behind
each node says how far the drafts were right, and gives the next root. Without heads and lookups the
pass is over the root alone, and this is plain decoding. Each row advances at its own pace.

Shapes: B rows that still write, N nodes of a pass, W slots that a pass sees, D hidden width,
V vocabulary.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .cache import SlotCache
from .choose import Choice, Greedy
from .draft import Drafter
from .heads import TurboHeads
from .identity import Guard
from .lean import LeanLayers, is_kin
from .lookup import Lookup, graft
from .pace import WIDTHS, Pace
from .parts import Parts
from .tree import Tree, root_alone


class PromptError(ValueError):
    """A prompt that no answer can follow."""


#: Told of each row's new tokens as they are sure: row, tokens.
Listener = Callable[[int, list[int]], None]


@dataclass
class Account:
    """What writing took. prompt_seconds: reading the prompts. seconds: writing the answers.

    tokens: of all answers. lengths: how often a row's pass brought so many tokens, 1 for no draft
    accepted; what stood behind an answer's end is not counted.
    drafted, accepted: passes of a row that had a draft of a depth (from 1), and those whose
    drafts were right to that depth at least.
    """

    prompt_seconds: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    passes: int = 0
    nodes: int = 0
    lengths: dict[int, int] = field(default_factory=dict)
    drafted: dict[int, int] = field(default_factory=dict)
    accepted: dict[int, int] = field(default_factory=dict)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a row's pass brought on average."""
        passes = sum(self.lengths.values())
        return sum(length * n for length, n in self.lengths.items()) / max(passes, 1)

    @property
    def tokens_per_second(self) -> float:
        """Of the whole call, prompts included."""
        return self.tokens / max(self.prompt_seconds + self.seconds, 1e-9)

    def note(self, kept: int, right: int, deepest: int) -> None:
        """A row's pass brought `kept` tokens; of drafts to depth `deepest`, `right` were right."""
        self.lengths[kept] = self.lengths.get(kept, 0) + 1
        for depth in range(1, deepest + 1):
            self.drafted[depth] = self.drafted.get(depth, 0) + 1
            self.accepted[depth] = self.accepted.get(depth, 0) + (depth <= right)


@dataclass
class Row:
    """One answer. room: tokens that it may have. length: its tokens in the cache."""

    index: int
    length: int
    room: int
    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    lookup: Lookup | None = None


class Writer:
    """Writes answers with a model, and with heads and lookups where it has them.

    pace: how many drafts a pass has; kept between calls, since it learns what passes cost.
    """

    def __init__(
        self,
        parts: Parts,
        heads: TurboHeads | None = None,
        *,
        lookup: bool = False,
        pace: Pace | None = None,
    ) -> None:
        """Raises a HeadsError where the heads are of another model."""
        self.parts, self.lookup = parts, lookup
        self.drafter: Drafter | None = None
        self.guard = Guard(None if heads is None else heads.config, parts)
        if heads is not None:
            weight = parts.scored
            # A copy: the heads themselves stay in the precision that they are trained in.
            own = copy.deepcopy(heads).to(weight.device, weight.dtype)
            self.drafter = Drafter(own, parts.lm_head, weight, parts.embed)
        drafts = heads is not None or lookup
        self.pace = pace or Pace(WIDTHS[-1] if drafts else 1)
        self.eager = getattr(parts.config, "_attn_implementation", "sdpa") == "eager"
        self.lean: LeanLayers | None = None

    @torch.inference_mode()
    def write(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stops: frozenset[int] = frozenset(),
        choice: Choice | None = None,
        listener: Listener | None = None,
    ) -> tuple[list[list[int]], Account]:
        """The answer to each prompt, its stop token included where it came to one.

        An answer ends at a token of `stops`, after `max_new_tokens`, or at the last position that
        the model knows.

        Raises:
            PromptError: a prompt without tokens, or with more than the model has positions.
            HeadsError: the model is another one by now than the heads are for, or its soft prompt
                is another one.
        """
        self.guard.require()
        choice, account = choice or Greedy(), Account()
        started = time.perf_counter()
        self._require_writable(prompts)
        rows = [
            Row(
                index,
                self.parts.virtual + len(prompt),
                self._room(len(prompt), max_new_tokens),
                lookup=Lookup(list(prompt)) if self.lookup else None,
            )
            for index, prompt in enumerate(prompts)
        ]
        answers = [row.tokens for row in rows]
        active = [row for row in rows if row.room > 0]
        if not active:
            return answers, account
        cache = self._cache(active)
        x_BD = self._read(cache, [prompts[row.index] for row in active])
        account.prompt_seconds = time.perf_counter() - started
        zero_B1 = torch.zeros((len(active), 1), dtype=torch.long)
        root_B = self._choose(choice, self.parts.lm_head(x_BD)[:, None], active, zero_B1)[:, 0]
        for row, token in zip(active, root_B.tolist(), strict=True):
            self._take(row, [token], stops, listener)
        while going := [place for place, row in enumerate(active) if not row.ended]:
            if len(going) < len(active):
                going = cache.keep(going)
                active = [active[place] for place in going]
                x_BD, root_B = x_BD[going], root_B[going]
            x_BD, root_B = self._pass(cache, active, x_BD, root_B, choice, stops, listener, account)
        account.tokens = sum(map(len, answers))
        account.seconds = time.perf_counter() - started - account.prompt_seconds
        return answers, account

    def _require_writable(self, prompts: Sequence[Sequence[int]]) -> None:
        longest = self.parts.longest
        for row, prompt in enumerate(prompts):
            if not len(prompt):
                raise PromptError(f"prompt {row} has no tokens: give it a start token at least")
            if longest is not None and len(prompt) > longest:
                raise PromptError(
                    f"prompt {row} has {len(prompt)} tokens, and the model knows {longest} "
                    "positions (max_position_embeddings): shorten it"
                )

    def _room(self, prompt: int, max_new_tokens: int) -> int:
        """Tokens of an answer. The last one needs no position: no pass reads it."""
        longest = self.parts.longest
        return max_new_tokens if longest is None else min(max_new_tokens, longest - prompt + 1)

    @torch.inference_mode()
    def read_tree(self, prompts: Sequence[Sequence[int]], tree: Tree) -> torch.Tensor:
        """x_BND of each node of a tree behind each prompt: one pass, by itself."""
        rows = [Row(row, self.parts.virtual + len(prompt), 0) for row, prompt in enumerate(prompts)]
        cache = self._cache(rows)
        self._read(cache, prompts)
        return self._verify(cache, [row.length for row in rows], tree, tree.ancestors())

    def _cache(self, rows: list[Row]) -> SlotCache:
        # With each answer anew: an adapter may have been put into the model since the last.
        layers = self.parts.layers
        self.lean = LeanLayers(layers) if is_kin(layers) else None
        capacity = max(row.length + row.room for row in rows) + WIDTHS[-1]
        weight = self.parts.embed(torch.zeros(1, dtype=torch.long, device=self.parts.device))
        cache = SlotCache(self.parts.config, len(rows), capacity, weight.dtype, weight.device)
        for layer, parts in enumerate(self.parts.before):
            for part, own in zip(parts, cache.kv[:, layer], strict=True):
                own[:, :, : self.parts.virtual] = part
        return cache

    def _read(self, cache: SlotCache, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Fill the cache with the prompts; x_BD at each one's last token."""
        device, longest, virtual = self.parts.device, max(map(len, prompts)), self.parts.virtual
        # Filled up behind: a later pass writes over it, and nothing before it sees it.
        ids_BT = torch.zeros((len(prompts), longest), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids_BT[row, : len(prompt)] = torch.tensor(prompt)
        cache.place([virtual] * len(prompts), longest)
        seen_TW = torch.ones((longest, cache.width), dtype=torch.bool, device=device)
        seen_B1TW = seen_TW.tril(virtual).expand(len(prompts), 1, -1, -1)
        positions_BT = torch.arange(virtual, virtual + longest, device=device)
        positions_BT = positions_BT.expand(len(prompts), -1)
        lengths = list(map(len, prompts))
        if self.lean is not None:
            return self.lean.read(cache, ids_BT.to(device), positions_BT, seen_B1TW, lengths)
        hidden_BTD = self._layers(cache, ids_BT.to(device), positions_BT, seen_B1TW)
        last_B = torch.tensor(lengths, device=device) - 1
        return hidden_BTD[torch.arange(len(prompts), device=device), last_B]

    def _pass(
        self,
        cache: SlotCache,
        active: list[Row],
        x_BD: torch.Tensor,
        root_B: torch.Tensor,
        choice: Choice,
        stops: frozenset[int],
        listener: Listener | None,
        account: Account,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass over root and drafts of each row. Returns the next x_BD and root_B."""
        began = time.perf_counter()
        tree, drafted = self._drafts(active, x_BD, root_B)
        begun = time.perf_counter()
        seen_BNN = tree.ancestors()
        hidden_BND = self._verify(cache, [row.length for row in active], tree, seen_BNN)
        written_B1 = torch.tensor([len(row.tokens) for row in active], device=root_B.device)[
            :, None
        ]
        next_BN = self._choose(
            choice, self.parts.lm_head(hidden_BND), active, written_B1 + tree.depth_BN
        )
        right_BN = tree.tokens_BN == next_BN.gather(1, tree.parents_BN)
        right_BN[:, 0] = True
        whole_BN = (right_BN[:, None] | ~seen_BNN).all(-1)
        leaf_B = (whole_BN * (tree.depth_BN + 1)).argmax(1)
        rows_B = torch.arange(len(active), device=leaf_B.device)
        root_B = next_BN[rows_B, leaf_B]
        # All that the host has to know, in one transfer: it waits for the device here alone.
        told_B2N = torch.stack([tree.tokens_BN, seen_BNN[rows_B, leaf_B]], 1).flatten(1)
        deepest_B = tree.depth_BN.max(1).values
        told = torch.cat([root_B[:, None], deepest_B[:, None], told_B2N], 1).tolist()
        accepted: list[list[int]] = []
        lengths = [row.length for row in active]
        width = tree.tokens_BN.shape[1]
        before, after = [], []
        for row, (root, deepest, *both) in zip(active, told, strict=True):
            path = [node for node in range(width) if both[width + node]]
            kept = self._take(row, [*(both[node] for node in path[1:]), root], stops, listener)
            account.note(kept, len(path) - 1, deepest)
            after.append(0 if row.ended else self.pace.left(len(row.tokens), row.room))
            before.append(after[-1] + kept)
            if row.ended:
                self.pace.ended(len(row.tokens))
            row.length += len(path)
            accepted.append([] if row.ended else path)
        cache.accept(lengths, accepted)
        account.passes += 1
        account.nodes += width * len(active)
        took = time.perf_counter() - begun
        self.pace.took(len(active), width, took, begun - began if drafted is not None else None)
        if width > 1 and drafted is not None:
            self.pace.accepted(width, sum(drafted[1:width]), before, after)
        return hidden_BND[rows_B, leaf_B], root_B

    def _drafts(
        self, active: list[Row], x_BD: torch.Tensor, root_B: torch.Tensor
    ) -> tuple[Tree, list[float] | None]:
        """The tree of the next pass, and of drafts that were made for it, taken or not, each one's
        chance, the mean over rows; None where none were made."""
        pace = self.pace
        if not pace.drafting(len(active)):
            return root_alone(root_B), None
        tree = root_alone(root_B)
        if self.drafter is not None:
            tree = self.drafter.tree(x_BD, root_B, pace.offer(len(active)))
        if self.lookup:
            chains = [row.lookup.continuation() if row.lookup else [] for row in active]
            tree = graft(tree, chains, pace.copied)
        chances = tree.chance_BN.mean(0).tolist()
        return tree.first(pace.width(len(active), chances)), chances

    def _verify(
        self, cache: SlotCache, lengths: list[int], tree: Tree, seen_BNN: torch.Tensor
    ) -> torch.Tensor:
        """x_BND of every node, its keys and values behind the row's own."""
        rows, nodes = tree.tokens_BN.shape
        cache.place(lengths, nodes)
        device = seen_BNN.device
        if cache.start is not None:
            # Slots behind the nodes only fill the last lanes.
            seen_BNW = seen_BNN.new_zeros((rows, nodes, cache.width))
            seen_BNW[..., : cache.start] = True
            seen_BNW[..., cache.start : cache.start + nodes] = seen_BNN
            first_B1: torch.Tensor | int = cache.start
        else:
            first_B1 = torch.tensor(lengths, device=device)[:, None]
            sure_BW = torch.arange(cache.width, device=device) < first_B1
            seen_BNW = sure_BW[:, None].repeat(1, nodes, 1)
            seen_BNW.scatter_(2, cache.slots_BN[:, None].expand(-1, nodes, -1), seen_BNN)
        positions_BN = tree.depth_BN + first_B1
        if self.parts.longest is not None:
            # A draft behind the last position is never kept.
            last = self.parts.virtual + self.parts.longest - 1
            positions_BN = positions_BN.clamp(max=last)
        return self._layers(cache, tree.tokens_BN, positions_BN, seen_BNW[:, None])

    def _layers(
        self,
        cache: SlotCache,
        ids_BN: torch.Tensor,
        positions_BN: torch.Tensor,
        seen_B1NW: torch.Tensor,
    ) -> torch.Tensor:
        if self.lean is not None:
            return self.lean(cache, ids_BN, positions_BN, seen_B1NW)
        if self.eager:
            # Eager attention adds its mask.
            lowest = torch.finfo(cache.kv.dtype).min
            seen_B1NW = torch.zeros_like(seen_B1NW, dtype=cache.kv.dtype).masked_fill_(
                ~seen_B1NW, lowest
            )
        hidden: torch.Tensor = self.parts.layers(
            input_ids=ids_BN,
            position_ids=positions_BN,
            attention_mask=seen_B1NW,
            past_key_values=cache,
            use_cache=True,
        )[0]
        return hidden

    def _choose(
        self, choice: Choice, logits_BNV: torch.Tensor, rows: list[Row], position_BN: torch.Tensor
    ) -> torch.Tensor:
        return choice(logits_BNV, [row.index for row in rows], position_BN)

    @staticmethod
    def _take(row: Row, tokens: list[int], stops: frozenset[int], listener: Listener | None) -> int:
        """Add what is sure to the answer, up to its end. How many tokens that were."""
        tokens = tokens[: row.room - len(row.tokens)]
        end = next((at for at, token in enumerate(tokens) if token in stops), None)
        row.ended = end is not None
        if end is not None:
            tokens = tokens[: end + 1]
        row.tokens += tokens
        row.ended |= len(row.tokens) >= row.room
        if row.lookup:
            row.lookup.extend(tokens)
        if listener and tokens:
            listener(row.index, tokens)
        return len(tokens)
