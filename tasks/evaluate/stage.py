"""The evaluate stage: one subject, five criteria, one report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from schemas.stages import EvaluateSpec
from tasks.evaluate import probes


def run(spec: EvaluateSpec, paths: dict[str, Path], out_dir: Path) -> dict[str, Any]:
    """Measure the subject and write criteria.json and predictions.jsonl.

    Returns:
        figures: `CriteriaReport.figures()`; method; intervals: metric to [low, high]; rows.
    """
    started = probes.start(spec, paths)
    try:
        # Imported only now: the probes take as long as these imports, and begin before them.
        from tasks.evaluate.measure import measure

        report, predictions = measure(spec, paths, started)
    finally:
        probes.stop(started)
    (out_dir / "criteria.json").write_text(report.model_dump_json(indent=1))
    with (out_dir / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for line in predictions:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return {
        "figures": report.figures(),
        "method": report.method,
        "intervals": {
            name: [interval.low, interval.high]
            for name, interval in report.accuracy.metrics.items()
        },
        "rows": report.accuracy.rows,
    }
