"""`peftflow check`: what it says of good rows, and each bad input by its place and its fix.

All share one home in which a good recipe was checked, so that a bad one has something to spoil.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from schemas.errors import DiskFullError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "recipes" / "quickstart" / "base"

TRAIN = (
    b'{"prompt": "one", "completion": "first"}\n'
    b'{"prompt": "two", "completion": "second"}\n'
    b'{"prompt": "two", "completion": "second"}\n'
    b'{"prompt": "three", "completion": ""}\n'
    b"broken\n"
    b'{"prompt": "' + b"a long story " * 40 + b'", "completion": "cut"}\n'
)
TEST = b'{"prompt": "four", "completion": "fourth"}\n'
CHATS = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'

#: Bytes of a line that no row may have; a hole in the file, so that writing it takes no time.
HUGE = 100 << 20


@dataclass(frozen=True)
class Shop:
    """A directory with a recipe that is good, its rows, and a home in which it was checked."""

    place: Path
    recipe: Path
    home: Path
    tree: dict[str, Any]
    first: Any  # how the first check ended

    def listing(self) -> set[str]:
        """Every path of the store, whatever is hidden included."""
        store = self.home / "store"
        return {path.relative_to(store).as_posix() for path in store.rglob("*")}

    def changed(self, directory: Path, **sections: Any) -> Path:
        """The recipe with whole sections replaced, in a directory of its own."""
        path = directory / "recipe.yaml"
        path.write_text(yaml.safe_dump({**self.tree, **sections}))
        return path


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, peftflow: Any, tree: Any) -> Shop:
    if not (BASE / "model.safetensors").exists():
        pytest.skip("recipes/quickstart/base is not there")
    place = tmp_path_factory.mktemp("check")
    (place / "train.jsonl").write_bytes(TRAIN)
    (place / "test.jsonl").write_bytes(TEST)
    sources = {name: {"path": str(place / f"{name}.jsonl")} for name in ("train", "test")}
    recipe = tree | {"data": {**sources, "max_length": 64, "on_overflow": "truncate"}}
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    ended = peftflow("check", path, "--home", place / "home")
    assert ended.code == 0, ended.out
    return Shop(place, path, place / "home", recipe, ended)


def test_a_good_check_counts_every_row_and_the_next_says_the_same(
    shop: Shop, peftflow: Any
) -> None:
    again = peftflow("check", shop.recipe, "--home", shop.home, "--json")
    assert again.code == 0, again.err
    assert again.err.count(" cached ") == 2
    assert shop.first.out.count(" made ") == 2
    said = [line for line in shop.first.out.splitlines() if " rows in = " in line]
    assert said == [line for line in again.err.splitlines() if " rows in = " in line]
    assert said == [
        "    train     6 rows in = 3 kept + 3 refused "
        "(empty_answer 1, malformed_json 1, duplicate_of 1); 1 truncated",
        "    test      1 rows in = 1 kept + 0 refused",
    ]
    [kept] = shop.home.glob("store/prepare/*/data_report.json")
    assert again.record == json.loads(kept.read_text())
    train = again.record["splits"]["train"]
    assert train["rows_in"] == train["rows_kept"] + sum(train["refused"].values())
    assert (train["truncated"], train["label_less"]) == (1, 0)


@dataclass(frozen=True)
class Bad:
    """An input that is wrong, and what must be said of it.

    write: makes files in the case's directory and returns the sections of the recipe that change.
    place, found, fix: words of the one error. extra: what `check` may leave in the store: the
    entry of `inspect`, whose own input was good, where the good recipe had not made the same.
    """

    write: Callable[[Path], dict[str, Any]]
    place: str
    found: str
    fix: str
    extra: set[str] = field(default_factory=set)
    variables: dict[str, str] = field(default_factory=dict)


def train_of(name: str, content: bytes, size: int = 0, **data: Any) -> Callable[[Path], Any]:
    """A file of train rows, made `size` bytes long by a hole."""

    def write(directory: Path) -> dict[str, Any]:
        path = directory / name
        path.write_bytes(content)
        if size:
            os.truncate(path, size)
        test = directory / "test.jsonl"
        test.write_bytes(TEST)
        return {"data": {"train": {"path": name}, "test": {"path": test.name}, **data}}

    return write


def hub_base(_: Path) -> dict[str, Any]:
    return {"base": {"model": "no-one/nothing", "revision": "0" * 40}}


def hub_rows(_: Path) -> dict[str, Any]:
    train = {"path": "hub:no-one/nothing", "revision": "0" * 40}
    return {"data": {"train": train, "test": {"holdout": 0.2}}}


def unseen_labels(directory: Path) -> dict[str, Any]:
    (directory / "train.csv").write_text("text,label\none,a\ntwo,b\n")
    (directory / "test.csv").write_text("text,label\nthree,a\nfour,c\n")
    data = {"train": {"path": "train.csv"}, "test": {"path": "test.csv"}}
    return {"task": "sequence-classification", "data": data}


def no_chat_template(directory: Path) -> dict[str, Any]:
    shutil.copytree(BASE, directory / "base")
    (directory / "base" / "chat_template.jinja").unlink(missing_ok=True)
    path = directory / "base" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("chat_template", None)
    path.write_text(json.dumps(settings))
    return train_of("chats.jsonl", CHATS)(directory) | {"base": {"model": "base"}}


def pickled(name: str) -> Callable[[Path], dict[str, Any]]:
    def write(directory: Path) -> dict[str, Any]:
        (directory / "base").mkdir()
        shutil.copy(BASE / "config.json", directory / "base")
        (directory / "base" / name).write_bytes(b"\x80\x04.")
        return {"base": {"model": "base"}}

    return write


def wide_rank(_: Path) -> dict[str, Any]:
    return {"candidates": [{"method": "lora", "rank": 4096, "target_modules": ["q_proj"]}]}


#: 300 columns, none of them ours.
WIDE = b",".join(b"c%d" % number for number in range(300))

#: Nobody has said that there is no network; there is none.
NO_NETWORK = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}

BAD = {
    "hub base without network": Bad(
        hub_base,
        "recipe.yaml base.model",
        "the hub cannot be reached",
        "write `model: DIR`",
        variables=NO_NETWORK,
    ),
    "hub rows without network": Bad(
        hub_rows,
        "hub:no-one/nothing",
        "cannot be loaded",
        "without a network, give a file",
        variables=NO_NETWORK,
    ),
    "300 columns": Bad(
        train_of("wide.csv", WIDE + b"\n" + WIDE + b"\n"),
        "wide.csv",
        "the file has 300 columns",
        "data.train.columns",
    ),
    "empty file": Bad(train_of("empty.jsonl", b""), "empty.jsonl", "is empty", "at least one row"),
    "header in bad UTF-8": Bad(
        train_of("latin.csv", b"prompt,r\xe9ponse\na,b\n"), "latin.csv:1", "bad_utf8", "in UTF-8"
    ),
    "header of 100 MB": Bad(
        train_of("header.csv", b"prompt,completion", HUGE),
        "header.csv:1",
        "oversized_line",
        "one line of column names",
    ),
    "every CSV row refused, each for another reason": Bad(
        train_of("rows.csv", b"prompt,completion\na,\nb\0,c\n\xff,d\ne,f", HUGE),
        "rows.csv (data.train)",
        "all 4 rows are refused: 1 empty_answer (an answer or label with nothing in it), "
        "1 nul_byte (text with a NUL character), 1 bad_utf8 (bytes that are not UTF-8; raw is "
        "base64), 1 oversized_line (",
        "see line 2: empty_answer",
    ),
    "every JSON row refused, each for another reason": Bad(
        train_of("rows.jsonl", b'{"prompt": "a", "completion": ""}\n\xff\nx\0y\n[1]\n', HUGE),
        "rows.jsonl (data.train)",
        "all 5 rows are refused: 1 empty_answer (an answer or label with nothing in it), "
        "1 bad_utf8 (bytes that are not UTF-8; raw is base64), 1 malformed_json (not JSON), "
        "1 not_an_object (JSON, but not an object), 1 oversized_line (",
        "see line 1: empty_answer",
    ),
    "labels that train never saw": Bad(
        unseen_labels, "test.csv", "'c' (line 3)", "train", extra={"inspect"}
    ),
    "chats without a chat template": Bad(
        no_chat_template, "base", "no chat template, and the rows are chats", "chat_template.jinja"
    ),
    "rank larger than the matrix": Bad(
        wide_rank, "candidates[0].rank", "only 256 wide", "at most 256"
    ),
    "pickled checkpoint, .bin": Bad(
        pickled("pytorch_model.bin"), "base/pytorch_model.bin", "refused", "safe_serialization"
    ),
    "pickled checkpoint, .pt": Bad(
        pickled("model.pt"), "base/model.pt", "refused", "safe_serialization"
    ),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_input_is_one_error_with_place_and_fix(
    bad: Bad, shop: Shop, tmp_path: Path, peftflow: Any
) -> None:
    before = shop.listing()
    recipe = shop.changed(tmp_path, **bad.write(tmp_path))
    ended = peftflow("check", recipe, "--home", shop.home, "--json", variables=bad.variables)
    assert ended.code == 2, ended.err
    assert ended.record["state"] == "wrong-input"
    [error] = ended.record["errors"]
    assert bad.place in error["place"]
    assert bad.found in error["found"]
    assert bad.fix in error["fix"]
    for word in (error["place"], error["found"], error["fix"]):
        assert word in ended.err  # people read the same
    new = shop.listing() - before
    assert {path.split("/")[0] for path in new} == bad.extra
    assert before <= shop.listing()


def test_a_csv_row_that_is_too_long_is_set_aside_and_the_rest_is_kept(
    shop: Shop, tmp_path: Path, peftflow: Any
) -> None:
    """One bad row is no bad file: it is refused with its line, and the rows around it learned."""
    path = tmp_path / "rows.csv"
    with path.open("wb") as file:
        file.write(b"prompt,completion\na,b\n")
        file.seek(HUGE, os.SEEK_CUR)
        file.write(b"\nc,d\n")
    test = {"path": str(shop.place / "test.jsonl")}
    data = {"train": {"path": "rows.csv"}, "test": test, "max_length": 64}
    ended = peftflow("check", shop.changed(tmp_path, data=data), "--home", shop.home, "--json")
    assert ended.code == 0, ended.err
    train = ended.record["splits"]["train"]
    assert (train["rows_in"], train["rows_kept"]) == (3, 2)
    assert train["refused"] == {"oversized_line": 1}


def test_a_full_disk_is_exit_2_and_says_so(shop: Shop, tmp_path: Path) -> None:
    """A home on a file system of 2 MiB, mounted where nobody else sees it."""
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("`unshare -Urm` is refused here, so no small file system can be mounted")
    rows = b"".join(
        b'{"prompt": "%d %s", "completion": "x"}\n' % (number, os.urandom(400).hex().encode())
        for number in range(5000)  # 4 MB of text that does not compress into 2 MiB
    )
    (tmp_path / "train.jsonl").write_bytes(rows)
    test = {"path": str(shop.place / "test.jsonl")}
    data = {"train": {"path": "train.jsonl"}, "test": test, "on_overflow": "truncate"}
    recipe = shop.changed(tmp_path, data=data)
    home = tmp_path / "home"
    home.mkdir()
    inspected = shop.home / "store" / "inspect"  # the same here, and small
    check = [sys.executable, "-m", "flows.cli", "check", str(recipe), "--home", str(home), "--json"]
    script = (
        f"mount -t tmpfs -o size=2m none {shlex.quote(str(home))} || exit 77\n"
        f"cd {shlex.quote(str(home))}; mkdir store; cp -r {shlex.quote(str(inspected))} store\n"
        f"(cd {shlex.quote(str(ROOT))}; {shlex.join(check)}); code=$?\n"
        "find store -mindepth 2 -maxdepth 2\n"
        "exit $code"
    )
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", script], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr}")
    assert done.returncode == 2, done.stderr
    said, *left = done.stdout.splitlines()
    record = json.loads(said)
    assert record["state"] == "wrong-input"
    [error] = record["errors"]
    assert f"{home}/store: the disk is full. Free some space and run again" in error["found"]
    assert "disk is full" in done.stderr
    assert error["fix"] == DiskFullError.FIX
    # The store is as it was: no entry is new, and nothing half made takes up the room.
    assert set(left) == {f"store/inspect/{path.name}" for path in inspected.iterdir()}
