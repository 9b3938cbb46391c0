"""`peftflow plan` against what training took: peak memory, every method, dtype and checkpointing.

    python benchmarks/plan.py [--quick] [--only llama] [--methods lora,ia3] [--jobs 2] [--work DIR]

A Llama of 56 M and a MiniLM-like BERT of 23 M parameters with random weights, random rows. Each
run is the train stage in a process of its own, four steps of 4,096 tokens; its `train_peak_mib` is
what the kernel counted. The plan is made from the base's config.json and the same rows' lengths.
Every run is written when it is done; runs of the same clean commit add up to one file.

With --work DIR what was measured is kept there: by the train stage's key, the code that this stage
imports, the libraries, and the number of threads. A change of `tasks/cost/` alone is judged again
in minutes, against the same measurements.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, Result, keep

from schemas.errors import StageError, UserError
from schemas.stages import Call, CostSpec, TrainSpec
from tasks.core.files import sha256_file, sha256_json, write_atomic
from tasks.core.provenance import git_state, libraries
from tasks.core.store import key_of
from tasks.core.waiting import waiting
from tasks.cost import stage as cost_stage
from tasks.train import heap

ROOT = Path(__file__).parents[1]
#: How far a prediction may be from the measured peak.
BAR = 0.10
TASKS = {"llama": "causal-lm", "bert": "sequence-classification"}
LONGEST = {"llama": 512, "bert": 128}
DTYPES = ("float32", "bfloat16")
CANDIDATES: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "dora": {"method": "lora", "rank": 8, "dora": True},
    "qlora": {"method": "qlora"},
    "adalora": {"method": "adalora"},
    "ia3": {"method": "ia3"},
    "bottleneck": {"method": "bottleneck"},
    "bitfit": {"method": "bitfit"},
    "layer_norm": {"method": "layer_norm"},
    "last_layers": {"method": "last_layers"},
    "prompt_tuning": {"method": "prompt_tuning"},
    "p_tuning": {"method": "p_tuning"},
    "prefix_tuning": {"method": "prefix_tuning"},
}
#: Whose code decides what a training holds, beside its version.
TRAINED_BY = ("tasks/train", "tasks/core", "tasks/methods")
#: Runs by which the rest in `tasks/cost/memory.py` was set; all others only show how well it holds.
SET_BY = ("lora", "bitfit")
PLANNING = threading.Lock()


@dataclass(frozen=True)
class Setting:
    """One run."""

    base: str
    name: str
    checkpointing: bool
    dtype: str

    def __str__(self) -> str:
        words = [self.base, self.name, self.dtype, "checkpointing" * self.checkpointing]
        return " ".join(filter(None, words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="LoRA alone, without checkpointing")
    parser.add_argument("--only", choices=list(TASKS))
    parser.add_argument("--methods", help="e.g. lora,ia3; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--work", type=Path, help="where measured runs are kept and found")
    arguments = parser.parse_args()
    methods = arguments.methods.split(",") if arguments.methods else list(CANDIDATES)
    settings = [
        Setting(*given)
        for given in product(
            [arguments.only] if arguments.only else TASKS,
            ["lora"] if arguments.quick else methods,
            (False,) if arguments.quick else (False, True),
            DTYPES,
        )
    ]
    found = {} if arguments.quick else before()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        work = Path(folder)
        for name in {setting.base for setting in settings}:
            make(name, work / name)
        runs = {
            pool.submit(compared, setting, work / setting.base, arguments.work): setting
            for setting in settings
        }
        for run in as_completed(runs):
            found[str(runs[run])] = run.result()
            save(found, arguments.quick)
    table(found)


def save(found: dict[str, list[Result]], quick: bool) -> None:
    """All runs so far, in the order of the candidates, and how many are near enough."""
    order = [str(Setting(*given)) for given in product(TASKS, CANDIDATES, (False, True), DTYPES)]
    rows = [row for title in order for row in found.get(title, [])]
    for what, named in (("set the rest", True), ("all others", False)):
        judged = [r for r in rows if r.met is not None and (r.name.split()[1] in SET_BY) == named]
        inside = sum(bool(row.met) for row in judged)
        rows.append(Result(f"within 10 %: {what}", f"{inside} of {len(judged)}", "runs"))
    notes = "error: predicted over measured, less one. LoRA and BitFit set the rest."
    keep("plan", rows, quick=quick, notes=notes)


def before() -> dict[str, list[Result]]:
    """The runs that are in the results already, where this very commit made them."""
    path = RESULTS / "plan.json"
    commit, dirty = git_state(ignore="benchmarks/results")
    record = json.loads(path.read_text()) if path.is_file() else {"provenance": {"commit": ""}}
    if dirty or record["provenance"]["commit"] != commit:
        return {}
    found: dict[str, list[Result]] = {}
    for row in record["rows"]:
        title = row["name"].partition(":")[0]
        if not title.startswith("within"):
            found.setdefault(title, []).append(Result(**row))
    return found


def table(found: dict[str, list[Result]]) -> None:
    """The table of docs/plan.md: predicted / measured (error); in bold what is not near enough."""
    columns = [(dtype, again) for dtype in DTYPES for again in (False, True)]
    heads = [dtype + ", checkpointing" * again for dtype, again in columns]
    print("\n".join(["| | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(columns)]))
    for base, name in product(TASKS, CANDIDATES):
        cells = []
        for dtype, again in columns:
            rows = found.get(str(Setting(base, name, again, dtype)), [])
            cell = "–"
            if len(rows) == 3:
                predicted, measured, error = rows
                cell = f"{predicted.value:,} / {measured.value:,} ({float(error.value):+.0%})"
                cell = cell if error.met else f"**{cell}**"
            cells.append(cell)
        print(f"| {base} {name} | " + " | ".join(cells) + " |")


def compared(setting: Setting, work: Path, kept: Path | None) -> list[Result]:
    """One candidate: predicted, measured, error; or aloud why it was not run. kept: of --work."""
    train = {
        "max_steps": 4,
        "batch_tokens": 4096,
        "learning_rate": 1e-4,
        "gradient_checkpointing": setting.checkpointing,
    }
    common = {"task": TASKS[setting.base], "train": train, "dtype": setting.dtype}
    cost = CostSpec.model_validate(
        {
            **common,
            "shape": None,
            "candidates": [CANDIDATES[setting.name]],
            "evaluate": {},
            "max_length": LONGEST[setting.base],
        }
    )
    run = TrainSpec.model_validate({**common, "candidate": CANDIDATES[setting.name]})
    try:
        planned = plan(cost, work)
        facts = measure(run, work, kept)
    except (UserError, StageError) as error:
        why = str(error).splitlines()[0][:160]
        print(f"not run: {setting}: {why}", file=sys.stderr, flush=True)
        return [Result(str(setting), why, "not run")]
    assert planned["trainable_parameters"] == facts["trainable_parameters"]
    predicted, measured = planned["training_mib"]["total"], facts["train_peak_mib"]
    error = predicted / measured - 1
    tensors = predicted - planned["training_mib"]["rest"]
    print(
        f"{setting}: {predicted:.0f} {measured:.0f} {error:+.1%}, beside tensors "
        f"{measured - tensors:.0f}",
        file=sys.stderr,
        flush=True,
    )
    return [
        Result(f"{setting}: predicted", round(predicted), "MiB"),
        Result(f"{setting}: measured", round(measured), "MiB"),
        Result(f"{setting}: error", round(error, 4), "", "within 0.1", abs(error) <= BAR),
    ]


def plan(spec: CostSpec, work: Path) -> dict[str, Any]:
    """What the cost stage says of the one candidate. One at a time: it is run in this process."""
    with PLANNING, tempfile.TemporaryDirectory() as folder:
        found = cost_stage.run(spec, paths(work), Path(folder))
    [planned] = found["candidates"].values()
    return dict(planned)


def measure(spec: TrainSpec, work: Path, kept: Path | None) -> dict[str, Any]:
    """The facts of the train stage in a process of its own, or those that were kept of it.

    Raises:
        StageError: it failed, or refused.
    """
    call = Call(
        stage=spec.STAGE,
        stage_version=spec.VERSION,
        format="report",
        spec=spec.model_dump(mode="json"),
        paths={name: str(path) for name, path in paths(work).items()},
        outside={**contents(work), **decided_by()},
    )
    record = kept / f"{key_of(call)}.json" if kept else None
    if record is not None and record.is_file():
        found: dict[str, Any] = json.loads(record.read_text())
        return found
    facts = trained(call)
    if record is not None:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(record, json.dumps(facts, indent=1))
    return facts


def contents(work: Path) -> dict[str, str]:
    """Of the base and of the prepared rows: a hash of each file, by its name."""
    files = sorted(path for path in work.rglob("*") if path.is_file())
    return {path.relative_to(work).as_posix(): sha256_file(path) for path in files}


@lru_cache
def decided_by() -> dict[str, str]:
    """What else decides how much memory a training takes."""
    files = sorted(path for room in TRAINED_BY for path in (ROOT / room).rglob("*.py"))
    code = {path.relative_to(ROOT).as_posix(): sha256_file(path) for path in files}
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return {"code": sha256_json(code), "libraries": sha256_json(libraries()), "threads": threads}


def trained(call: Call) -> dict[str, Any]:
    """The facts of a training in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "call.json")
        path.write_text(call.model_dump_json())
        done = subprocess.run(
            [sys.executable, "-P", "-m", "tasks.train", str(path), "--store", folder],
            env={
                **waiting(os.environ),
                **heap.environment(os.environ),
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "HF_HUB_OFFLINE": "1",
                "PEFTFLOW_EVENTS": "1",
            },
            capture_output=True,
            text=True,
        )
        if not done.stdout.strip():
            raise StageError(done.stderr[-200:])
        last = json.loads(done.stdout.splitlines()[-1])
        if done.returncode != 0:
            raise StageError(last["message"])
        manifest = json.loads(Path(last["message"], "manifest.json").read_text())
        facts: dict[str, Any] = manifest["facts"]
        return facts


