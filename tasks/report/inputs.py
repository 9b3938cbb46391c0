"""What the page is made from: the entries of prepare, cost, train and evaluate, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from schemas.cost import Cost, CostReport
from schemas.errors import Problem, UserError
from schemas.manifest import Manifest
from schemas.report import Comparison, CriteriaReport, CurvePoint, DataReport
from schemas.stages import PageSpec
from tasks.core.store import MANIFEST, read_manifest

BASE = "base"
FINISHED = "finished"

#: How the page names the subjects that are no candidates.
TITLES = {BASE: "base", FINISHED: "finished"}

CURVE = TypeAdapter(list[CurvePoint])


@dataclass(frozen=True)
class Inputs:
    """Every entry that the page reads.

    comparison: the candidates over all seeds, told apart by the rows.
    reports: `base`, each candidate in the recipe's order, then `finished` where there is one.
    curves: candidate: its training curve.
    costs: candidate: what it was expected to cost; empty where that was not told.
    larger: candidate: what it would cost on a larger base, which has so many `larger_parameters`.
    manifests: entry name as in `paths` (`prepared`, `train:<label>`…): its manifest.
    quarantine: the refused rows' Parquet file.
    """

    data: DataReport
    quarantine: Path
    comparison: Comparison
    reports: dict[str, CriteriaReport]
    curves: dict[str, list[CurvePoint]]
    costs: dict[str, Cost]
    larger: dict[str, Cost]
    larger_parameters: int
    manifests: dict[str, Manifest]


def read_inputs(spec: PageSpec, paths: dict[str, Path]) -> Inputs:
    """Read every entry of `paths`.

    Raises:
        UserError: entries that the page cannot do without are not among `paths`, all at once.
    """
    needed = ["prepared", "comparison", f"evaluate:{BASE}"]
    needed += [f"{kind}:{label}" for label in spec.labels for kind in ("train", "evaluate")]
    missing = [
        Problem(f"paths[{name!r}]", "is not given", "name the entry's directory in the call")
        for name in needed
        if name not in paths
    ]
    if spec.selected not in spec.labels:
        fix = f"one of {', '.join(spec.labels)}"
        missing.append(Problem("spec.selected", f"{spec.selected!r} is no candidate", fix))
    if missing:
        raise UserError(missing)

    subjects = [BASE, *spec.labels]
    if f"evaluate:{FINISHED}" in paths:
        subjects.append(FINISHED)
    comparison = Comparison.model_validate_json(
        (paths["comparison"] / "comparison.json").read_bytes()
    )
    costs, larger = _costs(paths.get("cost")), _costs(paths.get("larger"))
    reports = {name: _criteria(paths[f"evaluate:{name}"]) for name in subjects}
    for label in spec.labels:
        reports[label] = comparison.over_seeds(label, reports[label])
    return Inputs(
        comparison=comparison,
        data=DataReport.model_validate_json((paths["prepared"] / "data_report.json").read_bytes()),
        quarantine=paths["prepared"] / "quarantine.parquet",
        reports=reports,
        curves={label: _curve(paths[f"train:{label}"]) for label in spec.labels},
        costs=costs.candidates,
        larger=larger.candidates,
        larger_parameters=larger.total_parameters,
        manifests={
            name: read_manifest(path) for name, path in paths.items() if (path / MANIFEST).exists()
        },
    )


def _criteria(entry: Path) -> CriteriaReport:
    return CriteriaReport.model_validate_json((entry / "criteria.json").read_bytes())


def _costs(entry: Path | None) -> CostReport:
    if entry is None:
        return CostReport(total_parameters=0, candidates={})
    return CostReport.model_validate_json((entry / "plan.json").read_bytes())


def _curve(entry: Path) -> list[CurvePoint]:
    return CURVE.validate_json((entry / "curve.json").read_bytes())
