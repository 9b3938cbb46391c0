"""Keys and values of several rows, each at its own length, in room that is taken once.

transformers' caches grow by a copy of all they hold, and keep rows at one length. Here every row
writes where it stands, drafts behind what is sure, and of drafts those that were accepted are
moved together in place, all layers at once.

Shapes: B rows, H key-value heads, T slots, N new tokens of each row, E width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

#: Slots that attention sees are a multiple of this; those behind the text are masked. SDPA's kernel
#: for CPUs takes what is left over of 16 one by one, with another exp than the vectors': in
#: bfloat16 a token's bits then depend on how many slots stand behind it. And kernels of GPUs take
#: a mask in whole lanes alone.
LANES = 16


def whole_lanes(slots: int) -> int:
    return -(-slots // LANES) * LANES


class Slots(CacheLayerMixin):  # type: ignore[misc]
    """One layer's part of a `SlotCache`, as a model's attention knows it."""

    def __init__(self, whole: SlotCache, index: int) -> None:
        super().__init__()
        self.whole, self.index = whole, index
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the room is there from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [B, H, N, E] where the rows stand, and give all that they may attend to."""
        return self.whole.write(self.index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.whole.width, 0

    def get_seq_length(self) -> int:
        return self.whole.width

    def get_max_length(self) -> int:
        return self.whole.capacity


class SlotCache(Cache):  # type: ignore[misc]
    """kv_2LBHTE: keys and values of all layers.

    lengths: of each row, tokens that are sure. Before a pass, `place` says where its tokens go.
    """

    def __init__(self, config: Any, rows: int, capacity: int, dtype: Any, device: Any) -> None:
        text = config.get_text_config(decoder=True)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        layers = text.num_hidden_layers
        # Zeros: what is masked out still takes part in a product, and NaN times 0 is NaN.
        self.capacity, self.width = whole_lanes(capacity), 0
        shape = (2, layers, rows, heads, self.capacity, width)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.start: int | None = 0
        self.slots_BN = torch.zeros((rows, 0), dtype=torch.long, device=device)
        super().__init__(layers=[Slots(self, index) for index in range(layers)])

    def place(self, lengths: list[int], count: int) -> None:
        """The next pass has `count` tokens of each row, behind the row's `lengths` sure ones."""
        self.width = whole_lanes(max(lengths) + count)
        self.start = lengths[0] if len(set(lengths)) == 1 else None
        if self.start is None:
            first_B1 = torch.tensor(lengths, device=self.kv.device)[:, None]
            self.slots_BN = first_B1 + torch.arange(count, device=self.kv.device)

    def write(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own_2BHTE = self.kv[:, layer]
        if self.start is not None:
            end = self.start + keys.shape[2]
            own_2BHTE[0, :, :, self.start : end] = keys
            own_2BHTE[1, :, :, self.start : end] = values
        else:
            rows_B1 = torch.arange(len(keys), device=keys.device)[:, None]
            own_2BHTE[0][rows_B1, :, self.slots_BN] = keys.transpose(1, 2)
            own_2BHTE[1][rows_B1, :, self.slots_BN] = values.transpose(1, 2)
        return own_2BHTE[0, :, :, : self.width], own_2BHTE[1, :, :, : self.width]

    def accept(self, lengths: list[int], paths: list[list[int]]) -> None:
        """Move the tokens of each row's path, given as their places in the last pass, together
        behind the row's sure ones. Paths begin with 0; an empty one moves nothing."""
        _, _, _, heads, room, _ = self.kv.shape
        moved = [
            (row * heads * room + length + old, row * heads * room + length + new)
            for row, (length, path) in enumerate(zip(lengths, paths, strict=True))
            for new, old in enumerate(path)
            if old != new
        ]
        if moved:
            device = self.kv.device
            # As one line of slots, [2 L, B H T, E], all rows and layers are one move.
            slots = self.kv.flatten(0, 1).flatten(1, 3)
            at_MH2 = torch.tensor(moved, device=device)[:, None] + (
                torch.arange(heads, device=device)[:, None] * room
            )
            old_M, new_M = at_MH2.flatten(0, 1).unbind(-1)
            slots.index_copy_(1, new_M, slots.index_select(1, old_M))

    def keep(self, rows: list[int]) -> list[int]:
        """Leave out all rows but these, in place. Returns them in their new order: rows from the
        end fill the gaps, so that no more is moved than was left."""
        count, kept = len(rows), set(rows)
        behind = [row for row in rows if row >= count]
        order = [row if row in kept else behind.pop() for row in range(count)]
        for place, row in enumerate(order):
            if place != row:
                self.kv[:, :, place, :, : self.width] = self.kv[:, :, row, :, : self.width]
        self.kv = self.kv[:, :, :count]
        return order
