"""Folding a LoRA adapter into a sharded model of over 1 GB, beside PEFT's own merge.

    python benchmarks/merge.py [--quick] [--directory DIR]

The model is random, in bf16, in five shards; the adapter has rank 16 on every linear layer. Each
measurement is a process of its own that first merges a tiny model, so that what is imported on
first use does not count; the contenders take turns. All times end when the files are synced. Both
read the base from the page cache. Peak memory is the resident set minus what the process held
before.

The disk's synced write rate is measured in the same turns: the same bytes written in 8 MiB
blocks by one thread, then fsync (what `dd conv=fsync` does). A second figure, without a bar, is
the rate around the page cache (O_DIRECT).
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARDS = 5
REPEATS = 5

Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a model of 100 MB, two turns")
    parser.add_argument("--directory", type=Path, default=ROOT, help="on the disk to measure")
    parser.add_argument("--child", choices=sorted(CHILDREN), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        contender = CHILDREN[arguments.child]
        contender(arguments.directory / "tiny")
        print(json.dumps(contender(arguments.directory)))
        return
    with tempfile.TemporaryDirectory(prefix=".bench-merge-", dir=arguments.directory) as name:
        measure(Path(name), arguments.quick)


def measure(work: Path, quick: bool) -> None:
    from common import Result, at_least, at_most, write

    make_model(work, width=512 if quick else 2048)
    make_model(work / "tiny", width=64)
    size = sum(path.stat().st_size for path in (work / "base").glob("*.safetensors"))
    found: dict[str, list[Figures]] = {name: [] for name in CHILDREN}
    for _ in range(2 if quick else REPEATS):
        for name, runs in found.items():
            runs.append(in_own_process(name, work))
            print(f"{name}: {runs[-1]}", file=sys.stderr)
    ours, peft = middle(found["ours"]), middle(found["peft"])
    rate = {name: size / middle(runs)["seconds"] / 1e6 for name, runs in found.items()}
    shard_mib = size / SHARDS / 2**20
    write(
        "merge",
        [
            Result("model, bf16", size / 1e9, f"GB in {shards(work)} shards"),
            Result("merge and sync, ours", ours["seconds"], "s"),
            Result("merge and sync, PEFT", peft["seconds"], "s"),
            Result("merge without the final sync, PEFT", peft["unsynced_seconds"], "s"),
            Result("PEFT's time to ours", peft["seconds"] / ours["seconds"], "x"),
            Result("peak memory, ours", ours["peak_mib"], "MiB"),
            Result("peak memory, PEFT", peft["peak_mib"], "MiB"),
            at_most("peak memory, ours, in shards", ours["peak_mib"] / shard_mib, "shards", 2),
            Result("rate, ours", rate["ours"], "MB/s"),
            Result("synced write rate of the disk", rate["write"], "MB/s"),
            at_least("ours to the synced write rate", rate["ours"] / rate["write"], "ratio", 0.7),
            Result("write rate around the page cache (O_DIRECT)", rate["direct"], "MB/s"),
            Result("ours to the O_DIRECT rate", rate["ours"] / rate["direct"], "ratio"),
        ],
        quick=quick,
        notes=" ".join(__doc__.split("\n\n", 2)[2].split()),
    )


def middle(runs: list[Figures]) -> Figures:
    """The median of each figure."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def in_own_process(name: str, work: Path) -> Figures:
    for out in (work / "out", work / "tiny" / "out"):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
    os.sync()
    command = [sys.executable, __file__, "--child", name, "--directory", str(work)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return dict(json.loads(output.splitlines()[-1]))


def shards(work: Path) -> int:
    return len(list((work / "base").glob("*.safetensors")))


def make_model(work: Path, width: int) -> None:
    """A random Llama in bf16 and an adapter on all its linear layers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=width,
            intermediate_size=width * 11 // 4,
            num_hidden_layers=10,
            num_attention_heads=16,
            num_key_value_heads=8,
            dtype="bfloat16",
        )
    )
    torch.set_default_dtype(torch.float32)
    size = sum(weight.nbytes for weight in model.parameters())
    model.save_pretrained(work / "base", max_shard_size=size // SHARDS + size // 50)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(model, config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.02)
    adapted.save_pretrained(work / "trained" / "model")


def ours(work: Path) -> Figures:
    from schemas.recipe import Finish
    from schemas.stages import MergeSpec
    from tasks.merge.stage import run

    paths = {"base": work / "base", "trained": work / "trained"}
    spec = MergeSpec(finish=Finish(merge=True))
    return timed(lambda: run(spec, paths, work / "out"), work / "out" / "model")


def peft(work: Path) -> Figures:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    target = work / "out" / "model"
    shard = max(path.stat().st_size for path in (work / "base").glob("*.safetensors"))

    def merge() -> None:
        base = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.bfloat16)
        model: Any = PeftModel.from_pretrained(base, work / "trained" / "model")
        model.merge_and_unload().save_pretrained(target, max_shard_size=shard)

    return timed(merge, target)


def plain_write(work: Path) -> Figures:
    """The same bytes, written in blocks and synced: the disk's rate through the page cache."""
    block = os.urandom(8 << 20)

    def copy() -> None:
        for path in sorted((work / "base").glob("*.safetensors")):
            with (work / "out" / path.name).open("wb", buffering=0) as file:
                for _ in range(path.stat().st_size // len(block)):
                    file.write(block)
                file.write(block[: path.stat().st_size % len(block)])

    return timed(copy, work / "out")


def direct_write(work: Path) -> Figures:
    """The same bytes around the page cache, in whole blocks."""
    block = mmap.mmap(-1, 8 << 20)
    block.write(os.urandom(8 << 20))

    def copy() -> None:
        for path in sorted((work / "base").glob("*.safetensors")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_DIRECT
            target = os.open(work / "out" / path.name, flags)
            for _ in range(-(-path.stat().st_size // len(block))):
                os.write(target, block)
            os.close(target)

    return timed(copy, work / "out")


def timed(work: Callable[[], object], directory: Path) -> Figures:
    """Seconds of `work` and of syncing what it wrote, and the peak above what was held before."""
    from tasks.core.runtime import peak_reset, peak_resident_mib, resident_mib

    floor = resident_mib()
    peak_reset()
    started = time.perf_counter()
    work()
    unsynced = time.perf_counter() - started
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - started
    peak = peak_resident_mib() - floor
    return {"seconds": seconds, "unsynced_seconds": unsynced, "peak_mib": peak}


CHILDREN: dict[str, Callable[[Path], Figures]] = {
    "ours": ours,
    "peft": peft,
    "write": plain_write,
    "direct": direct_write,
}


if __name__ == "__main__":
    main()
