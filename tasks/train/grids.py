"""Packed rows as grids: rows of similar length side by side, padded to the longest of them.

Layers that work token by token want rows end to end, with no padding. Attention wants a batch
of rows; one product a row would be hundreds of calls for a pack of short rows. So a pack is
gathered into a few grids for attention and back again.

Shapes: T tokens of a pack, R rows of a grid, L its length, H heads (K of keys), G = H / K.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

#: Lengths are padded to multiples of this, and rows up to few different numbers, because oneDNN
#: compiles and keeps about 1 MB of code for every new shape of a bfloat16 product.
ALIGN = 32
#: Padded cells of the score matrix, times the heads' whole width, that cost as much as the calls
#: of one more grid do: about 60 MFLOP, or 0.3 ms of one core.
WORTH_A_GRID = 1 << 22


@dataclass(frozen=True)
class Grid:
    """Where the cells of one grid are in its pack, as rows of [T * heads, D].

    queries: [K * R * G * L]. The queries of a key's head stand one below the other.
    keys: [K * R * L].
    real_N1: false for padding, [K * R * G * L, 1].
    real_RL: the same, by row.
    """

    rows: int
    length: int
    queries: torch.Tensor
    keys: torch.Tensor
    real_N1: torch.Tensor
    real_RL: torch.Tensor


@dataclass(frozen=True)
class Grids:
    """A pack as grids, and the way back.

    place_TH, place_TK: for each token and head, where it is among the grids' cells, end to end.
    """

    grids: tuple[Grid, ...]
    place_TH: torch.Tensor
    place_TK: torch.Tensor


@lru_cache(maxsize=2)
def grids(row_ends: torch.Tensor, heads: int, key_heads: int, width: int) -> Grids:
    """Every layer of a forward pass asks for the same ones, by the same tensor.

    row_ends: [rows + 1], from 0: where packed rows begin and end.
    width: of all heads together.
    """
    ends = row_ends.numpy().astype(np.int64)
    starts, lengths = ends[:-1], np.diff(ends)
    made, queries, keys = [], [], []
    for rows in _similar(lengths, width):
        length = padded(int(lengths[rows].max()))
        column_L = np.arange(length)
        real_RL = np.zeros((_round_up(len(rows)), length), dtype=bool)
        real_RL[: len(rows)] = column_L < lengths[rows][:, None]
        token_RL = np.zeros(real_RL.shape, dtype=np.int64)
        token_RL[: len(rows)] = starts[rows][:, None] + column_L
        token_RL[~real_RL] = 0
        group = heads // key_heads
        head_KRGL = np.arange(heads).reshape(key_heads, 1, group, 1)
        cell_KRGL = token_RL[None, :, None] * heads + head_KRGL
        cell_KRL = token_RL[None] * key_heads + np.arange(key_heads)[:, None, None]
        real_KRGL = np.broadcast_to(real_RL[None, :, None], cell_KRGL.shape)
        real_KRL = np.broadcast_to(real_RL[None], cell_KRL.shape)
        queries.append(np.where(real_KRGL, cell_KRGL, -1).ravel())
        keys.append(np.where(real_KRL, cell_KRL, -1).ravel())
        made.append(
            Grid(
                len(real_RL),
                length,
                torch.from_numpy(cell_KRGL.ravel()),
                torch.from_numpy(cell_KRL.ravel()),
                torch.from_numpy(real_KRGL.reshape(-1, 1).copy()),
                torch.from_numpy(real_RL),
            )
        )
    tokens = int(ends[-1])
    return Grids(tuple(made), _places(queries, tokens * heads), _places(keys, tokens * key_heads))


def padded(length: int) -> int:
    return -(-length // ALIGN) * ALIGN


def _similar(lengths: NDArray[np.int64], width: int) -> list[NDArray[np.int64]]:
    """Row numbers by grid: a new one is begun where padding would cost more than it does."""
    order = np.argsort(-lengths, kind="stable")
    parts: list[list[int]] = []
    wasted = longest = 0
    for row in order[lengths[order] > 0].tolist():
        length = padded(int(lengths[row]))
        wasted += (longest**2 - length**2) * width
        if not parts or wasted > WORTH_A_GRID:
            parts.append([])
            wasted, longest = 0, length
        parts[-1].append(row)
    return [np.asarray(part) for part in parts]


def _round_up(rows: int) -> int:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, …: at most a third more."""
    step = 1 << max(0, rows.bit_length() - 2)
    return -(-rows // step) * step


def _places(cells: list[NDArray[np.int64]], count: int) -> torch.Tensor:
    """The inverse of the grids' cells: [count]."""
    flat = np.concatenate(cells)
    place = np.empty(count, dtype=np.int64)
    real = flat >= 0
    place[flat[real]] = np.flatnonzero(real)
    return torch.from_numpy(place)
