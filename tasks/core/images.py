"""What a base makes of an image, asked of the base itself and of its image processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.errors import UserError

#: Where transformers keeps how images are made ready.
PROCESSOR = "preprocessor_config.json"

FIX = "choose a base such as ViT, DeiT, BEiT or DINOv2"


@dataclass(frozen=True)
class ImageShape:
    """channels, height, width: of the pixels that a base reads. tokens: that it makes of them, its
    patches and what it adds to them (`[CLS]`, DeiT's distillation token, registers)."""

    channels: int
    height: int
    width: int
    tokens: int

    @property
    def pixels(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width


def image_shape(model: Any) -> ImageShape:
    """What a model on meta reads, by its configuration and one pass over shapes.

    Raises:
        UserError: a base that does not go through all its layers with the same tokens.
    """
    config = model.config
    sizes = [getattr(config, name, None) for name in ("image_size", "patch_size")]
    if None in sizes:
        raise unknown(config)
    (height, width), (down, right) = map(pair, sizes)
    channels = int(getattr(config, "num_channels", 3))
    try:
        with torch.device("meta"), torch.no_grad():
            pixels = torch.empty(1, channels, height, width, dtype=next(model.parameters()).dtype)
            hidden = model.base_model(pixel_values=pixels).last_hidden_state
    except RuntimeError as error:
        raise unknown(config) from error
    patches = (height // down) * (width // right)
    if hidden.ndim != 3 or hidden.shape[1] < patches:
        raise unknown(config)
    return ImageShape(channels, height, width, int(hidden.shape[1]))


def unknown(config: Any) -> UserError:
    return UserError.at(
        "base.model",
        f"a {config.model_type} base does not read an image as one sequence of patches, so that "
        "what a row costs is not known",
        FIX,
    )


def pair(size: Any) -> tuple[int, int]:
    """Height and width of a size that may be one number for both."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


class Processor:
    """The base's own image processor, in two halves: what it does to where pixels stand (resize,
    crop), whose result is bytes, and what it does to their values, which is a table of 256.

    values: float32 [C, 256].
    """

    def __init__(self, base: Path, shape: ImageShape) -> None:
        """Raises a UserError where there is none, or none that comes in such halves."""
        self._own = load_processor(base)
        self._place, self.shape = base / PROCESSOR, shape
        self.values = self._values()

    def pixels(self, images: Sequence[Any]) -> NDArray[np.uint8]:
        """RGB images of Pillow's at the base's size, [B, C, H, W].

        Raises:
            UserError: the processor makes something else of them than the base reads.
        """
        found = self._own(list(images), do_rescale=False, do_normalize=False, return_tensors="np")[
            "pixel_values"
        ]
        if found.dtype != np.uint8 or found.shape[1:] != self.shape.pixels:
            raise UserError.at(
                self._place,
                f"makes {found.dtype} of {' x '.join(map(str, found.shape[1:]))} of an image, and "
                f"the base reads {' x '.join(map(str, self.shape.pixels))} bytes",
                "take the file that belongs to this base",
            )
        return found  # type: ignore[no-any-return]

    def check(self, image: Any) -> None:
        """Raise a UserError where the two halves are not, bit for bit, the whole."""
        whole = self._own(image, return_tensors="np")["pixel_values"][0]
        [pixels] = self.pixels([image])
        halves = np.stack([row[plane] for row, plane in zip(self.values, pixels, strict=True)])
        if whole.dtype != np.float32 or not np.array_equal(whole, halves):
            raise UserError.at(
                self._place,
                "does more to pixels than resize, crop, rescale and normalise them",
                FIX,
            )

    def _values(self) -> NDArray[np.float32]:
        from PIL import Image

        grey_HW = np.arange(256, dtype=np.uint8).reshape(16, 16)
        image = Image.fromarray(np.stack([grey_HW] * 3, axis=-1))
        found = self._own(image, do_resize=False, do_center_crop=False, return_tensors="np")
        values: NDArray[np.float32] = found["pixel_values"][0].reshape(3, 256)
        return values.astype(np.float32)


def load_processor(base: Path) -> Any:
    """The image processor on Pillow, whatever else is installed: torchvision resizes to other
    pixels, and the same rows would be others on another machine.

    Raises:
        UserError: the base has none.
    """
    from transformers import AutoImageProcessor

    if not (base / PROCESSOR).is_file():
        raise UserError.at(
            base,
            f"holds no {PROCESSOR}, so how images are made ready for it is not known",
            "fetch that file too, or choose a base that reads images",
        )
    try:
        return AutoImageProcessor.from_pretrained(base, backend="pil", local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError.at(
            base / PROCESSOR, f"cannot be loaded: {str(error).splitlines()[0]}", FIX
        ) from error
