"""Write the handwritten digits that recipes/digits.yaml learns from, as images.

    python recipes/digits/make_data.py --out recipes/digits

scikit-learn's `load_digits` (1,797 digits of 8 x 8 pixels, 0 to 16) -> PNGs of 8-bit grey in two
Parquet files, as `datasets` writes images: {bytes, path}, and a label. The first half is train and
the second test, as in scikit-learn's own example: the rows come writer after writer, so most of the
test's writers are not in train. The same bytes every time.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

SCHEMA = pa.schema(
    {
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "label": pa.string(),
    }
)


def png(grey_HW: NDArray[np.float64]) -> bytes:
    """An image of values from 0 to 16; each stays told apart from the others."""
    pixels = np.rint(grey_HW * (255 / 16)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out = parser.parse_args().out
    digits = load_digits()
    half = len(digits.images) // 2
    for name, part in (("train", slice(None, half)), ("test", slice(half, None))):
        images = [{"bytes": png(image), "path": None} for image in digits.images[part]]
        labels = [str(label) for label in digits.target[part]]
        table = pa.Table.from_pydict({"image": images, "label": labels}, SCHEMA)
        pq.write_table(table, out / f"{name}.parquet", compression="zstd")


if __name__ == "__main__":
    main()
