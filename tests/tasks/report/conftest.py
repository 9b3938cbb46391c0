"""Store entries such as the stages leave them, and a headless Chromium to open the page in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from schemas.cost import Cost, CostReport
from schemas.manifest import FileRecord, Manifest, Provenance
from schemas.report import (
    Accuracy,
    Comparison,
    Computation,
    CriteriaReport,
    CurvePoint,
    DataReport,
    Example,
    Interval,
    Latency,
    LengthHistogram,
    Memory,
    Pair,
    Seeded,
    SplitReport,
    Storage,
    Trial,
)
from schemas.stages import PageSpec
from tasks.report.inputs import Inputs, read_inputs

#: What a row may hold. If any of it ran or was parsed as markup, the tests would see it.
HOSTILE = (
    "</pre><script>document.documentElement.dataset.owned=1</script><img src=x onerror=alert(1)>"
)

RECIPE = """\
name: orders-intent
task: causal-lm
base: {model: /home/someone/models/tiny-llama, dtype: auto}
data:
  train: {path: "train.jsonl"}
  test: {path: ~/data/test.jsonl}
  retention: {path: retention.jsonl}  # general text
candidates:
  - {method: full}
  - {method: lora, rank: 16}
  - {method: lora, rank: 4}
select: {maximize: exact_match, subject_to: {adapter_mib: "<= 10"}}
register: {name: orders-intent, gate: {exact_match: ">= 0.90"}, promote: true}
"""

#: In which forms latency is measured: an adapter in both, the finished model as it is.
MERGED = {
    ("base", "base"): [False],
    ("candidate", "full"): [False],
    ("candidate", "lora"): [False, True],
    ("finished", "lora"): [True],
}

LABELS = ["full", "lora-r16", "lora-r4"]

SPEC = PageSpec(
    recipe_name="orders-intent",
    recipe_yaml=RECIPE,
    labels=LABELS,
    selected="lora-r16",
    searched={
        "lora-r4": [
            Trial(learning_rate=1e-3, value=0.81),
            Trial(learning_rate=2e-3, value=0.9, chosen=True),
            Trial(learning_rate=0.1, value=None),
        ]
    },
    failed={"ia3": f"out of luck {HOSTILE}"},
    why="The highest exact_match of the candidates that keep adapter_mib <= 10.",
    goal="exact_match",
    merges=True,
)


def criteria(
    subject: str,
    method: str,
    *,
    shipped: int,
    trained: int,
    train_mib: float | None,
    step_s: float | None,
    exact: float,
    loss: float,
    retention: float,
    overhead: float,
) -> CriteriaReport:
    """A report whose figures hang together: a 3.7 M-parameter base, 400 held-out rows."""
    forward = 7.4e6 * (1.06 if method == "lora" and subject == "candidate" else 1)
    backward = None if step_s is None else forward * (2.0 if method == "full" else 1.13)
    half = 1.96 * math.sqrt(max(exact * (1 - exact), 1e-4) / 400)

    def interval(value: float, half: float) -> Interval:
        return Interval(value=value, low=max(value - half, 0), high=value + half)

    right = Example(
        prompt="where is my order 88123?? ordered it last week",
        expected='{"intent": "track_order", "order_id": "88123"}',
        got='{"intent": "track_order", "order_id": "88123"}',
        right=True,
    )
    wrong = Example(
        prompt=f"Cancel order 4411 please {HOSTILE}",
        expected='{"intent": "cancel_order", "order_id": "4411"}',
        got='{"intent": "cancel_order", "order_id": "4111"}' if subject != "base" else "",
        right=False,
    )
    babble = wrong.model_copy(update={"prompt": right.prompt, "got": "Once upon a time <b>there"})
    return CriteriaReport(
        subject=subject,
        method=method,
        storage=Storage(
            shipped_bytes=shipped, trainable_parameters=trained, trainable_share=trained / 3.7e6
        ),
        memory=Memory(
            train_peak_mib=train_mib, generate_peak_mib=96.4, base_generate_peak_mib=91.25
        ),
        computation=Computation(
            forward_flops_per_token=forward,
            backward_flops_per_token=backward,
            train_flops_per_token=None if backward is None else 1.1 * (forward + backward),
            step_time_s=step_s,
            train_tokens_per_s=None if step_s is None else 4096 / step_s,
            flops_ratio_to_full=None if backward is None else (forward + backward) / 22.2e6,
            step_time_ratio_to_full=None if step_s is None else step_s / 0.212,
        ),
        accuracy=Accuracy(
            metrics={
                "exact_match": interval(exact, half),
                "field_f1": interval(min(1.0, exact + 0.03), half * 0.7),
                "perplexity": interval(math.exp(loss), 0.02),
                "loss": interval(loss, 0.02),
            },
            rows=400,
            retention_loss=2.914 + retention,
            retention_loss_base=2.914,
            retention_change=Interval(value=retention, low=retention - 0.02, high=retention + 0.02),
        ),
        inference_overhead=[
            Latency(
                batch_size=batch,
                prompt_tokens=64,
                merged=merged,
                prefill_p50_ms=3.1 * batch**0.4 * (1 if merged else overhead),
                prefill_p95_ms=3.9 * batch**0.4 * (1 if merged else overhead),
                token_p50_ms=2.2 * batch**0.2 * (1 if merged else overhead),
                token_p95_ms=2.6 * batch**0.2 * (1 if merged else overhead),
                prefill_ratio=interval(1.01 if merged else overhead, 0.03),
                token_ratio=interval(0.99 if merged else overhead, 0.03),
            )
            for batch in (1, 8)
            for merged in MERGED.get((subject, method), [False])
        ],
        examples=[babble] if subject == "base" else [wrong, right],
        device="cpu",
        dtype="bfloat16",
        how={
            "storage": "Bytes of the safetensors files beside the base.",
            "memory": "Peak resident set of the isolated process minus its floor.",
            "computation": "torch’s FLOP counter; the median of 20 steps.",
            "accuracy": "Greedy answers; percentile bootstrap over rows, 1,000 resamples.",
            "inference_overhead": f"64 prompt tokens, 20 repeats; {method}.",
        },
    )


def reports() -> dict[str, CriteriaReport]:
    """A poor base, three candidates that trade figures against each other, the merged winner."""
    rows: dict[str, tuple[Any, ...]] = {
        "base": ("base", "base", 0, 0, None, None, 0.0, 4.31, 0.0, 1.0),
        "full": ("candidate", "full", 7_461_088, 3_700_000, 161.2, 0.212, 0.955, 0.061, 0.41, 1.0),
        "lora-r16": ("candidate", "lora", 903_112, 451_000, 118.7, 0.158, 0.948, 0.066, 0.12, 1.21),
        "lora-r4": ("candidate", "lora", 226_400, 112_750, 109.3, 0.149, 0.902, 0.131, 0.05, 1.18),
        "finished": ("finished", "lora", 7_461_088, 451_000, 118.7, 0.158, 0.948, 0.066, 0.12, 1.0),
    }
    figures = (
        "shipped",
        "trained",
        "train_mib",
        "step_s",
        "exact",
        "loss",
        "retention",
        "overhead",
    )
    return {
        key: criteria(subject, method, **dict(zip(figures, row, strict=True)))
        for key, (subject, method, *row) in rows.items()
    }


#: Fourteen candidates, some of them alike: label: method, shipped bytes, trained weights,
#: training MiB, seconds a step, exact match, loss, forgetting, overhead.
MANY: dict[str, tuple[Any, ...]] = {
    "full": ("full", 7_461_088, 3_700_000, 422.5, 0.212, 0.955, 0.061, 0.41, 1.0),
    "lora-r4": ("lora", 226_400, 112_750, 289.3, 0.149, 0.902, 0.131, 0.05, 1.18),
    "lora-r16": ("lora", 903_112, 451_000, 292.8, 0.158, 0.948, 0.066, 0.12, 1.21),
    "lora-r16-rslora": ("lora", 903_130, 451_000, 292.9, 0.158, 0.946, 0.067, 0.13, 1.21),
    "lora-r16-dora": ("lora", 950_130, 474_000, 361.0, 0.301, 0.949, 0.065, 0.12, 1.64),
    "lora-plus-r16": ("lora", 903_140, 451_000, 293.1, 0.159, 0.951, 0.064, 0.14, 1.22),
    "ia3": ("ia3", 20_410, 4_096, 262.5, 0.171, 0.612, 0.72, 0.02, 1.05),
    "layer_norm": ("layer_norm", 13_004, 2_304, 294.4, 0.168, 0.655, 0.66, 0.03, 1.02),
    "bitfit": ("bitfit", 61_800, 11_264, 288.0, 0.165, 0.702, 0.51, 0.03, 1.03),
    "bottleneck-sequential-16": ("b", 140_900, 33_856, 250.7, 0.141, 0.871, 0.19, 0.08, 1.12),
    "bottleneck-parallel-16": ("b", 140_902, 33_856, 245.4, 0.140, 0.874, 0.18, 0.08, 1.14),
    "bottleneck-double_sequential-16": (
        *("b", 281_000, 67_712, 271.9, 0.155, 0.893, 0.15, 0.10, 1.25),
    ),
    "prompt_tuning-20": ("prompt_tuning", 16_800, 2_560, 301.2, 0.189, 0.431, 1.02, 0.0, 1.31),
    "prefix_tuning-20": ("prefix_tuning", 331_000, 81_920, 240.2, 0.133, 0.688, 0.55, 0.0, 1.16),
}


def many_reports() -> dict[str, CriteriaReport]:
    """The base, fourteen candidates, and the best one, finished."""
    found = {"base": reports()["base"]}
    names = ("shipped", "trained", "train_mib", "step_s", "exact", "loss", "retention", "overhead")
    for label, (method, *row) in MANY.items():
        found[label] = criteria("candidate", method, **dict(zip(names, row, strict=True)))
    best = dict(zip(names, MANY[SPEC.selected][1:], strict=True))
    whole = best | {"shipped": 7_461_088, "overhead": 1.0}
    return found | {"finished": criteria("finished", "lora", **whole)}


def curve(label: str, steps: int = 240) -> list[CurvePoint]:
    """A falling loss with a wave on it, so that smoothing has something to do."""
    floor, seconds = MANY[label][6], MANY[label][4]
    return [
        CurvePoint(
            step=step,
            epoch=3 * step / steps,
            loss=floor + 4.2 * math.exp(-step / 25) + 0.2 * floor * math.sin(2.3 * step),
            learning_rate=2e-3 * (1 - step / steps),
            grad_norm=1.5 * math.exp(-step / 60) + 0.2,
            tokens=4096 * step,
            step_time_s=seconds,
        )
        for step in range(1, steps + 1)
    ]


def data_report() -> DataReport:
    def split(name: str, kept: int, refused: dict[str, int]) -> SplitReport:
        counts = [kept // 10, kept // 2, kept - kept // 10 - kept // 2 - kept // 20, kept // 20]
        return SplitReport(
            path=f"/mnt/data/{name}.jsonl",
            rows_in=kept + sum(refused.values()),
            rows_kept=kept,
            refused=refused,
            truncated=0,
            label_less=0,
            tokens=kept * 70,
            answer_tokens=kept * 22,
            lengths=LengthHistogram(edges=[0, 32, 64, 96, 128], counts=counts),
        )

    return DataReport(
        task="causal-lm",
        template="chat",
        max_length=256,
        splits={
            "train": split(
                "train", 2041, {"duplicate_of": 61, "empty_answer": 22, "wrong_type": 9}
            ),
            "test": split("test", 400, {"duplicate_of": 3}),
            "retention": split("retention", 200, {}),
        },
    )


def comparison(found: dict[str, CriteriaReport]) -> Comparison:
    """Of two seeds that gave the same: one of the three candidates is told apart from the best."""
    metrics = {name: report.accuracy.intervals() for name, report in found.items()}
    labels = [name for name in found if name not in ("base", "finished")]
    return Comparison(
        metric="exact_match",
        more_is_better=True,
        seeds=[0, 1],
        candidates={
            label: {
                name: Seeded(**found.model_dump(), seeds=[found.value, found.value])
                for name, found in metrics[label].items()
            }
            for label in labels
        },
        pairs=[
            Pair(
                first=first,
                second=second,
                difference=metrics[first]["exact_match"].value
                - metrics[second]["exact_match"].value,
                low=-0.01,
                high=0.09,
                p=p,
                test="paired bootstrap",
            )
            for first, second, p in (
                ("full", "lora-r16", 0.4),
                ("full", "lora-r4", 0.002),
                ("lora-r16", "lora-r4", 0.01),
            )
            if {first, second} <= set(labels)
        ],
        how="mean of seeds 0, 1; some words",
    )


def costs(found: dict[str, CriteriaReport], labels: list[str]) -> CostReport:
    """A plan that is right about weights, an eighth too high about memory, too low on FLOPs."""
    told = {}
    for label in labels:
        report = found[label]
        own, peak = report.computation, report.memory.train_peak_mib or 0.0
        told[label] = Cost(
            trainable_parameters=report.storage.trainable_parameters,
            trainable_share=report.storage.trainable_share,
            shipped_mib=report.storage.shipped_bytes / 2**20,
            training_mib={"weights": 9 / 8 * peak, "total": 9 / 8 * peak},
            inference_mib=100.0,
            forward_flops_per_token=0.5 * (own.train_flops_per_token or 0.0),
            backward_flops_per_token=0.25 * (own.train_flops_per_token or 0.0),
            steps=240,
            tokens=4096 * 240,
        )
    asked = Cost(trainable_parameters=0, trainable_share=0.0, shipped_mib=None, inference_mib=91.0)
    return CostReport(total_parameters=3_700_000, candidates={**told, "zero_shot": asked})


def on_larger(here: CostReport) -> CostReport:
    """Eight times the memory, ten times the FLOPs, a third of the share."""
    there = {
        label: cost.model_copy(
            update={
                "trainable_share": cost.trainable_share / 3,
                "training_mib": cost.training_mib
                and {name: 8 * value for name, value in cost.training_mib.items()},
                "forward_flops_per_token": 10 * (cost.forward_flops_per_token or 0.0),
                "backward_flops_per_token": 10 * (cost.backward_flops_per_token or 0.0),
            }
        )
        for label, cost in here.candidates.items()
    }
    return CostReport(total_parameters=35_700_000, candidates=there)


def write_entries(root: Path, found: dict[str, CriteriaReport]) -> dict[str, Path]:
    """Entries on disk, as `paths` of a call names them."""
    labels = [name for name in found if name not in ("base", "finished")]
    paths = {name: root / name for name in ("prepared", "comparison", "cost", "larger")}
    paths |= {f"train:{label}": root / f"train-{label}" for label in labels}
    paths |= {f"evaluate:{name}": root / f"evaluate-{name}" for name in found}
    for path in paths.values():
        path.mkdir(parents=True)
    (paths["prepared"] / "data_report.json").write_text(data_report().model_dump_json())
    pl.DataFrame(
        {
            "split": ["train", "train", "train", "test"],
            "file": ["train.jsonl"] * 3 + ["test.jsonl"],
            "line": [7, 31, 32, 1204],
            "raw": [f'{{"prompt": "{HOSTILE}"}}', '{"prompt": 3}', '{"prompt": 4}', "ümläut 🙂"],
            "reasons": [
                ["empty_answer"],
                ["wrong_type:prompt"],
                ["wrong_type:prompt"],
                ["duplicate_of:88", "too_long:912"],
            ],
        },
        schema_overrides={"line": pl.Int64},
    ).write_parquet(paths["prepared"] / "quarantine.parquet")
    (paths["comparison"] / "comparison.json").write_text(comparison(found).model_dump_json())
    (paths["cost"] / "plan.json").write_text(costs(found, labels).model_dump_json())
    (paths["larger"] / "plan.json").write_text(on_larger(costs(found, labels)).model_dump_json())
    for label in labels:
        points = [point.model_dump() for point in curve(label)]
        (paths[f"train:{label}"] / "curve.json").write_text(json.dumps(points))
    for name, report in found.items():
        (paths[f"evaluate:{name}"] / "criteria.json").write_text(report.model_dump_json())
    for number, (name, path) in enumerate(paths.items()):
        write_manifest(name, path, number)
    return paths


def write_manifest(name: str, path: Path, number: int) -> None:
    stage = name.split(":")[0].replace("prepared", "prepare")
    manifest = Manifest(
        stage=stage,
        stage_version=1,
        key=f"{number:02x}" * 20,
        format={"prepare": "rows", "train": "peft-adapter"}.get(stage, "report"),
        spec={},
        inputs={},
        outside={"base": "ab" * 32} if stage != "prepare" else {"train": "cd" * 32},
        facts={},
        files={"some.json": FileRecord(bytes=12345, sha256="ef" * 32)},
        provenance=Provenance(
            started=f"2026-01-05T08:{number:02d}:00+00:00",
            seconds=12.5 + number,
            machine="Some CPU @ 2.0 GHz, 4 cores",
            python="3.11.2",
            libraries={"torch": "2.13.0", "peft": "0.21.2"}
            | ({"polars": "2.1.0"} if stage == "prepare" else {}),
            git_commit="0123456789abcdef0123456789abcdef01234567",
            git_dirty=stage == "train",
        ),
    )
    (path / "manifest.json").write_text(manifest.model_dump_json())


@pytest.fixture(scope="session")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_entries(tmp_path_factory.mktemp("store"), reports())


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[PageSpec, dict[str, Path]]:
    """A call with fourteen candidates."""
    spec = SPEC.model_copy(update={"labels": list(MANY)})
    return spec, write_entries(tmp_path_factory.mktemp("many"), many_reports())


@pytest.fixture(scope="session")
def spec() -> PageSpec:
    return SPEC


@pytest.fixture(scope="session")
def inputs(entries: dict[str, Path]) -> Inputs:
    return read_inputs(SPEC, entries)


@pytest.fixture(scope="session")
def hostile() -> str:
    return HOSTILE
