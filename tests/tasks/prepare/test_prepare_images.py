"""Images as rows: which are refused and why, which are equal, and what the base reads of them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import DeiTConfig, DeiTForImageClassification, ViTConfig
from transformers import ViTForImageClassification as Vit

from schemas.errors import UserError
from tasks.core.images import load_processor
from tasks.core.pictures import decode, sent

TASK = {"task": "image-classification"}
Prepare = Callable[..., Any]
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 16, "width": 16},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.6, 0.2],
}
CROPPING = {
    "image_processor_type": "DeiTImageProcessor",
    "size": {"height": 20, "width": 20},
    "do_center_crop": True,
    "crop_size": {"height": 16, "width": 16},
    "resample": 3,
}
SIZES = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A ViT whose processor resizes, and a DeiT whose processor crops too."""
    root = tmp_path_factory.mktemp("bases")
    made = {
        "vit": (Vit(ViTConfig(**SIZES)), PROCESSOR),
        "deit": (DeiTForImageClassification(DeiTConfig(**SIZES)), PROCESSOR | CROPPING),
    }
    for name, (model, processor) in made.items():
        model.save_pretrained(root / name)
        (root / name / "preprocessor_config.json").write_text(json.dumps(processor))
    return {name: root / name for name in made}


def pixels(number: int, mode: str = "RGB") -> Image.Image:
    """A picture that no other number has."""
    draw = np.random.default_rng(number)
    return Image.fromarray(draw.integers(0, 256, (20, 30, 3), dtype=np.uint8)).convert(mode)


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def row(name: object, label: str = "a") -> dict[str, object]:
    return {"image": name, "label": label}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Ten pictures beside the rows: 0.png to 9.png."""
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(file_of(pixels(number)))
    return tmp_path


GOOD = [row("0.png", "a"), row("1.png", "b")]
TEST = [row("9.png", "a")]
SOUND = file_of(pixels(3))
TURNED = Image.Exif()
TURNED[0x0112] = 6  # to be turned by a quarter before it is shown

BAD = [
    (None, "missing:image"),
    (3, "wrong_type:image"),
    ({"bytes": None, "path": "0.png"}, "missing:image.bytes"),
    ("nowhere.png", "no_file"),
    ("", "no_file"),
    ("a\0b", "no_file"),
    (b"", "empty_image"),
    (b"no image at all", "not_an_image"),
    ("base64:!", "not_an_image"),
    (SOUND[: len(SOUND) // 2], "broken_image"),
    (file_of(pixels(3), "JPEG")[:-200], "broken_image"),
    (file_of(Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20))), "image_mode:I;16"),
    (
        file_of(pixels(3), "GIF", save_all=True, append_images=[pixels(4), pixels(5)]),
        "several_frames:3",
    ),
]


@pytest.mark.parametrize(("image", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_what_is_no_image_is_refused(
    prepare: Prepare, bases: dict[str, Path], files: Path, image: Any, reason: str
) -> None:
    if isinstance(image, bytes):
        (files / "bad.png").write_bytes(image)
        image = "bad.png"
    made = prepare([*GOOD, row(image)], TEST, base=bases["vit"], **TASK)
    assert made.reasons() == {3: [reason]}
    assert (made.report.splits["train"].rows_in, len(made.tokens())) == (3, 2)


def test_an_image_of_too_many_pixels_is_refused(
    prepare: Prepare, bases: dict[str, Path], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30 * 40)
    (files / "large.png").write_bytes(file_of(Image.new("RGB", (31, 40))))
    (files / "larger.png").write_bytes(file_of(Image.new("RGB", (90, 90))))
    rows = [*GOOD, row("large.png"), row("larger.png")]
    made = prepare(rows, TEST, base=bases["vit"], **TASK)
    assert made.reasons() == {3: ["image_too_large"], 4: ["image_too_large"]}


def test_no_program_is_started_for_an_image(files: Path) -> None:
    """Pillow reads EPS through Ghostscript."""
    with pytest.raises(Exception, match="not_an_image"):
        decode(file_of(pixels(0), "EPS"))


def test_equal_images_are_found_by_their_pixels(
    prepare: Prepare, bases: dict[str, Path], files: Path
) -> None:
    """However they are encoded, whatever their labels, and across the splits."""
    (files / "again.bmp").write_bytes(file_of(pixels(0), "BMP"))
    (files / "small.png").write_bytes(file_of(pixels(9), compress_level=0))
    rows = [*GOOD, row("again.bmp", "b"), row("small.png", "b"), row("1.png", "b")]
    made = prepare(rows, TEST, base=bases["vit"], **TASK)
    found = {3: ["duplicate_of:1"], 4: ["leaks_into_test:1"], 5: ["duplicate_of:2"]}
    assert made.reasons() == found


@pytest.mark.parametrize("base", ["vit", "deit"])
def test_pixels_are_those_of_the_bases_own_processor(
    prepare: Prepare, bases: dict[str, Path], files: Path, base: str
) -> None:
    """Bit for bit, of pictures of every mode and format, after resize, crop and normalisation."""
    modes = ("1", "L", "LA", "P", "RGB", "RGBA")
    names = [f"{mode}.png" for mode in modes] + ["c.jpg", "turned.jpg", "0.png"]
    for place, mode in enumerate(modes):
        (files / f"{mode}.png").write_bytes(file_of(pixels(20 + place, mode)))
    (files / "c.jpg").write_bytes(file_of(pixels(30, "CMYK"), "JPEG"))
    (files / "turned.jpg").write_bytes(file_of(pixels(31), "JPEG", exif=TURNED))
    rows = [row(name, "ab"[place % 2]) for place, name in enumerate(names)]
    made = prepare(rows, TEST, base=bases[base], **TASK)
    tokens = made.tokens()
    processor = load_processor(bases[base])
    images = [decode((files / name).read_bytes()) for name in names]
    assert images[names.index("turned.jpg")].size == (20, 30)
    expected = processor(images, return_tensors="np")["pixel_values"]
    assert np.array_equal(tokens.images(np.arange(len(names))), expected)
    # ViT puts one token before its patches, DeiT two.
    assert set(tokens.lengths) == {16 + {"vit": 1, "deit": 2}[base]}
    assert made.report.max_length == tokens.lengths[0]


def test_pixels_stay_on_disk(prepare: Prepare, bases: dict[str, Path], files: Path) -> None:
    made = prepare(GOOD, TEST, base=bases["vit"], **TASK)
    assert isinstance(made.tokens().pixels, np.memmap)
    assert made.tokens().pixels.nbytes == 2 * 3 * 16 * 16


def as_datasets_writes(rows: list[dict[str, Any]], files: Path) -> bytes:
    """Parquet with images in it: {bytes, path}."""
    image = [{"bytes": (files / one["image"]).read_bytes(), "path": None} for one in rows]
    table = pa.Table.from_pydict({"image": image, "label": [one["label"] for one in rows]})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def test_every_form_of_a_file_gives_the_same(
    prepare: Prepare, bases: dict[str, Path], files: Path
) -> None:
    """Paths in JSONL and CSV, bytes in Parquet, base64 in JSONL; rows hold the file's bytes."""
    names = [f"{number}.png" for number in range(4)]
    rows = [row(name, "ab"[place % 2]) for place, name in enumerate(names)]
    lines = "".join(f"{one['image']},{one['label']}\n" for one in [*rows])
    encoded = [
        one | {"image": "base64:" + base64.b64encode((files / one["image"]).read_bytes()).decode()}
        for one in rows
    ]
    made = [
        prepare(rows, TEST, base=bases["vit"], **TASK),
        prepare(encoded, TEST, base=bases["vit"], **TASK),
        prepare(
            f"image,label\n{lines}".encode(),
            b"image,label\n9.png,a\n",
            base=bases["vit"],
            suffix=".csv",
            **TASK,
        ),
        prepare(
            as_datasets_writes(rows, files),
            as_datasets_writes(TEST, files),
            base=bases["vit"],
            suffix=".parquet",
            **TASK,
        ),
    ]
    first = made[0]
    for other in made:
        assert np.array_equal(other.tokens().pixels, first.tokens().pixels)
        assert other.tokens().labels.tolist() == [0, 1, 0, 1]
        kept = other.rows()
        assert kept["image"].to_list() == [(files / name).read_bytes() for name in names]
        assert kept.schema["image"] == pl.Binary
    shown = json.loads((first.path / "test_rows.jsonl").read_text())
    assert shown == {"row": 1, "prompt": "9.png", "label": "a"}


