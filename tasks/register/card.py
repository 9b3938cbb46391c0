"""The model card of a registered version, written from its records and from nothing else."""

from __future__ import annotations

from typing import Any

from schemas.manifest import Manifest
from schemas.report import RETENTION, CriteriaReport, DataReport
from schemas.stages import RegisterSpec
from schemas.tasks import TASKS, is_labelled, reads_images
from tasks.core.shots import EXAMPLES

#: Figures of the table, in its order; those that a report does not have are left out.
UNITS = {
    "shipped_bytes": "bytes",
    "trainable_parameters": "",
    "trainable_share": "of the base",
    "train_peak_mib": "MiB",
    "generate_peak_mib": "MiB",
    "forward_flops_per_token": "FLOP",
    "step_time_s": "s",
    "train_tokens_per_s": "tokens/s",
    RETENTION: "nats a token",
}


#: What a classifier does with a row of another kind.
GIVES = {
    "sequence-classification": "one of them to any text",
    "token-classification": "spans of them in any text, as JSON with their characters",
    "image-classification": "one of them to any image",
}


#: What a version was not measured on.
UNTRIED = {"text": "other text was", "image": "other images were"}


def model_card(
    spec: RegisterSpec,
    report: CriteriaReport,
    data: DataReport,
    manifests: dict[str, Manifest],
    serving: dict[str, Any],
    example: list[Any],
) -> str:
    """The card as Markdown: what it is, from what, how good, its limits, how to load it."""
    sections = [
        f"# {spec.name}",
        introduction(spec, report, serving, manifests["finished"]),
        "## Data\n\n" + data_table(data) + "\n\n" + data_hashes(manifests),
        "## Five criteria\n\n" + criteria_table(report),
        "## Limits\n\n" + limits(spec, report, data, serving, manifests["finished"]),
        "## Loading\n\n" + loading(spec, example),
        "## Made with\n\n" + made_with(manifests),
    ]
    return "\n\n".join(sections) + "\n"


def introduction(
    spec: RegisterSpec, report: CriteriaReport, serving: dict[str, Any], finished: Manifest
) -> str:
    revision = f" at revision `{spec.base['revision']}`" if spec.base["revision"] else ""
    shipped = "the adapter; its base is fetched and checked" if serving["base"] else "whole"
    if finished.format == "prompt":
        shipped = "none; the base as it is, fetched and checked"
    lines = [
        f"- task: {spec.task}",
        f"- base: `{spec.base['model']}`{revision}",
        f"- method: {report.method}",
        f"- weights: {shipped}, {report.dtype}",
        f"- recipe: {spec.recipe_name}",
    ]
    if (fast := report.speculation) is not None:
        lines.append(
            f"- Turbo heads: {fast.heads}, {fast.parameters:,} parameters; greedy answers come "
            f"{fast.speeds[0].speedup.value:.2f} times as fast as transformers' generate() gives "
            f"them at batch {fast.speeds[0].batch_size}, and {fast.alike:,} of {fast.rows:,} are "
            "the same, token for token"
        )
    if serving["labels"]:
        lines.append(f"- labels: {len(serving['labels'])} ({', '.join(serving['labels'][:8])}…)")
    return "\n".join(lines)


def data_table(data: DataReport) -> str:
    lines = ["| split | file | rows in | kept | refused | tokens |", "|---|---|--:|--:|--:|--:|"]
    for name, split in data.splits.items():
        refused = sum(split.refused.values())
        lines.append(
            f"| {name} | {split.path} | {split.rows_in:,} | {split.rows_kept:,} | {refused:,} "
            f"| {split.tokens:,} |"
        )
    return "\n".join(lines)


def data_hashes(manifests: dict[str, Manifest]) -> str:
    read = manifests["prepared"].outside
    return "SHA-256 of what was read:\n\n" + "\n".join(
        f"- {name}: `{value}`" for name, value in sorted(read.items())
    )


