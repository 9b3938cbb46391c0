"""Token files: the rows of one split as flat tensors; pixels are memory-mapped when read.

tokens/<split>.safetensors holds, for N rows of T tokens in all:

    input_ids     int32 [T]      rows end to end, no padding; of an image a 0 for each token that
                                 the base makes of it (its patches, and what it adds to them)
    offsets       int64 [N + 1]  row i is input_ids[offsets[i]:offsets[i + 1]]
    source_rows   int64 [N]      line of the row in its source file, from 1
    loss_mask     uint8 [T]      causal-lm: 1 where a token is learned (answers and their EOS);
                                 seq2seq: in the target
    answer_start  int64 [N]      position within the row: causal-lm: of its last answer's first
                                 token; seq2seq: where the source ends and the target begins
    labels        int64 [N]      of a whole row: index into labels.json
    token_labels  int32 [T]      token-classification: index into labels.json, or IGNORED
    token_chars   int32 [T, 2]   token-classification: the token's characters in its text, the end
                                 exclusive; equal for a token that stands for none
    values        float32 [C, 256]  images: what the base reads for each byte of a channel

and of images tokens/<split>.npy beside it, uint8 [N, C, H, W]: their pixels, of the base's size.

Retention rows have a loss_mask of ones but for each row's first token, for every task.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file


@dataclass(frozen=True)
class TokenRows:
    """The rows of one split; see the table above for the arrays."""

    input_ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    source_rows: NDArray[np.int64]
    loss_mask: NDArray[np.uint8] | None = None
    answer_start: NDArray[np.int64] | None = None
    labels: NDArray[np.int64] | None = None
    token_labels: NDArray[np.int32] | None = None
    token_chars: NDArray[np.int32] | None = None
    values: NDArray[np.float32] | None = None
    pixels: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, [N]."""
        return np.diff(self.offsets)

    def row(self, index: int) -> NDArray[np.int32]:
        """The tokens of one row, without a copy."""
        return self.input_ids[self.place(index)]

    def place(self, index: int) -> slice:
        """Where the tokens of one row are among all."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def mask(self, index: int) -> NDArray[np.uint8]:
        """The loss mask of one row, without a copy."""
        assert self.loss_mask is not None
        return self.loss_mask[self.place(index)]

    def images(self, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """What the base reads of some images, [B, C, H, W]."""
        assert self.pixels is not None
        assert self.values is not None
        pixels_BCHW = self.pixels[index]
        found = [self.values[c][pixels_BCHW[:, c]] for c in range(pixels_BCHW.shape[1])]
        return np.stack(found, axis=1)

    def take(self, chosen: NDArray[np.bool_]) -> TokenRows:
        """The rows of a mask."""
        tokens = np.repeat(chosen, self.lengths)
        by_row = ("source_rows", "answer_start", "labels", "pixels")
        by_token = ("input_ids", "loss_mask", "token_labels", "token_chars")
        taken: dict[str, Any] = {"values": self.values}
        for names, mask in ((by_row, chosen), (by_token, tokens)):
            arrays = {name: getattr(self, name) for name in names}
            taken |= {
                name: None if array is None else array[mask] for name, array in arrays.items()
            }
        ends = np.cumsum(self.lengths[chosen])
        return TokenRows(**taken, offsets=np.concatenate([[0], ends]).astype(np.int64))

    def save(self, path: Path) -> None:
        arrays = {name: value for name, value in vars(self).items() if value is not None}
        pixels = arrays.pop("pixels", None)
        if pixels is not None:
            np.save(pixels_file(path), pixels)
        save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, path)

    @classmethod
    def load(cls, path: Path) -> TokenRows:
        beside = pixels_file(path)
        pixels = np.load(beside, mmap_mode="r") if beside.exists() else None
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return cls(**arrays, pixels=pixels)


def pixels_file(path: Path) -> Path:
    """Where the pixels of a token file's images lie."""
    return path.with_suffix(".npy")