def test_a_path_in_a_parquet_file_is_refused(
    prepare: Prepare, bases: dict[str, Path], files: Path
) -> None:
    """Its images would be no part of what the result is keyed by."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": ["0.png", "1.png"], "label": ["a", "b"]}), sink)
    with pytest.raises(UserError, match="all 2 rows are refused: 2 no_file"):
        prepare(sink.getvalue(), sink.getvalue(), base=bases["vit"], suffix=".parquet", **TASK)


def test_columns_hold_out_and_a_sample(
    prepare: Prepare, bases: dict[str, Path], files: Path
) -> None:
    rows = [{"file_name": f"{number}.png", "kind": number % 2} for number in range(10)]
    columns = {"image": "file_name", "label": "kind"}
    made = prepare(rows, {"holdout": 0.4}, base=bases["vit"], columns=columns, **TASK)
    train, test = made.tokens(), made.tokens("test")
    assert len(train) + len(test) == 10
    assert test.pixels.shape[0] == len(test) == len(test.labels)
    with pytest.raises(UserError, match=r"image: file_name"):
        prepare(rows, rows, base=bases["vit"], **TASK)


def test_a_processor_that_belongs_to_another_base_is_refused(
    prepare: Prepare, bases: dict[str, Path], files: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((bases["vit"] / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"holds no preprocessor_config\.json"):
        prepare(GOOD, TEST, base=base, **TASK)
    other = PROCESSOR | {"size": {"height": 24, "width": 24}}
    (base / "preprocessor_config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="makes uint8 of 3 x 24 x 24"):
        prepare(GOOD, TEST, base=base, **TASK)


@pytest.mark.parametrize("form", [bytes, str, "base64:".__add__])
def test_a_request_carries_bytes_or_base64(form: Any) -> None:
    """MLflow's own encoding breaks lines; a file's bytes are left as they are."""
    text = base64.encodebytes(SOUND).decode()
    assert sent(text.encode() if form is bytes else form(text)) == SOUND
    for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"):
        assert sent(file_of(pixels(1), kind)) == file_of(pixels(1), kind)
