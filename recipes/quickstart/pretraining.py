"""What the makers of both quickstart bases share: the loss, the loop, the files and the command."""

from __future__ import annotations

import argparse
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import tokenizers
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

WARMUP_SHARE = 0.05
FINAL_LEARNING_RATE_SHARE = 0.05
IGNORED = -100  # a label that transformers leaves out of the loss

#: What a model's forward is called with, `labels` among it.
Batch = dict[str, torch.Tensor]


def learning_rate_share(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to FINAL_LEARNING_RATE_SHARE of the peak."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    floor = FINAL_LEARNING_RATE_SHARE
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def batch_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy, nats a token."""
    with torch.autocast("cpu", torch.bfloat16):
        loss: torch.Tensor = model(**batch, use_cache=False).loss
    return loss


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: list[Batch]) -> float:
    """Mean over batches, nats a token."""
    return torch.stack([batch_loss(model, batch) for batch in batches]).mean().item()


def pretrain(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    heldout: dict[str, list[Batch]],
    steps: int,
) -> None:
    """Steps of the optimizer, whose own rates are the peak; told every hundredth."""
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_share(step, steps)
    )
    started, tokens = time.perf_counter(), 0
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
        loss = batch_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += batch["input_ids"].numel()
        if step % 100 == 0 or step in (1, steps):
            losses = {name: round(mean_loss(model, part), 3) for name, part in heldout.items()}
            speed = tokens / (time.perf_counter() - started)
            print(
                f"step {step}/{steps}  loss {loss.item():.3f}  held out {losses}  "
                f"{tokens:,} tokens, {speed:,.0f} a second",
                flush=True,
            )


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the whole base to `out`; other files there, such as its README, stay."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(partial.iterdir()):
        path.chmod(0o644)
        path.replace(out / path.name)
    partial.rmdir()
    print(f"{out}: {sum(path.stat().st_size for path in out.iterdir()):,} bytes")


def command(
    about: str,
    build: Callable[[Path, int, int, float], None],
    out: Path,
    steps: int,
    learning_rate: float,
) -> None:
    """Call `build` with out, steps, seed and learning rate, as the command line has them."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--threads", type=int, default=1, help="the bytes depend on it")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)}
    print(f"python {platform.python_version()}, {versions}")
    print(f"cpu {torch.backends.cpu.get_cpu_capability()}, {vars(args)}")
    build(args.out, args.steps, args.seed, args.learning_rate)
