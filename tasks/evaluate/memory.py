"""Criterion 2, memory: peak while generating, of a process that does nothing else.

`python -m tasks.evaluate.memory JSON` is that process, started by `probes.py`: one loads the
subject, another the base, and both do the same fixed work. On a GPU the figure is the
allocator's peak. On a CPU it is the kernel's peak resident set (VmHWM) minus the floor: what was
resident before the weights were loaded, with every module imported and a toy model loaded and run
once, so that code and thread pools are in the floor and weights, cache and activations are not.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, LlamaConfig, T5Config, ViTConfig

from schemas.stages import EvaluateSpec
from schemas.tasks import TASKS, is_encoder_decoder, is_labelled, reads_images
from tasks.core import quantised, runtime
from tasks.core.models import MODEL_CLASSES, load_config, load_trained, model_on_meta
from tasks.core.quantised import Quantisation
from tasks.core.tokens import TokenRows
from tasks.evaluate import workload
from tasks.evaluate.batches import by_length, classified, run_on
from tasks.evaluate.generate import generate_batch
from tasks.evaluate.prompted import asking
from tasks.evaluate.subject import read_subject

#: What a toy of each task is.
TOYS: dict[str, Any] = {task: BertConfig if is_labelled(task) else LlamaConfig for task in TASKS}
TOYS |= {task: ViTConfig for task in TASKS if reads_images(task)}
TOYS |= {task: T5Config for task in TASKS if is_encoder_decoder(task)}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
#: The same in T5's own words.
PAIR_SIZES = {"d_model": 64, "num_layers": 2, "num_heads": 2, "d_kv": 32, "d_ff": 128}


def how(spec: EvaluateSpec) -> str:
    """The measurement in words."""
    if not is_labelled(spec.task):
        longest = max(spec.evaluate.prompt_lengths)
        work = (
            f"{max(spec.evaluate.batch_sizes)} prompts of {longest} tokens, "
            f"{spec.evaluate.max_new_tokens} new tokens each, none stopping early"
        )
    else:
        work = "the largest batch of test rows"
    figure = (
        "CUDA allocator's peak"
        if torch.cuda.is_available()
        else "peak resident set minus what was resident before loading, modules imported and "
        "freed memory given back at once"
    )
    return (
        f"generating: {figure}, in a process of its own for subject and base each; work: {work}. "
        "Training: peak of the train stage's own process; of it, by the sizes of the tensors: all "
        "weights, gradients of those that learn, the optimiser's state, and what autograd keeps of "
        "the run's largest micro-batch; the rest is what is left of the peak, below 0 where these "
        "are large and not all there at once"
    )


def peak_of_call(spec: EvaluateSpec, paths: dict[str, Path]) -> float:
    """Load the subject in this process, do the fixed work, and return its peak, MiB."""
    subject = read_subject(spec, paths)
    rows = TokenRows.load(paths["prepared"] / "tokens" / "test.safetensors")
    quantisation = None if subject.model_dir is None else quantised.read(subject.model_dir)
    settle(subject.whole_dir, spec, rows, quantisation)
    floor = 0.0 if torch.cuda.is_available() else runtime.resident_mib()
    model = subject.load().to(runtime.device())
    # What is searched for examples stays in memory while it answers.
    prompted = asking(subject, model, spec.evaluate)
    more = prompted.more_tokens(rows)
    runtime.peak_reset()  # converting a file to another dtype is no part of generating
    work(model, spec, rows, more)
    return runtime.peak_mib() - floor


@torch.inference_mode()
def work(model: torch.nn.Module, spec: EvaluateSpec, rows: TokenRows, more: int = 0) -> None:
    """What every subject does: generate at the largest batch size, or classify one batch.

    more: tokens that its examples add to a prompt.
    """
    if not is_labelled(spec.task):
        new = spec.evaluate.max_new_tokens
        length = workload.prompt_length(model, max(spec.evaluate.prompt_lengths) + more, new)
        prompts = workload.prompts(rows, max(spec.evaluate.batch_sizes), length)
        generate_batch(model, prompts, frozenset(), new)
        return
    groups = by_length(rows.lengths)
    largest = max(groups, key=lambda group: len(group) * rows.lengths[group[0]])
    run_on(model, classified(rows, largest, model))


def settle(
    model_dir: Path, spec: EvaluateSpec, rows: TokenRows, quantisation: Quantisation | None
) -> None:
    """Let loading and running claim what they keep for good, without the subject's weights.

    Its modules are imported by building its class on no device; a toy of the same task with an
    adapter is loaded and run, which starts thread pools and fills the libraries' own caches
    (10 to 20 MiB).
    """
    from peft import LoraConfig, get_peft_model

    model_on_meta(load_config(model_dir), spec.task, model_dir)
    with tempfile.TemporaryDirectory() as directory:
        base, adapter = Path(directory, "base"), Path(directory, "adapter")
        model = toy(spec.task, rows)
        model.save_pretrained(base)
        get_peft_model(model, LoraConfig(target_modules="all-linear")).save_pretrained(adapter)
        if quantisation is not None:
            quantised.write(replace(quantisation, unquantised=()), adapter)
        work(load_trained(base, adapter, spec.task, None, spec.dtype), spec, one_token(rows))


def toy(task: str, rows: TokenRows) -> Any:
    """A model of the task that reads these rows and weighs next to nothing."""
    if rows.pixels is not None:
        _, channels, height, width = rows.pixels.shape
        reads: dict[str, Any] = {"num_channels": channels, "image_size": (height, width)}
        reads["patch_size"] = max(1, height // 4)
    else:
        reads = {"vocab_size": 64, "max_position_embeddings": max(1024, int(rows.lengths.max()))}
    if is_encoder_decoder(task):
        sizes: dict[str, Any] = {**PAIR_SIZES, "decoder_start_token_id": 0}
    else:
        sizes = {**SIZES, "intermediate_size": 128}
    config = TOYS[task](**sizes, **reads)
    return MODEL_CLASSES[task].from_config(config)


def one_token(rows: TokenRows) -> TokenRows:
    """The same rows of the same lengths in a vocabulary of one: ids that a toy knows."""
    return replace(rows, input_ids=np.zeros_like(rows.input_ids))


if __name__ == "__main__":
    call = json.loads(sys.argv[1])
    figure = peak_of_call(
        EvaluateSpec.model_validate(call["spec"]),
        {name: Path(path) for name, path in call["paths"].items()},
    )
    print(json.dumps({"peak_mib": figure}))
