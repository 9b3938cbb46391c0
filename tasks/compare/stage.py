"""The compare stage: the candidates' metrics over all seeds, and a paired test of every two.

Every candidate answered the same rows, and seed for seed met its training rows in the same order,
so differences are taken row by row and seed by seed. It needs no torch, and takes a second.
"""

from __future__ import annotations

from itertools import combinations, count
from pathlib import Path
from typing import Any

from schemas.report import Comparison, Pair
from schemas.stages import CompareSpec
from tasks.compare.paired import Resamples, difference, least_p, mcnemar, over_seeds
from tasks.core.apart import SIGNIFICANCE
from tasks.core.bootstrap import Statistic, load_statistics
from tasks.core.progress import warn

STATISTICS = "statistics.safetensors"

#: Label: of each seed the statistics by metric.
Subjects = dict[str, list[dict[str, Statistic]]]


def run(spec: CompareSpec, paths: dict[str, Path], out_dir: Path) -> dict[str, Any]:
    """Write comparison.json. paths: `<label>/<seed>`, evaluate entries."""
    subjects = {
        label: [load_statistics(paths[f"{label}/{seed}"] / STATISTICS) for seed in spec.seeds]
        for label in spec.labels
    }
    found = compare(spec, subjects)
    warn_of_few_resamples(spec, found)
    (out_dir / "comparison.json").write_text(found.model_dump_json(indent=1))
    return {"metric": found.metric, "candidates": len(found.candidates)}


def compare(spec: CompareSpec, subjects: Subjects) -> Comparison:
    """Each candidate's metrics, and each two of them by the metric that was asked for."""
    resamples = Resamples(spec.resamples, len(spec.seeds))
    chosen = {label: [seed[spec.metric] for seed in seeds] for label, seeds in subjects.items()}
    drawn = {label: resamples.means(statistics) for label, statistics in chosen.items()}
    pairs = []
    for first, second in combinations(spec.labels, 2):
        gap = difference(chosen[first], chosen[second], drawn[first] - drawn[second])
        exact = mcnemar(chosen[first][0], chosen[second][0]) if len(spec.seeds) == 1 else None
        pairs.append(
            Pair(
                first=first,
                second=second,
                difference=gap.value,
                low=gap.low,
                high=gap.high,
                p=gap.p if exact is None else exact,
                test="paired bootstrap" if exact is None else "McNemar",
            )
        )
    return Comparison(
        metric=spec.metric,
        more_is_better=spec.more_is_better,
        seeds=spec.seeds,
        candidates={
            label: {
                name: over_seeds([seed[name] for seed in seeds], resamples) for name in seeds[0]
            }
            for label, seeds in subjects.items()
        },
        pairs=pairs,
        how=how(spec),
    )


def warn_of_few_resamples(spec: CompareSpec, found: Comparison) -> None:
    """Say aloud where no difference, however large, could be told: a bootstrap's p is never below
    what its resamples can show, and is multiplied with the number of other candidates."""
    others = len(spec.labels) - 1
    if all(pair.test == "McNemar" for pair in found.pairs):
        return
    if least_p(spec.resamples) * others >= SIGNIFICANCE:
        needed = next(n for n in count(spec.resamples) if least_p(n) * others < SIGNIFICANCE)
        warn(
            f"evaluate.bootstrap: {spec.resamples} resamples tell none of {others + 1} candidates "
            f"apart, however far they are; write {needed} or more"
        )


def how(spec: CompareSpec) -> str:
    """The comparison in words."""
    one = len(spec.seeds) == 1
    seeds = f"seed {spec.seeds[0]}" if one else f"mean of seeds {', '.join(map(str, spec.seeds))}"
    drawn = "rows" if one else "rows and seeds"
    return (
        f"{seeds}; 95 % intervals: percentile bootstrap, {drawn} drawn anew, {spec.resamples} "
        f"resamples; two candidates by {spec.metric} on the same {drawn}: McNemar's exact test "
        "where there is one seed and a row is right or wrong, else the paired bootstrap; p "
        "corrected for the number of candidates (Holm); apart where p < 0.05"
    )
