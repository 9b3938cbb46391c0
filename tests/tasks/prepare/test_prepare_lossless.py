"""Nothing is lost: every line of every file is found again as a row or in the quarantine."""

from __future__ import annotations

import base64
import json
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.recipe import Source
from tasks.prepare import blocks, csv_rows
from tasks.prepare import ingest as ingest_module
from tasks.prepare.blocks import Layout
from tasks.prepare.ingest import Ingested, ingest, write_rows
from tasks.prepare.layout import find_layout
from tasks.prepare.records import normalise
from tasks.prepare.report import write_quarantine
from tasks.prepare.same import held_out
from tasks.prepare.sources import Readable, open_source, recall
from tasks.prepare.split import Split
from tasks.prepare.stage import whole

TEXT = st.text(max_size=12)
VALUE = st.one_of(TEXT, st.none(), st.integers(), st.lists(TEXT, max_size=2))
ROW = st.fixed_dictionaries({}, optional={"prompt": VALUE, "completion": VALUE})
GOOD = st.fixed_dictionaries(
    {"prompt": st.sampled_from(["a", "b", " a "]), "completion": st.sampled_from(["c", "d"])}
)
LINE = st.one_of(
    GOOD.map(lambda row: json.dumps(row).encode()),
    ROW.map(lambda row: json.dumps(row).encode()),
    ROW.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.binary(max_size=20).map(lambda raw: raw.replace(b"\n", b" ")),
)


def sorted_split(path: Path, folder: Path) -> Split:
    source = Source(path=path.name)
    readable = open_source(source, path, folder)
    layout = Layout("completion", {"prompt": "prompt", "completion": "completion"})
    split = whole("train", ingest(readable, layout, folder / "scratch"))
    split.refuse_duplicates()
    return split


def raw_of(text: str, reasons: list[str]) -> bytes:
    """The bytes that a quarantine entry stands for."""
    if "bad_utf8" in reasons:
        return base64.b64decode(text.removeprefix("base64:"))
    return text.encode()


@settings(max_examples=60, deadline=None)
@given(
    content=st.lists(LINE, min_size=1, max_size=30),
    ends=st.booleans(),
    block=st.sampled_from([16, 64, 8 << 20]),
)
def test_every_json_line_is_kept_or_quarantined(
    content: list[bytes], ends: bool, block: int
) -> None:
    # Blocks of 16 bytes put borders everywhere; worker processes are tested elsewhere.
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", block)
        patch.setattr(ingest_module, "BLOCKS_FOR_WORKERS", 10**9)
        folder = Path(name)
        path = folder / "rows.jsonl"
        path.write_bytes(b"\n".join(content) + b"\n" * ends)
        if not path.stat().st_size:
            return
        given_lines = path.read_bytes().split(b"\n")
        given_lines = given_lines if given_lines[-1] else given_lines[:-1]
        split = sorted_split(path, folder)
        kept = split.kept
        assert (
            split.rows_in
            == len(given_lines)
            == kept.sum() + sum(split.refused_by_reason().values())
        )
        write_rows(split.ingested, kept, folder / "rows.parquet")
        write_quarantine([split], folder / "quarantine.parquet")
        rows = pl.read_parquet(folder / "rows.parquet")
        found: dict[int, bytes] = {}
        for row in rows.iter_rows(named=True):
            line = given_lines[row["row"] - 1]
            record = json.loads(line)
            assert (row["prompt"], row["completion"]) == (record["prompt"], record["completion"])
            found[row["row"]] = line
        for entry in pl.read_parquet(folder / "quarantine.parquet").iter_rows(named=True):
            assert entry["line"] not in found
            assert entry["reasons"]
            found[entry["line"]] = raw_of(entry["raw"], entry["reasons"])
        assert [found[number] for number in sorted(found)] == given_lines


CELL = st.text(alphabet="ab ,\"\n\r'é", max_size=6)


@settings(max_examples=100, deadline=None)
@given(
    records=st.lists(
        st.one_of(
            st.tuples(CELL, CELL).map(
                lambda cells: ",".join('"' + cell.replace('"', '""') + '"' for cell in cells)
            ),
            CELL,
            st.just("\udcff\udcfe,x"),  # bytes that are not UTF-8, by surrogateescape
        ),
        max_size=12,
    )
)
def test_every_csv_byte_is_in_exactly_one_record(records: list[str]) -> None:
    """The spans of the records tile the file: no byte is lost, none is read twice."""
    content = "prompt,completion\n" + "\n".join(records)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "rows.csv"
        raw = content.encode("utf-8", "surrogateescape")
        path.write_bytes(raw)
        with path.open("rb") as file:
            found = list(csv_rows.Records(file, ","))
        position = 0
        for record in sorted(found, key=lambda record: record.offset):
            assert record.offset == position
            assert record.line == raw[:position].count(b"\n") + 1
            position += record.length + 1
        assert position in (len(raw), len(raw) + 1)


