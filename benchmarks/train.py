"""Our training loop against TRL's SFTTrainer: tokens per second, peak memory, the same losses.

    python benchmarks/train.py [--quick] [--rows gsm8k_train.jsonl] [--tokenizer DIR]

One 39 M-parameter Llama with random weights, one LoRA (r = 16, every linear layer, the same
first weights), the same rows in the same order, 8 a step. Each side runs in a process of its
own, repeats are interleaved, and figures are medians. TRL is run at several settings and the
fastest counts. Both sides are timed from the end of the third step on: the first ones load and
compile kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import Result, at_least, at_most, write

from tasks.core.waiting import waiting
from tasks.train import heap

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
ROWS_A_STEP = 8
WARM_STEPS = 3
LEARNING_RATE = 1e-3
MAX_LENGTH = 512
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

#: SFTTrainer's settings that were tried. Its `nll` loss is computed in chunks by itself; Liger
#: kernels need Triton, which a CPU has not; padding-free batches need FlashAttention.
TRL_SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {"base": "float32"},
    "bf16": {"base": "float32", "bf16": True},
    "bf16 base": {"base": "bfloat16", "bf16": True},
    "bf16 base, packing": {"base": "bfloat16", "bf16": True, "packing": True},
}
#: The setting whose losses are compared: rows and order are ours, weights are as ours.
TWIN = "bf16 base"

#: Largest difference between the two loss curves, nats per answer token. Both round products
#: and activations to bfloat16 (8 bits, 0.4 %) at different places, independently at each of
#: some 1,500 answer tokens, so that a step's mean differs far less than a token; what remains
#: is fed back by the steps after it, while the loss moves by 1.
LOSS_TOLERANCE = 0.005


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two settings, one repeat, 8 steps")
    parser.add_argument("--rows", type=Path, default=SHARED / "data" / "gsm8k_train.jsonl")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "models" / "stories260K")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side = ours if arguments.side == "ours" else trl
        print(json.dumps(side(arguments.work, arguments.steps, arguments.side)))
        return
    steps, repeats = (8, 1) if arguments.quick else (arguments.steps, arguments.repeats)
    settings = ["bf16", TWIN] if arguments.quick else list(TRL_SETTINGS)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        parameters = make_model(work / "base")
        tokens, source = make_rows(work, arguments.rows, arguments.tokenizer, steps)
        runs: dict[str, list[dict[str, Any]]] = {}
        for repeat in range(repeats):
            for side in ["ours", *settings]:
                print(f"repeat {repeat + 1}/{repeats}: {side}", file=sys.stderr, flush=True)
                runs.setdefault(side, []).append(spawn(side, work, steps))
    write("train", results(runs, parameters, tokens), quick=arguments.quick, notes=source)


def results(runs: dict[str, list[dict[str, Any]]], parameters: int, tokens: int) -> list[Result]:
    def median(side: str, figure: str) -> float:
        return statistics.median(run[figure] for run in runs[side])

    theirs = [side for side in runs if side != "ours"]
    best = max(theirs, key=lambda side: median(side, "tokens_per_s"))
    gaps = [
        abs(a - b) for a, b in zip(runs["ours"][0]["losses"], runs[TWIN][0]["losses"], strict=True)
    ]
    rows = [
        Result("parameters of the model", round(parameters / 1e6, 1), "M"),
        Result("tokens a step", tokens, "tokens, padding excluded"),
        Result("threads", runs["ours"][0]["threads"], ""),
    ]
    for side in runs:
        name = side if side == "ours" else f"TRL {side}"
        rows.append(Result(f"{name}: speed", round(median(side, "tokens_per_s")), "tokens/s"))
        rows.append(Result(f"{name}: peak", round(median(side, "peak_mib")), "MiB above the floor"))
    speed = median("ours", "tokens_per_s") / median(best, "tokens_per_s")
    memory = median("ours", "peak_mib") / median(best, "peak_mib")
    rows += [
        Result("TRL's fastest setting", best, ""),
        at_least("speed, ours / TRL's best", speed, "x", 5.0),
        at_most("peak memory, ours / the same", memory, "x", 0.4),
        Result("first loss, ours", round(runs["ours"][0]["losses"][0], 4), "nats/answer token"),
        Result("last loss, ours", round(runs["ours"][0]["losses"][-1], 4), "nats/answer token"),
        at_most("largest gap of the loss curves", max(gaps), "nats/answer token", LOSS_TOLERANCE),
    ]
    return rows


def spawn(side: str, work: Path, steps: int) -> dict[str, Any]:
    """One side's run in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--work", str(work), "--steps", str(steps)]
    # Threads wait as they do in every stage, on either side.
    environment = {
        **waiting(os.environ),
        **heap.environment(os.environ),
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def make_model(path: Path) -> int:
    """A Llama with random weights, saved in bfloat16. Returns its parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1152,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path)
    return sum(weight.numel() for weight in model.parameters())


def make_rows(work: Path, path: Path, tokenizer: Path, steps: int) -> tuple[float, str]:
    """Write prepared/tokens/train.safetensors. Returns tokens a step, and what the rows are."""
    from tasks.core.tokens import TokenRows

    count = steps * ROWS_A_STEP
    if path.exists() and tokenizer.exists():
        prompts, answers = tokenised(path, tokenizer, count)
        source = f"rows: {path.name}, the first {count} of at most {MAX_LENGTH} tokens"
    else:
        missing = path if not path.exists() else tokenizer
        prompts, answers = synthetic(count)
        source = f"rows: random tokens with GSM8K's lengths, as {missing.name} is not here"
        print(f"{missing} is missing: {source}", file=sys.stderr)
    rows = [np.concatenate([p, a]) for p, a in zip(prompts, answers, strict=True)]
    mask = [np.arange(len(row)) >= len(p) for p, row in zip(prompts, rows, strict=True)]
    folder = work / "prepared" / "tokens"
    folder.mkdir(parents=True)
    tokens = TokenRows(
        input_ids=np.concatenate(rows).astype(np.int32),
        offsets=np.cumsum([0, *(len(row) for row in rows)]),
        source_rows=np.arange(count) + 1,
        loss_mask=np.concatenate(mask).astype(np.uint8),
        answer_start=np.array([len(p) for p in prompts]),
    )
    tokens.save(folder / "train.safetensors")
    (work / "tokenizer").symlink_to(tokenizer.resolve())
    return len(tokens.input_ids) / steps, source


def tokenised(path: Path, tokenizer: Path, count: int) -> tuple[list[Any], list[Any]]:
    from tasks.core.models import load_tokenizer

    encode = load_tokenizer(tokenizer)
    prompts, answers = [], []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        prompt = [1, *encode(row["question"] + "\n", add_special_tokens=False).input_ids]
        answer = [*encode(row["answer"], add_special_tokens=False).input_ids, 2]
        if len(prompt) + len(answer) <= MAX_LENGTH:
            prompts.append(np.array(prompt))
            answers.append(np.array(answer))
        if len(prompts) == count:
            break
    return prompts, answers


def synthetic(count: int) -> tuple[list[Any], list[Any]]:
    """Lengths as GSM8K's in the shared tokenizer: mean 313, of which 59 % is the answer."""
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.normal(313, 90, count), 100, MAX_LENGTH).astype(int)
    prompts = [draw.integers(3, 512, int(0.41 * length)) for length in lengths]
    answers = [draw.integers(3, 512, length - int(0.41 * length)) for length in lengths]
    return prompts, answers


