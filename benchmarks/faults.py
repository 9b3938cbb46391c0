"""Training killed N times with SIGKILL, through the real command line, against never killed.

    python benchmarks/faults.py [--kills 100] [--quick]

A small Llama learns with `python -m tasks.train`, a checkpoint after every step. Every second
kill comes at a random moment (start-up, step, save), the others in the middle of a save. The bar
is that the adapter of the killed run is byte for byte that of the run that was left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import Result, at_least, write

ROOT = Path(__file__).resolve().parents[1]
#: Kills of one run. A checkpoint holds the whole curve, so that saving after every step of a run
#: long enough for many kills would be most of the work.
KILLS_A_RUN = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="10 kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    kills = 10 if arguments.quick else arguments.kills
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_input(work)
        # A run gets through some 80 steps before each kill; more than that is safe.
        call = make_call(work, steps=120 * (1 + min(kills, KILLS_A_RUN)))
        rows = measure(work, call, kills, random.Random(arguments.seed))
    write("faults", rows, quick=arguments.quick)


def measure(work: Path, call: dict[str, Any], kills: int, draw: random.Random) -> list[Result]:
    started = time.monotonic()
    whole = start(work, call, "whole")
    assert whole.wait() == 0, "the run that is left alone failed"
    alone_s = time.monotonic() - started

    landed = {"start-up": 0, "step": 0, "save": 0}
    runs = same = 0
    while sum(landed.values()) < kills:
        store = f"killed-{runs}"
        for _ in range(min(KILLS_A_RUN, kills - sum(landed.values()))):
            landed[kill_once(work, call, store, draw, in_save=sum(landed.values()) % 2 == 1)] += 1
            print(f"kills {sum(landed.values())}/{kills} {landed}", file=sys.stderr, flush=True)
        last = start(work, call, store)
        assert last.wait() == 0, "the last attempt failed"
        runs += 1
        same += model_hash(work / "whole") == model_hash(work / store)
    return [
        at_least("kills survived", kills, "", kills),
        Result("of which in a save", landed["save"], ""),
        Result("of which in a step", landed["step"], ""),
        Result("of which before its first step was saved", landed["start-up"], ""),
        Result("killed runs", runs, ""),
        at_least("of which ended in the same adapter, byte for byte", same, "", runs),
        Result("the run left alone", round(alone_s, 1), "s"),
    ]


def kill_once(
    work: Path, call: dict[str, Any], store: str, draw: random.Random, *, in_save: bool
) -> str:
    """Start the run, or go on with it, and kill it. Where the kill fell: start-up, step or save."""
    before = newest(work / store)
    child = start(work, call, store)
    if in_save:
        wait_for_save(work / store, child)
    else:
        # Start-up takes 2 to 8 seconds: a good part of these kills fall into it.
        time.sleep(draw.uniform(0, 6))
    child.send_signal(signal.SIGKILL)
    if child.wait() != -signal.SIGKILL:
        sys.exit("the run ended before it was killed: raise its steps")
    if saving(work / store):
        return "save"
    return "step" if newest(work / store) != before else "start-up"


def start(work: Path, call: dict[str, Any], store: str) -> subprocess.Popen[bytes]:
    path = work / "call.json"
    path.write_text(json.dumps(call))
    return subprocess.Popen(
        [sys.executable, "-m", "tasks.train", str(path), "--store", str(work / store)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
    )


def wait_for_save(store: Path, child: subprocess.Popen[bytes]) -> None:
    while child.poll() is None and not saving(store):
        time.sleep(0.0005)


def saving(store: Path) -> bool:
    try:
        return any(store.glob("train/.work-*/scratch/.unfinished-*/*"))
    except FileNotFoundError:  # it was finished while it was looked at
        return False


def newest(store: Path) -> str:
    names = (path.name for path in store.glob("train/.work-*/scratch/checkpoint-*"))
    return max(names, default="")


def model_hash(store: Path) -> str:
    digest = hashlib.sha256()
    files = sorted(store.glob("train/[0-9a-f]*/model/*"))
    assert files
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def make_input(work: Path) -> None:
    """A Llama of 25 K random weights, and rows that count upwards from random starts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tasks.core.tokens import TokenRows

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(work / "base")
    draw = np.random.default_rng(0)
    lengths = draw.integers(8, 32, 200)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    counts = [draw.integers(3, 90) + np.arange(length) for length in lengths]
    (work / "prepared" / "tokens").mkdir(parents=True)
    TokenRows(
        input_ids=np.concatenate(counts).astype(np.int32),
        offsets=offsets,
        source_rows=np.arange(200) + 1,
        loss_mask=np.ones(offsets[-1], dtype=np.uint8),
        answer_start=np.zeros(200, dtype=np.int64),
    ).save(work / "prepared" / "tokens" / "train.safetensors")


def make_call(work: Path, steps: int) -> dict[str, Any]:
    train = {
        "max_steps": steps,
        "batch_tokens": 256,
        "learning_rate": 5e-3,
        "checkpoint_every_s": 0,
    }
    return {
        "stage": "train",
        "stage_version": 1,
        "format": "peft-adapter",
        "spec": {
            "task": "causal-lm",
            "candidate": {"method": "lora", "rank": 4},
            "train": train,
            "dtype": "float32",
        },
        "paths": {"prepared": str(work / "prepared"), "base": str(work / "base")},
    }


if __name__ == "__main__":
    main()