def test_csv_quotes_may_span_lines_and_line_numbers_stay_right(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b'prompt,completion\r\n"a\r\nb",c\r\n\r\nd,e,f\r\ng,"h ""i"""\r\n"never,closed\r\nj,k\r\n'
    )
    split = sorted_split(path, tmp_path)
    write_rows(split.ingested, split.kept, tmp_path / "rows.parquet")
    rows = pl.read_parquet(tmp_path / "rows.parquet").rows()
    assert rows == [(2, "a\r\nb", "c"), (6, "g", 'h "i"'), (8, "j", "k")]
    refused = {line.line: line.reasons for line in split.all_refused()}
    assert refused == {4: ["blank_line"], 5: ["wrong_field_count:3"], 7: ["malformed_csv"]}


def test_a_line_of_100_mb_is_refused_and_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    length = 100_000_000
    with path.open("wb") as file:
        file.write(b'{"prompt": "a", "completion": "b"}\n')
        file.write(b'{"prompt": "')
        for _ in range(length // 1_000_000):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"prompt": "c", "completion": "d"}\n')
    planned = blocks.plan_json_lines(path)
    longest = sorted(block.end - block.start for block in planned)
    assert longest[-2] <= blocks.BLOCK_BYTES
    split = sorted_split(path, tmp_path)
    assert split.ingested.lines.tolist() == [1, 3]
    [refused] = split.all_refused()
    assert refused.reasons == [f"oversized_line:{length + 14}"]
    shown = recall(path, refused.offset, refused.length)
    assert len(shown) < 2000
    assert f"[{length + 14} bytes, sha256 " in shown


@pytest.mark.slow
def test_worker_processes_find_what_one_process_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for number in range(2000):
            file.write(json.dumps({"prompt": f"p {number % 700}", "completion": "c"}) + "\n")
            if number % 97 == 0:
                file.write("broken\n")
    readable = Readable("rows.jsonl", path, "jsonl", ["prompt", "completion"])
    layout = Layout("completion", {"prompt": "prompt", "completion": "completion"})
    alone = ingest(readable, layout, tmp_path / "one")
    jobs = [
        blocks.JsonLines(path, start, end)
        for start, end in cut_at_newlines(path.read_bytes(), 9000)
    ]
    assert len(jobs) >= ingest_module.BLOCKS_FOR_WORKERS
    monkeypatch.setattr(ingest_module, "plan_json_lines", lambda _: jobs)
    together = ingest(readable, layout, tmp_path / "many")
    assert same(alone, together)


def cut_at_newlines(content: bytes, size: int) -> list[tuple[int, int]]:
    cuts = [0]
    while cuts[-1] < len(content):
        end = content.find(b"\n", cuts[-1] + size)
        cuts.append(len(content) if end < 0 else end + 1)
    return list(pairwise(cuts))


def same(one: Ingested, other: Ingested) -> bool:
    arrays = ("lines", "offsets", "lengths", "digests")
    return one.refused == other.refused and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays
    )


@settings(max_examples=50, deadline=None)
@given(order=st.permutations(range(12)), share=st.sampled_from([0.1, 0.25, 0.4]))
def test_the_hold_out_is_a_function_of_the_row_alone(order: list[int], share: float) -> None:
    """Whatever stands beside it and in whichever order, a row is held out or it is not."""
    rows = [{"prompt": f"question {number}", "completion": "answer"} for number in range(12)]

    def chosen(some: list[dict[str, str]]) -> set[str]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path = folder / "rows.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in some))
            split = sorted_split(path, folder)
            held = held_out(split.ingested.digests, share)
            return {some[line - 1]["prompt"] for line in split.ingested.lines[held]}

    assert chosen([rows[place] for place in order]) == chosen(rows)
    assert chosen(rows[:6]) == chosen(rows) & {row["prompt"] for row in rows[:6]}


def test_the_hold_out_is_about_its_share() -> None:
    digests = np.random.default_rng(0).integers(0, 2**64, (20_000, 2), dtype=np.uint64)
    # Four standard deviations of a binomial of 20,000 at 0.1 are 170.
    assert abs(held_out(digests, 0.1).sum() - 2000) < 170


@given(text=st.text(max_size=30))
def test_normalising_is_idempotent_and_blind_to_white_space(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert normalise(f" \t{text}\n\u00a0") == once


def test_equal_means_equal_after_unicode_and_white_space() -> None:
    assert normalise("caf\u00e9") == normalise("cafe\u0301")
    assert normalise("a\u00a0 b\n") == normalise("a b")
    assert normalise("x\u00b2") != normalise("x2")
    assert normalise("A") != normalise("a")


def test_columns_are_found_past_a_giant_first_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x" * (30 << 20) + b'\n{"prompt": "a", "completion": "b"}\n')
    readable = open_source(Source(path=path.name), path, tmp_path)
    assert find_layout("causal-lm", "train", Source(path=path.name), readable).kind == "completion"
