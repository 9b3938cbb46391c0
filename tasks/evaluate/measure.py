"""All five criteria of one subject, in the order in which they do not disturb one another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from schemas.report import CriteriaReport, Latency
from schemas.stages import EvaluateSpec
from schemas.tasks import TASKS, is_labelled
from tasks.core import runtime
from tasks.core.progress import warn
from tasks.core.tokens import TokenRows
from tasks.evaluate import (
    accuracy,
    computation,
    latency,
    memory,
    probes,
    speculation,
    storage,
    swapping,
)
from tasks.evaluate.batches import run_on
from tasks.evaluate.pairs import first_rows
from tasks.evaluate.probes import Probe
from tasks.evaluate.prompted import asking
from tasks.evaluate.subject import Subject, read_subject
from tasks.methods.table import method_for

#: Why nothing says what a classifier has forgotten.
NO_RETENTION = {
    "text": "not measured, a classifier has no language head to measure it with",
    "image": "not measured, there is no general text to read and no head but the new one",
}


def measure(
    spec: EvaluateSpec, paths: dict[str, Path], started: dict[str, Probe]
) -> tuple[CriteriaReport, accuracy.Scores]:
    """The subject's report, and how each test row was answered.

    Args:
        started: the memory measurements, under way; they end before anything is timed.
    """
    subject = read_subject(spec, paths)
    with beside(started):
        model = subject.load().to(runtime.device())
        base = subject.base_beside(model)
        warn_if_base(model, base, paths["prepared"])
        prompted = asking(subject, model, spec.evaluate)
        scores = accuracy.score(subject, model, base, paths["prepared"], spec.evaluate, prompted)
        used = probes.read(started, subject.training_facts)
    test_rows = TokenRows.load(paths["prepared"] / "tokens" / "test.safetensors")
    more = prompted.more_tokens(test_rows)
    overhead = inference_overhead(subject, model, base, spec, test_rows, more)
    fast, heads = None, None
    if "heads" in paths:
        heads = paths["heads"] / "heads"
        fast = speculation.measure(subject, model, heads, test_rows, spec.evaluate)
    stored = storage.measure(subject, base, heads)
    swapped, swapped_how = swapping.measure(subject, model, base, test_rows)
    del base  # full fine-tuning is measured next, and wants the room
    train_rows = TokenRows.load(paths["prepared"] / "tokens" / "train.safetensors")
    words = how(spec, scores)
    report = CriteriaReport(
        subject=subject.kind,
        method=subject.method,
        storage=stored,
        memory=used,
        computation=computation.measure(subject, model, train_rows, spec.train),
        accuracy=scores.accuracy(),
        inference_overhead=overhead,
        swapping=swapped,
        speculation=fast,
        examples=accuracy.examples(scores.predictions, paths["prepared"]),
        device=device_name(),
        dtype=spec.dtype,
        how=(words if prompted.shots is None else shown(words, more))
        | {"swapping": swapped_how}
        | ({} if fast is None else {"speculation": speculation.how(spec.evaluate)}),
    )
    return report, scores


@contextmanager
def beside(started: dict[str, Probe]) -> Iterator[None]:
    """Leave the probes their cores: threads that outnumber the cores wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - probes.THREADS * len(started)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def warn_if_base(model: torch.nn.Module, base: torch.nn.Module, prepared: Path) -> None:
    """Say aloud where a subject gives the base's own logits: an adapter ignored, or not applied."""
    if model is base:
        return
    rows = TokenRows.load(prepared / "tokens" / "test.safetensors")
    few = first_rows(model, rows, 8)
    with torch.inference_mode():
        own, other = (run_on(each, few).logits for each in (model, base))
    if torch.equal(own, other):
        warn(
            f"on the first {len(own)} test rows the subject's logits are the base's, bit for bit: "
            "what it learned is not applied, or too little for this dtype"
        )


def inference_overhead(
    subject: Subject,
    model: torch.nn.Module,
    base: torch.nn.Module,
    spec: EvaluateSpec,
    rows: TokenRows,
    more: int,
) -> list[Latency]:
    """Latencies of the subject, and of its adapter merged in memory, beside the base's.

    more: tokens that the subject's prompts have before the base's.
    """
    models = {"base": base}
    if subject.kind != "base":
        models["subject"] = model
    if subject.is_adapter and method_for(subject.method, subject.task).merges:
        models["merged"] = subject.load_merged().to(runtime.device())
    merged = {"merged"} | ({"subject"} if subject.merged else set())
    return latency.measure(
        models, rows, spec.task, spec.evaluate, frozenset(merged), {"subject": more}
    )


def how(spec: EvaluateSpec, scores: accuracy.Scores) -> dict[str, str]:
    """Each criterion's measurement in words."""
    retained = (
        "retention: loss per token of general text, minus the base's on the same texts"
        if not is_labelled(spec.task)
        else f"retention: {NO_RETENTION[TASKS[spec.task].reads]}"
    )
    return {
        "storage": storage.HOW,
        "memory": memory.how(spec),
        "computation": computation.HOW,
        "accuracy": f"{scores.how}; 95 % intervals: percentile bootstrap over rows, "
        f"{spec.evaluate.bootstrap} resamples; {retained}",
        "inference_overhead": latency.how(spec.evaluate, spec.task, torch.get_num_threads()),
    }


def shown(how: dict[str, str], more: int) -> dict[str, str]:
    """The same words with what examples in front of a prompt change."""
    longer = (
        f"the subject's prompts are {more} tokens longer: what examples add to the median test row"
    )
    return how | {
        "storage": f"{how['storage']}; of examples all rows that they are chosen from",
        "memory": f"{how['memory']}; {longer}",
        "computation": f"{how['computation']}. Nothing is trained; a token costs what it costs "
        "the base, and examples in front of a prompt are further tokens",
        "accuracy": f"{how['accuracy']}. Answers with examples in front of each prompt, which "
        "are not scored; retention without them, so that it is the base's",
        "inference_overhead": f"{how['inference_overhead']}; {longer}",
    }


def device_name() -> str:
    """`cpu`, or the GPU's name."""
    device = runtime.device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
