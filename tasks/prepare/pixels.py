"""The images of one split as pixels of the base's size, with a label each.

What the base's image processor does to where pixels stand is done here, once; what it does to
their values is a table, looked up when a batch is made (`tasks/core/images.py`). So an image takes
a byte a pixel on disk, memory-mapped, and is bit for bit what the processor gives.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import StageError
from tasks.core.pictures import BadPicture, decode, encoded
from tasks.core.progress import bar
from tasks.core.tokens import TokenRows
from tasks.prepare.ingest import IMAGE_ROWS, frames_of
from tasks.prepare.spans import Counts
from tasks.prepare.split import Split
from tasks.prepare.tokenize import Tokenized


@dataclass(frozen=True)
class PixelReader:
    """The base's processor as this stage uses it. scratch: where pixels lie until they are
    written for good."""

    processor: Any
    tokens: int
    scratch: Path
    template = "none"

    @property
    def max_length(self) -> int:
        """Every row has the same tokens."""
        return self.tokens

    def read(self, split: Split) -> Tokenized:
        """The images of a split, decoded on all cores."""
        kept = split.kept
        count = int(kept.sum())
        shape = (count, *self.processor.shape.pixels)
        pixels_NCHW = np.lib.format.open_memmap(
            self.scratch / f"{split.name}.npy", mode="w+", dtype=np.uint8, shape=shape
        )
        start, lines = 0, list[NDArray[np.int64]]()
        with (
            bar(f"reading images of {split.name}", count, "rows") as progress,
            ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads,
        ):
            for frame in frames_of(split.ingested, kept, IMAGE_ROWS):
                root = split.ingested.layout.root
                references = frame["image"].to_list()
                made = threads.map(lambda one, root=root: self._pixels(one, root), references)
                for place, pixels_CHW in enumerate(made, start):
                    pixels_NCHW[place] = pixels_CHW
                if start == 0 and references:
                    self.processor.check(opened(references[0], root))
                start += len(frame)
                lines.append(frame["row"].to_numpy())
                progress.advance(len(frame))
        pixels_NCHW.flush()
        rows = TokenRows(
            input_ids=np.zeros(count * self.tokens, np.int32),
            offsets=np.arange(count + 1, dtype=np.int64) * self.tokens,
            source_rows=np.concatenate(lines),
            values=self.processor.values,
            pixels=pixels_NCHW,
        )
        return Tokenized(rows, np.zeros(count, bool), {}, Counts())

    def _pixels(self, reference: str, root: Path | None) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = self.processor.pixels([opened(reference, root)])[0]
        return pixels


def opened(reference: str, root: Path | None) -> Any:
    """An image that was whole when its row was read."""
    try:
        return decode(encoded(reference, root))
    except BadPicture as bad:
        raise StageError(
            f"{reference[:80]} changed while it was read ({bad.args[0]}): run again"
        ) from bad


def open_pixels(base: Path, task: str, scratch: Path) -> PixelReader:
    """Load the base's image processor.

    Raises:
        UserError: the base reads no images, or has no processor.
    """
    # torch: not in the worker processes
    from tasks.core.images import Processor, image_shape
    from tasks.core.models import load_config, model_on_meta

    shape = image_shape(model_on_meta(load_config(base), task, base))
    return PixelReader(Processor(base, shape), shape.tokens, scratch)