@dataclass(frozen=True)
class InOrder:
    """A plan of 8 rows a step in the order of the file, as TRL's sampler is told to take them."""

    rows: int

    @property
    def steps_per_epoch(self) -> int:
        return self.rows // ROWS_A_STEP

    def epoch(self, epoch: int) -> list[Any]:
        return np.split(np.arange(self.rows), self.steps_per_epoch)


def ours(work: Path, steps: int, side: str) -> dict[str, Any]:
    import torch

    from schemas.stages import TrainSpec
    from tasks.core import runtime
    from tasks.core.models import load_base
    from tasks.methods.method import trained
    from tasks.methods.table import method_for
    from tasks.train import placement
    from tasks.train.loop import make_optimizer, train
    from tasks.train.stage import prepare_job, read_rows

    spec = TrainSpec.model_validate(
        {
            "task": "causal-lm",
            "candidate": {"method": "lora", "rank": LORA["r"], "alpha": LORA["lora_alpha"]},
            "train": {
                "max_steps": steps,
                "learning_rate": LEARNING_RATE,
                "schedule": "constant",
                "warmup_ratio": 0.0,
                "batch_tokens": ROWS_A_STEP * MAX_LENGTH,
            },
            "dtype": "bfloat16",
        }
    )
    rows, _ = read_rows(spec, work / "prepared")
    threads = torch.get_num_threads()
    placement.seed(0)
    heap.arrange()
    runtime.peak_reset()
    floor = runtime.resident_mib()
    base = load_base(work / "base", spec.task, None, "bfloat16")
    torch.manual_seed(0)
    model = method_for("lora", spec.task).build(base, spec.candidate, spec.task)
    job = prepare_job(spec, rows, None, model, 0)
    job = replace(job, plan=InOrder(len(rows)))
    weights = trained(model)
    state = train(model, weights, make_optimizer(weights, spec.train), job)
    timed = state.curve[WARM_STEPS:]
    return {
        "tokens_per_s": (timed[-1].tokens - state.curve[WARM_STEPS - 1].tokens)
        / sum(point.step_time_s for point in timed),
        "peak_mib": runtime.peak_mib() - floor,
        "losses": [point.loss for point in state.curve],
        "threads": threads,
    }


def trl(work: Path, steps: int, side: str) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from tasks.core import runtime
    from tasks.core.tokens import TokenRows

    setting = dict(TRL_SETTINGS[side])
    base = setting.pop("base")
    rows = TokenRows.load(work / "prepared" / "tokens" / "train.safetensors")
    dataset = Dataset.from_list(
        [
            {
                "input_ids": rows.row(index).tolist(),
                "labels": np.where(rows.mask(index), rows.row(index), -100).tolist(),
            }
            for index in range(len(rows))
        ]
    )
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")

    class Watch(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ends: list[float] = []
            self.losses: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                self.losses.append(logs["loss"])

    class InOrderTrainer(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    runtime.peak_reset()
    floor = runtime.resident_mib()
    model = AutoModelForCausalLM.from_pretrained(work / "base", dtype=getattr(torch, base))
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(**LORA))
    watch = Watch()
    config = SFTConfig(
        output_dir=str(work / "trl"),
        per_device_train_batch_size=ROWS_A_STEP,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=False,
        max_length=MAX_LENGTH,
        shuffle_dataset=False,
        dataset_kwargs={"skip_prepare_dataset": "packing" not in setting},
        **setting,
    )
    trainer = InOrderTrainer(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trained_on = trainer.train_dataset
    trainer.train()
    lengths = [len(row) for row in trained_on["input_ids"]]
    ran = len(watch.ends)
    first, last = WARM_STEPS * ROWS_A_STEP, ran * ROWS_A_STEP
    repeated = lengths * (1 + last // len(lengths))
    return {
        "tokens_per_s": sum(repeated[first:last]) / (watch.ends[-1] - watch.ends[WARM_STEPS - 1]),
        "peak_mib": runtime.peak_mib() - floor,
        "losses": watch.losses,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
