"""Encoded images (PNG, JPEG, …) as RGB pixels, or the reason why one is none.

As `transformers.image_utils.load_image` reads them: turned as EXIF says, then RGB, so that a served
model, which knows nothing of this project, sees the same. Formats are named one by one: Pillow
would start Ghostscript for an EPS file.

A registered version carries this file, so that it reads images by the same rules. It imports
nothing but Pillow.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")

#: Modes of 8 bits or fewer a channel: others (16 bits, floats) would be clipped in RGB.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")

#: The longer side of an image that is shown, pixels.
SHOWN = 96

#: What stands before the bytes of an image in a text.
BASE64 = "base64:"


class BadPicture(Exception):
    """Bytes that are no image to learn from. args: a reason code of `schemas.rows.REASONS`."""


def encoded(reference: str, root: Path | None) -> bytes:
    """The bytes that a reference names: `base64:…`, or a path relative to `root`.

    root: None where there is no directory to be relative to.

    Raises:
        BadPicture: there is no such file.
    """
    if reference.startswith(BASE64):
        try:
            return base64.b64decode(reference.removeprefix(BASE64), validate=True)
        except binascii.Error:
            raise BadPicture("not_an_image") from None
    if root is None:
        raise BadPicture("no_file")
    try:
        return (root / reference).read_bytes()
    except (OSError, ValueError):  # ValueError: a NUL in the name
        raise BadPicture("no_file") from None


def sent(value: str | bytes) -> bytes:
    """The bytes of an image as a request carries them: as they are, or in base64, which JSON has
    in their place (MLflow takes it out again from some forms of a request and not from others). No
    format that is read here is spelt in letters and digits alone."""
    text = value.encode() if isinstance(value, str) else value
    try:
        return base64.b64decode(b"".join(text.removeprefix(BASE64.encode()).split()), validate=True)
    except binascii.Error:
        return text


def decode(data: bytes) -> Image:
    """The image as RGB, every pixel of it read.

    Raises:
        BadPicture: it is empty, no image, cut short, too large, or of a kind that RGB would change.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not data:
        raise BadPicture("empty_image")
    Image.init()
    # Pillow fails, in other words, on one that it was built without.
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that nobody reads
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data), formats=formats)
            check(opened)
            opened.load()
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (BadPicture, MemoryError):
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadPicture("image_too_large") from None
    except UnidentifiedImageError:
        raise BadPicture("not_an_image") from None
    except Exception:
        # Each of Pillow's decoders has exceptions of its own for bytes that are wrong or missing.
        raise BadPicture("broken_image") from None


def check(image: Image) -> None:
    """Raise a BadPicture for what could be opened and is not one plain picture."""
    if 0 in image.size:
        raise BadPicture("empty_image")
    if image.mode not in MODES:
        raise BadPicture(f"image_mode:{image.mode}")
    frames = getattr(image, "n_frames", 1)
    # A phone's JPEG holds a preview as its second frame.
    if frames > 1 and image.format != "MPO":
        raise BadPicture(f"several_frames:{frames}")


def content_digest(image: Image, size: int) -> bytes:
    """`size` bytes that are the same for images of the same pixels, however they are encoded."""
    width, height = image.size
    head = f"{width} {height} ".encode()
    return blake2b(head + image.tobytes(), digest_size=size).digest()


def data_uri(pixels_CHW: NDArray[np.uint8]) -> str:
    """RGB pixels as a small PNG that stands within a page."""
    from PIL import Image

    image = Image.fromarray(pixels_CHW.transpose(1, 2, 0))
    image.thumbnail((SHOWN, SHOWN))
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