def paths(work: Path) -> dict[str, Path]:
    return {"base": work / "base", "prepared": work / "prepared"}


def make(name: str, work: Path) -> None:
    """A base with random weights and rows of random tokens."""
    import torch
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    from tasks.core.tokens import TokenRows

    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    if name == "llama":
        config = LlamaConfig(
            vocab_size=32000,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(work / "base")
    else:
        small = BertConfig(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
        )
        BertModel(small).save_pretrained(work / "base")
    lengths = draw.integers(64, 512, 200) if name == "llama" else draw.integers(8, 128, 1200)
    ends = np.cumsum([0, *lengths])
    answer = (0.41 * lengths).astype(np.int64)
    place = np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)
    (work / "prepared" / "tokens").mkdir(parents=True)
    TokenRows(
        input_ids=draw.integers(5, 30000, ends[-1]).astype(np.int32),
        offsets=ends,
        source_rows=np.arange(len(lengths)) + 1,
        loss_mask=(place >= np.repeat(answer, lengths)).astype(np.uint8),
        answer_start=answer,
        labels=draw.integers(0, 77, len(lengths)),
    ).save(work / "prepared" / "tokens" / "train.safetensors")
    if name == "bert":
        labels = [f"label {number}" for number in range(77)]
        (work / "prepared" / "labels.json").write_text(json.dumps(labels))


if __name__ == "__main__":
    main()
