"""An image is an input of its own: changed, the rows are prepared anew; moved, they are not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.calls import Calls
from flows.home import Home
from schemas.load import load_recipe
from tasks.core.store import key_of
from tasks.prepare.references import named_images

RECIPE: dict[str, Any] = {
    "name": "images",
    "task": "image-classification",
    "base": {"model": "base", "dtype": "float32"},
    "data": {"train": {"path": "train.jsonl"}, "test": {"holdout": 0.2}},
    "candidates": [{"method": "full"}],
    "select": {"maximize": "accuracy"},
    "register": {"name": "images"},
}
FORMS = {
    ".jsonl": '{"image": "a.png", "label": "x"}\n{"image": "b.png", "label": "y"}\n',
    ".csv": "label,image\nx,a.png\ny,b.png\n",
}


@pytest.fixture(params=FORMS)
def images(place: Path, request: pytest.FixtureRequest) -> Path:
    """A recipe of two images, in JSONL and in CSV."""
    (place / f"train{request.param}").write_text(FORMS[request.param])
    train = {"path": f"train{request.param}"}
    data = {"train": train, "test": {"holdout": 0.2}}
    (place / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"data": data}))
    (place / "home" / "cache").mkdir(parents=True)
    for name in "ab":
        (place / f"{name}.png").write_bytes(name.encode())
    return place


def prepared(place: Path) -> str:
    """The key of the rows, as a run finds it."""
    path = place / "recipe.yaml"
    return key_of(Calls(load_recipe(path), path, Home(place / "home")).prepare().call)


def test_a_changed_image_is_another_input(images: Path) -> None:
    before = prepared(images)
    assert prepared(images) == before
    os.utime(images / "b.png", (0, 0))
    assert prepared(images) == before
    (images / "b.png").write_bytes(b"another")
    changed = prepared(images)
    assert changed != before
    (images / "b.png").unlink()
    assert prepared(images) not in (before, changed)
    (images / "b.png").write_bytes(b"b")
    assert prepared(images) == before


def test_where_images_lie_does_not_count(images: Path, tmp_path_factory: Any) -> None:
    moved = tmp_path_factory.mktemp("moved") / "elsewhere"
    shutil.copytree(images, moved)
    assert prepared(moved) == prepared(images)


def test_names_are_those_that_prepare_would_read(tmp_path: Path) -> None:
    """Bad lines name nothing; images within the file are part of its own hash."""
    rows = [
        b'{"img": "a.png"}',
        b"broken",
        b'["a list"]',
        b'{"img": 3}',
        b'{"img": "base64:AAAA"}',
        b'{"img": {"bytes": "c.png", "path": "d.png"}}',
        json.dumps({"img": "nul\0.png"}).encode(),
        b'{"img": "a.png"}',
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(rows))
    assert named_images(tmp_path / "rows.jsonl", "img") == ["a.png", "c.png"]
    text = 'img,label\n"with, comma.png",x\n"open quote,y\nlast.png,z\nfew\n'
    (tmp_path / "rows.csv").write_text(text)
    assert named_images(tmp_path / "rows.csv", "img") == ["with, comma.png", "last.png", "few"]
    assert named_images(tmp_path / "rows.csv", "image") == []
    assert named_images(tmp_path / "rows.parquet", "img") == []
