"""`peftflow plan` against what training took: peak memory, every method, dtype and checkpointing.

    python benchmarks/plan.py [--quick] [--only llama] [--methods lora,ia3]

A Llama of 56 M and a MiniLM-like BERT of 23 M parameters with random weights, random rows. Each
run is the train stage in a process of its own, four steps of 4,096 tokens; its `train_peak_mib` is
what the kernel counted. The plan is made from the base's config.json and the same rows' lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import Result, write
from pydantic import TypeAdapter

from schemas.stages import Call, CostSpec, TrainSpec
from schemas.together import Candidate
from tasks.core.waiting import waiting

ROOT = Path(__file__).parents[1]
#: How far a prediction may be from the measured peak.
BAR = 0.10
TASKS = {"llama": "causal-lm", "bert": "sequence-classification"}
LONGEST = {"llama": 512, "bert": 128}
CANDIDATES: list[dict[str, Any]] = [
    {"method": "full"},
    {"method": "lora"},
    {"method": "ia3"},
    {"method": "layer_norm"},
    {"method": "bottleneck"},
    {"method": "bitfit"},
    {"method": "lora", "rank": 8, "dora": True},
    {"method": "qlora"},
]
CANDIDATE: TypeAdapter[Candidate] = TypeAdapter(Candidate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="LoRA alone, without checkpointing")
    parser.add_argument("--only", choices=list(TASKS))
    parser.add_argument("--methods", help="e.g. lora,ia3; default: all")
    arguments = parser.parse_args()
    chosen = CANDIDATES[1:2] if arguments.quick else CANDIDATES
    if arguments.methods:
        wanted = arguments.methods.split(",")
        chosen = [given for given in chosen if kind(given) in wanted]
    rows: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in [arguments.only] if arguments.only else list(TASKS):
            work = Path(folder, name)
            make(name, work)
            for given in chosen:
                for checkpointing in (False,) if arguments.quick else (False, True):
                    for dtype in ("float32", "bfloat16"):
                        rows += compared(name, work, given, dtype, checkpointing)
    judged = [row for row in rows if row.met is not None]
    inside = sum(bool(row.met) for row in judged)
    rows.append(Result("within 10 %", f"{inside} of {len(judged)}", "runs"))
    write("plan", rows, quick=arguments.quick, notes="error: predicted over measured, less one")


def kind(given: dict[str, Any]) -> str:
    return "dora" if given.get("dora") else str(given["method"])


def compared(
    name: str, work: Path, given: dict[str, Any], dtype: str, checkpointing: bool
) -> list[Result]:
    """One candidate: predicted, measured, error; or aloud why it was not run."""
    title = f"{name} {kind(given)} {dtype}" + (" checkpointing" if checkpointing else "")
    try:
        CANDIDATE.validate_python(given)
    except ValueError:
        print(f"skipped: {title}: there is no such method", file=sys.stderr, flush=True)
        return []
    train = {
        "max_steps": 4,
        "batch_tokens": 4096,
        "learning_rate": 1e-4,
        "gradient_checkpointing": checkpointing,
    }
    common = {"task": TASKS[name], "train": train, "dtype": dtype}
    cost = CostSpec.model_validate(
        {
            **common,
            "shape": None,
            "candidates": [given],
            "evaluate": {},
            "max_length": LONGEST[name],
        }
    )
    run = TrainSpec.model_validate({**common, "candidate": given})
    facts, failure = [], ""
    for spec in (cost, run):
        made, failure = stage(spec, work)
        if made is None:
            print(f"not run: {title}: {failure}", file=sys.stderr, flush=True)
            return [Result(title, failure, "not run")]
        facts.append(made)
    [planned] = facts[0]["candidates"].values()
    assert planned["trainable_parameters"] == facts[1]["trainable_parameters"]
    predicted, measured = planned["training_mib"]["total"], facts[1]["train_peak_mib"]
    error = predicted / measured - 1
    print(f"{title}: {predicted:.0f} {measured:.0f} {error:+.1%}", file=sys.stderr, flush=True)
    return [
        Result(f"{title}: predicted", round(predicted), "MiB"),
        Result(f"{title}: measured", round(measured), "MiB"),
        Result(f"{title}: error", round(error, 4), "", "within 0.1", abs(error) <= BAR),
    ]


def stage(spec: CostSpec | TrainSpec, work: Path) -> tuple[dict[str, Any] | None, str]:
    """The facts of one stage in a process of its own, or what it said when it failed."""
    call = Call(
        stage=spec.STAGE,
        stage_version=spec.VERSION,
        format="report",
        spec=spec.model_dump(mode="json"),
        paths={"base": str(work / "base"), "prepared": str(work / "prepared")},
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "call.json")
        path.write_text(call.model_dump_json())
        done = subprocess.run(
            [sys.executable, "-P", "-m", f"tasks.{spec.STAGE}", str(path), "--store", folder],
            env={
                **waiting(os.environ),
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "HF_HUB_OFFLINE": "1",
                "PEFTFLOW_EVENTS": "1",
            },
            capture_output=True,
            text=True,
        )
        if not done.stdout.strip():
            return None, done.stderr[-200:]
        last = json.loads(done.stdout.splitlines()[-1])
        if done.returncode != 0:
            return None, last["message"].splitlines()[0][:160]
        manifest = json.loads(Path(last["message"], "manifest.json").read_text())
        facts: dict[str, Any] = manifest["facts"]
        return facts, ""


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
