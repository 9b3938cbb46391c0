"""Rows to validated Parquet, and tokenising against the tokenizer alone.

    python benchmarks/prepare.py [--quick] [--rows N]

Makes a chat JSONL (1,000,000 rows, about 380 MB) from a seed. Each measurement runs in a process
of its own; memory is the largest sum of the resident sets of it and its children, sampled every
20 ms.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from common import Result, at_least, at_most, write

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart"
ROWS, QUICK_ROWS = 1_000_000, 100_000

#: Rows of the tokenising measurement, and how often both sides are timed, in turn.
TOKENIZE_ROWS, QUICK_TOKENIZE_ROWS, REPEATS = 100_000, 20_000, 5

#: Share of rows that repeat an earlier one, and of lines that are no JSON.
DUPLICATES, BROKEN = 0.01, 0.001


def sentences() -> list[str]:
    """The words of the quickstart's general text."""
    with (QUICKSTART / "retention.jsonl").open() as file:
        texts = [json.loads(line)["text"] for line in file]
    return [part.strip() + "." for text in texts for part in text.split(".") if len(part) > 20]


def make_rows(path: Path, count: int) -> None:
    """Write `count` chat rows of a system message, a question and an answer."""
    rng = random.Random(0)
    pool = sentences()
    last = ""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            draw = rng.random()
            if draw < BROKEN:
                file.write('{"messages": [{"role": "user", "content"\n')
                continue
            if last and draw < BROKEN + DUPLICATES:
                file.write(last)
                continue
            question = f"{rng.choice(pool)} {rng.choice(pool)} ({number})"
            answer = f"{rng.choice(pool)} {rng.choice(pool)}"
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
                {"role": "user", "content": "And then?"},
                {"role": "assistant", "content": rng.choice(pool)},
            ]
            last = json.dumps({"messages": messages}) + "\n"
            file.write(last)


def to_parquet(source: Path, out: Path) -> dict[str, float]:
    """A JSONL file to validated Parquet with its quarantine, as the stage does it."""
    from schemas.recipe import Source
    from tasks.prepare.ingest import ingest, write_rows
    from tasks.prepare.layout import find_layout
    from tasks.prepare.report import write_quarantine
    from tasks.prepare.sources import open_source
    from tasks.prepare.stage import whole

    start = time.perf_counter()
    place = Source(path=source.name)
    readable = open_source(place, source, out)
    layout = find_layout("causal-lm", "train", place, readable)
    split = whole("train", ingest(readable, layout, out / "scratch"))
    split.refuse_duplicates()
    write_rows(split.ingested, split.kept, out / "rows.parquet")
    refused = write_quarantine([split], out / "quarantine.parquet")
    kept = int(split.kept.sum())
    assert split.rows_in == kept + refused
    return {"seconds": time.perf_counter() - start, "rows": split.rows_in, "kept": kept}


def tokenizing(parquet: Path, count: int) -> dict[str, float]:
    """Tokens a second of the stage and of the tokenizer alone, on the same texts, in turn."""
    import polars as pl

    from schemas.recipe import Data, Source
    from tasks.prepare.reader import open_reader
    from tasks.prepare.tokenize import BATCH_ROWS, Batch, tokenize_split

    rows = pl.read_parquet(parquet, n_rows=count)
    source = Source(path="rows.jsonl")
    data = Data(train=source, test=source, max_length=512)
    reader = open_reader(QUICKSTART / "base", "causal-lm", data, {"chat"})
    text = reader.text_rules("chat")
    batches = [Batch(0, frame).render("chat", text, {}) for frame in rows.iter_slices(BATCH_ROWS)]
    tokens = sum(len(encoding) for batch in batches for encoding in alone(reader.backend, batch))

    def stage() -> None:
        tokenize_split(
            rows.iter_slices(BATCH_ROWS),
            len(rows),
            "chat",
            reader.backend,
            reader.rules("chat"),
            label="tokenising",
            text=reader.text_rules("chat"),
        )

    def baseline() -> None:
        for batch in batches:
            alone(reader.backend, batch)

    times: dict[str, list[float]] = {"stage": [], "baseline": []}
    for _ in range(REPEATS):
        times["baseline"].append(timed(baseline))
        times["stage"].append(timed(stage))
    rates = {name: tokens / statistics.median(values) for name, values in times.items()}
    return {**rates, "tokens": tokens, "rows": len(rows)}


def alone(backend: Any, texts: list[str]) -> list[Any]:
    encodings: list[Any] = backend.encode_batch(texts, add_special_tokens=False)
    return encodings


def timed(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measured(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """Run a function in a process of its own; adds `peak_mib`, of it and its children."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, function, arguments))
    process.start()
    peak = 0.0
    while not ours.poll(0.02):
        if not process.is_alive():
            raise RuntimeError(f"{function.__name__} died")
        peak = max(peak, sum(resident(psutil.Process(process.pid))))
    figures: dict[str, float] = ours.recv()
    process.join()
    return {**figures, "peak_mib": peak}


def resident(process: psutil.Process) -> Iterator[float]:
    """MiB of a process and of each of its children."""
    try:
        for one in [process, *process.children(recursive=True)]:
            try:
                yield one.memory_info().rss / 2**20
            except psutil.NoSuchProcess:
                continue
    except psutil.NoSuchProcess:
        return


def _send(pipe: Any, function: Callable[..., dict[str, float]], arguments: tuple[Any, ...]) -> None:
    pipe.send(function(*arguments))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rows", type=int)
    arguments = parser.parse_args()
    count = arguments.rows or (QUICK_ROWS if arguments.quick else ROWS)
    folder = Path(tempfile.mkdtemp(prefix="peftflow-prepare-"))
    try:
        source = folder / "rows.jsonl"
        make_rows(source, count)
        ingested = measured(to_parquet, source, folder)
        some = QUICK_TOKENIZE_ROWS if arguments.quick else TOKENIZE_ROWS
        tokenized = measured(tokenizing, folder / "rows.parquet", some)
        share = tokenized["stage"] / tokenized["baseline"]
        whole_run = count == ROWS
        seconds, peak = ingested["seconds"], ingested["peak_mib"]
        results = [
            Result("rows", count, "rows"),
            Result("input", round(source.stat().st_size / 1e6, 1), "MB"),
            at_most("JSONL to validated Parquet", seconds, "s", 10.0)
            if whole_run
            else Result("JSONL to validated Parquet", seconds, "s"),
            Result("rate", count / seconds, "rows/s"),
            at_most("peak memory, children included", peak, "MiB", 2e9 / 2**20),
            Result("tokenizer alone", tokenized["baseline"], "tokens/s"),
            Result("tokenising stage", tokenized["stage"], "tokens/s"),
            at_least("of the tokenizer's rate", share, "share", 0.9),
        ]
        write("prepare", results, quick=arguments.quick)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
