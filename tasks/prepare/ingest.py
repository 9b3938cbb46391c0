"""From a file to typed rows: every line becomes a row or a refused line, in file order."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tasks.core.pictures import encoded
from tasks.core.progress import bar
from tasks.prepare.blocks import Block, Layout, Refused, plan_json_lines, sort_json_lines
from tasks.prepare.csv_rows import sort_csv
from tasks.prepare.sources import Readable

#: Blocks from which on worker processes pay for their start.
BLOCKS_FOR_WORKERS = 4

#: Worker processes at most: each takes about 200 MiB.
MAX_WORKERS = 8


#: Images that are held at a time.
IMAGE_ROWS = 64


@dataclass(frozen=True)
class Ingested:
    """The lines of one source, sorted.

    lines, offsets, lengths, digests: of the N typed rows, in file order; lines count from 1.
    tables: Arrow files with the rows, end to end; counts: the rows of each.
    """

    source: Readable
    layout: Layout
    lines: NDArray[np.int64]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    digests: NDArray[np.uint64]
    refused: list[Refused]
    tables: list[Path]

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def rows_in(self) -> int:
        """Lines of the source, but for a CSV's header."""
        return len(self.lines) + len(self.refused)


def ingest(source: Readable, layout: Layout, scratch: Path) -> Ingested:
    """Read a source and sort its lines; large JSONL files in worker processes."""
    scratch.mkdir(parents=True, exist_ok=True)
    blocks, refused, base = [], [], 0
    size = source.path.stat().st_size
    with bar(f"reading {source.name}", size, "bytes") as progress:
        for block in blocks_of(source, layout, scratch):
            blocks.append((base, block))
            refused += [
                Refused(line.line + base, line.offset, line.length, line.reasons)
                for line in block.refused
            ]
            base += block.n_lines
            progress.advance(min(end_of(block), size) - progress.done)
    return Ingested(
        source,
        layout,
        lines=np.concatenate([block.lines + base for base, block in blocks]),
        offsets=np.concatenate([block.offsets for _, block in blocks]),
        lengths=np.concatenate([block.lengths for _, block in blocks]),
        digests=np.concatenate([block.digests for _, block in blocks]),
        refused=refused,
        tables=[block.table for _, block in blocks],
    )


def end_of(block: Block) -> int:
    """The last byte of the source that a block has read, with its newline."""
    kept = int(block.offsets[-1] + block.lengths[-1]) if len(block.offsets) else 0
    refused = block.refused[-1].offset + block.refused[-1].length if block.refused else 0
    return max(kept, refused) + 1


def blocks_of(source: Readable, layout: Layout, scratch: Path) -> Iterator[Block]:
    if source.format == "csv":
        yield from sort_csv(source.path, layout, scratch)
        return
    jobs = plan_json_lines(source.path)
    tables = [scratch / f"{number}.arrow" for number in range(len(jobs))]
    layouts = [layout] * len(jobs)
    if len(jobs) < BLOCKS_FOR_WORKERS:
        yield from map(sort_json_lines, jobs, layouts, tables)
        return
    # Spawned, not forked: polars and pyarrow hold threads, and a lock held at a fork stays so.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(worker_count(len(jobs)), context, initializer=be_a_worker) as pool:
        yield from pool.map(sort_json_lines, jobs, layouts, tables)


def worker_count(jobs: int) -> int:
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS, jobs)


def be_a_worker() -> None:
    """One thread a worker: there is one worker a core."""
    pa.set_cpu_count(1)


def tables_of(
    ingested: Ingested, keep: NDArray[np.bool_], columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """The rows of a mask, table by table, `row` being the line in the source.

    columns: those to have beside `row`; None: all.
    """
    start = 0
    for file in ingested.tables:
        with pa.memory_map(str(file)) as mapped:
            table = pa.ipc.open_file(mapped).read_all()
            stop = start + len(table)
            chosen = keep[start:stop]
            table = table.set_column(0, "row", pa.array(ingested.lines[start:stop]))
            table = table if columns is None else table.select(["row", *columns])
            yield table if chosen.all() else table.filter(pa.array(chosen))
            start = stop


def frames_of(
    ingested: Ingested, keep: NDArray[np.bool_], rows: int, columns: list[str] | None = None
) -> Iterator[pl.DataFrame]:
    """The rows of a mask as frames of at most `rows` rows."""
    for table in tables_of(ingested, keep, columns):
        frame = pl.from_arrow(table)
        assert isinstance(frame, pl.DataFrame)
        yield from frame.iter_slices(rows)


def whole_tables(ingested: Ingested, keep: NDArray[np.bool_]) -> Iterator[pa.Table]:
    """The rows of a mask with nothing of them elsewhere."""
    if ingested.layout.kind != "image":
        yield from tables_of(ingested, keep)
        return
    root = ingested.layout.root
    for table in tables_of(ingested, keep):
        for start in range(0, max(1, len(table)), IMAGE_ROWS):
            part = table.slice(start, IMAGE_ROWS)
            read = [encoded(reference, root) for reference in part["image"].to_pylist()]
            yield part.set_column(1, "image", pa.array(read, pa.large_binary()))


def write_rows(ingested: Ingested, keep: NDArray[np.bool_], path: Path) -> None:
    """Write the rows of a mask to Parquet, images as the bytes that they were read from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer: pq.ParquetWriter | None = None
    try:
        for table in whole_tables(ingested, keep):
            if writer is None:
                # Texts rarely repeat: a dictionary would cost time and save nothing.
                writer = pq.ParquetWriter(
                    path, table.schema, compression="lz4", use_dictionary=False
                )
            if len(table):
                writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()
