"""What a reader wants first: the verdict, and the selected candidate's figures at a glance."""

from __future__ import annotations

from dataclasses import dataclass

from schemas.stages import PageSpec
from tasks.report.figures import figure, in_words, scale
from tasks.report.inputs import BASE, Inputs
from tasks.report.overhead import as_served, overhead_figure

#: Which of the metrics stands for accuracy when the goal is none of them.
PRIMARY = ("accuracy", "entity_f1", "exact_match", "field_f1", "macro_f1", "perplexity", "loss")


#: Metrics of answers that were generated, as opposed to losses of those that were expected.
GENERATED = ("exact_match", "field_f1", "rouge_l")


@dataclass(frozen=True)
class Tile:
    """One figure of the selected candidate, and what to compare it with."""

    title: str
    value: str
    unit: str
    note: str


def quality_figure(spec: PageSpec, inputs: Inputs) -> str:
    """The metric that stands for accuracy: the goal where it is a metric, else the task's own."""
    metrics = inputs.reports[spec.selected].accuracy.metrics
    if spec.goal in metrics:
        return spec.goal
    return next((name for name in PRIMARY if name in metrics), next(iter(metrics)))


def verdict(spec: PageSpec, inputs: Inputs) -> str:
    """What was selected and how good it is, in one sentence that follows the candidate's name."""
    chosen = inputs.reports[spec.selected]
    name = quality_figure(spec, inputs)
    measured = chosen.accuracy.metrics[name]
    base = inputs.reports[BASE].accuracy.metrics.get(name)
    against = f", against {in_words(name, base.value)} for the untouched base" if base else ""
    goal = ""
    if spec.goal != name and spec.goal in chosen.figures():
        goal = f"{_small(spec.goal)} {in_words(spec.goal, chosen.figures()[spec.goal])}, and "
    return (
        f"is selected: {goal}{_small(name)} {in_words(name, measured.value, measured)} "
        f"on {_rows(name, spec, inputs):,} held-out rows{against}."
    )


def _rows(name: str, spec: PageSpec, inputs: Inputs) -> int:
    """The held-out rows behind a metric: the recipe may generate answers for some of them only."""
    rows = inputs.reports[spec.selected].accuracy.rows
    manifest = inputs.manifests.get(f"evaluate:{spec.selected}")
    limit = manifest.spec.get("evaluate", {}).get("generate_rows") if manifest else None
    return min(rows, limit) if limit and name in GENERATED else rows


def _small(name: str) -> str:
    """A title within a sentence: JSON and F1 keep their capitals."""
    title = figure(name).title
    return title if title[:2].isupper() else title[:1].lower() + title[1:]


def tiles(spec: PageSpec, inputs: Inputs) -> list[Tile]:
    """The five criteria of the selected candidate, retention beside accuracy."""
    figures, base = inputs.reports[spec.selected].figures(), inputs.reports[BASE].figures()
    quality, overhead = quality_figure(spec, inputs), overhead_figure(inputs)
    at_base = f"base: {in_words(quality, base[quality])}" if quality in base else ""
    share = in_words("trainable_share", figures["trainable_share"])
    answering = in_words("generate_peak_mib", figures["generate_peak_mib"])
    ratio = figures.get("step_time_ratio_to_full")
    of_full = f"{ratio:.2f} × full fine-tuning’s" if ratio is not None else ""
    wanted = [
        (figure(quality).title, quality, at_base),
        ("Forgetting", "retention_change", "loss gained on general text"),
        ("Shipped", "shipped_bytes", f"{share} of the base trained"),
        ("Training memory", "train_peak_mib", f"answering: {answering}"),
        ("Optimiser step", "step_time_s", of_full),
        ("Inference overhead", overhead, _small(overhead) if overhead else ""),
    ]
    made = []
    for title, name, note in wanted:
        if (value := as_served(figures, name, spec.merges)) is not None:
            written = scale(figure(name), [value])
            made.append(Tile(title, written.text(value), written.unit, note))
    return made