def criteria_table(report: CriteriaReport) -> str:
    figures = report.figures()
    lines = ["| figure | value | unit |", "|---|--:|---|"]
    for name, interval in report.accuracy.intervals().items():
        unit = f"{UNITS[name]}, " if name in UNITS else ""
        between = f"{unit}{interval.low:.4g} to {interval.high:.4g} (95 %)"
        lines.append(f"| {name} | {interval.value:.4g} | {between} |")
    lines += [
        f"| {name} | {figures[name]:,.6g} | {unit} |"
        for name, unit in UNITS.items()
        if name in figures and name != RETENTION
    ]
    for row in report.inference_overhead:
        what = f"batch {row.batch_size}, {'merged' if row.merged else 'unmerged'}"
        lines.append(f"| prefill, {what} | {row.prefill_p50_ms:.4g} | ms, median |")
        if row.token_p50_ms is not None:
            lines.append(f"| token, {what} | {row.token_p50_ms:.4g} | ms, median |")
    how = "\n".join(f"- {name}: {text}" for name, text in report.how.items())
    return "\n".join(lines) + f"\n\nMeasured on {report.device} in {report.dtype}.\n\n{how}"


def limits(
    spec: RegisterSpec,
    report: CriteriaReport,
    data: DataReport,
    serving: dict[str, Any],
    finished: Manifest,
) -> str:
    reads = TASKS[spec.task].reads
    lines = [
        f"- Measured on {report.accuracy.rows:,} held-out rows of the same source as the training "
        f"rows; {UNTRIED[reads]} not tried.",
    ]
    if reads == "image":
        lines.append(f"- An image becomes {data.max_length} tokens, whatever its size.")
    elif finished.format != "prompt":
        lines.append(f"- Trained on rows of at most {data.max_length} tokens.")
    elif f"model/{EXAMPLES}" in finished.files:
        lines.append(
            "- Train rows travel with it and stand in front of each prompt, as many as its "
            "context holds: an answer may repeat them."
        )
    if not is_labelled(spec.task):
        lines.append(
            f"- Answers are greedy, of at most {spec.max_new_tokens} tokens; nothing checks "
            "that they are true."
        )
        if data.template == "chat":
            lines.append("- A prompt is shown to the model through its chat template.")
    else:
        cut = f"; a text is cut at {data.max_length} tokens" if reads == "text" else ""
        lines.append(f"- It knows only its own labels, and gives {GIVES[spec.task]}{cut}.")
    if serving["base"]:
        made = "measured" if finished.format == "prompt" else "trained"
        lines.append(f"- It runs on exactly the base that it was {made} on: hashes are checked.")
    return "\n".join(lines)


def loading(spec: RegisterSpec, example: list[Any]) -> str:
    params = ', params={"max_new_tokens": 64}' if not is_labelled(spec.task) else ""
    asked = '[open("image.png", "rb").read()]' if reads_images(spec.task) else repr(example[:1])
    return (
        "```python\n"
        "import mlflow\n\n"
        "# With MLFLOW_TRACKING_URI set to the registry that holds this version:\n"
        f'model = mlflow.pyfunc.load_model("models:/{spec.name}@champion")\n'
        f"print(model.predict({asked}{params}))\n"
        "```\n\n"
        "It needs the packages of its `requirements.txt` and not the project that made it."
    )


def made_with(manifests: dict[str, Manifest]) -> str:
    lines = []
    for name, manifest in sorted(manifests.items()):
        made = manifest.provenance
        state = " with changes" if made.git_dirty else ""
        lines.append(
            f"- {name}: entry `{manifest.key}`, {made.started}, {made.seconds:g} s, "
            f"commit `{made.git_commit}`{state}"
        )
    libraries = manifests["trained"] if "trained" in manifests else manifests["finished"]
    versions = [f"{name} {value}" for name, value in libraries.provenance.libraries.items()]
    return "\n".join(lines) + f"\n- libraries: {', '.join(versions)}"
