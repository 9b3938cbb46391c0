"""The evaluate stage: one subject, five criteria, one report; or its accuracy alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.stages import EvaluateSpec
from tasks.core.bootstrap import save_statistics
from tasks.evaluate import probes

if TYPE_CHECKING:
    from tasks.evaluate.accuracy import Scores

STATISTICS = "statistics.safetensors"


def run(spec: EvaluateSpec, paths: dict[str, Path], out_dir: Path) -> dict[str, Any]:
    """Measure the subject and write what `EvaluateSpec` names.

    Returns:
        figures: `CriteriaReport.figures()`, or those of criterion 4; method; intervals: metric to
        [low, high]; rows.
    """
    return score(spec, paths, out_dir) if spec.accuracy_only else criteria(spec, paths, out_dir)


def criteria(spec: EvaluateSpec, paths: dict[str, Path], out_dir: Path) -> dict[str, Any]:
    """All five criteria."""
    started = probes.start(spec, paths)
    try:
        # Imported only now: the probes take as long as these imports, and begin before them.
        from tasks.evaluate.measure import measure

        report, scores = measure(spec, paths, started)
    finally:
        probes.stop(started)
    (out_dir / "criteria.json").write_text(report.model_dump_json(indent=1))
    return facts(report.method, report.figures(), scores, out_dir)


def score(spec: EvaluateSpec, paths: dict[str, Path], out_dir: Path) -> dict[str, Any]:
    """The metrics and retention alone: for further seeds, and trials of a search."""
    from tasks.core import runtime
    from tasks.evaluate import accuracy
    from tasks.evaluate.prompted import asking
    from tasks.evaluate.retention import is_measured
    from tasks.evaluate.subject import read_subject

    subject = read_subject(spec, paths)
    model = subject.load().to(runtime.device())
    prompted = asking(subject, model, spec.evaluate)
    base = None
    if is_measured(spec.task, paths["prepared"]):
        base = subject.base_beside(model)
    scores = accuracy.score(subject, model, base, paths["prepared"], spec.evaluate, prompted)
    figures = {name: interval.value for name, interval in scores.accuracy().intervals().items()}
    return facts(subject.method, figures, scores, out_dir)


def facts(method: str, figures: dict[str, float], scores: Scores, out_dir: Path) -> dict[str, Any]:
    """Write the answers, and the statistics that a comparison reads; the entry's facts."""
    save_statistics(scores.statistics, out_dir / STATISTICS)
    with (out_dir / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for line in scores.predictions:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return {
        "figures": figures,
        "method": method,
        "intervals": {
            name: [interval.low, interval.high]
            for name, interval in scores.accuracy().intervals().items()
        },
        "rows": len(scores.predictions),
    }
