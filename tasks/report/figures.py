"""The figures of a `CriteriaReport` as a reader meets them: title, unit, precision, direction."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from schemas.report import Interval

Better = Literal["higher", "lower"]

#: Criterion: its title, in the order of the page. The goal comes first.
CRITERIA = {
    "accuracy": "Accuracy and retention",
    "storage": "Storage",
    "memory": "Memory",
    "computation": "Computation",
    "overhead": "Inference overhead",
}

#: (factor, unit), largest first: the first that makes a row's largest value at least 1 is shown.
Ladder = tuple[tuple[float, str], ...]
COUNT: Ladder = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
FLOP: Ladder = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"), (1, "FLOP"))
SECONDS: Ladder = ((1, "s"), (1e-3, "ms"))
MS: Ladder = ((1, "ms"),)
MIB: Ladder = ((1, "MiB"),)
MIB_OF_BYTES: Ladder = ((2**20, "MiB"),)
PERCENT: Ladder = ((0.01, "%"),)
OF_FULL: Ladder = ((1, "× full"),)
OF_BASE: Ladder = ((1, "× base"),)
NATS: Ladder = ((1, "nats"),)
RATE: Ladder = ((1, "tokens/s"),)
PLAIN: Ladder = ((1, ""),)


@dataclass(frozen=True)
class Figure:
    """One figure. decimals: fixed, or None for as many as a row's values need."""

    name: str
    criterion: str
    title: str
    ladder: Ladder
    better: Better | None
    decimals: int | None = None


_KNOWN = [
    Figure("accuracy", "accuracy", "Accuracy", PERCENT, "higher", 1),
    Figure("macro_f1", "accuracy", "Macro F1", PERCENT, "higher", 1),
    Figure("entity_f1", "accuracy", "Span F1", PERCENT, "higher", 1),
    Figure("entity_precision", "accuracy", "Span precision", PERCENT, "higher", 1),
    Figure("entity_recall", "accuracy", "Span recall", PERCENT, "higher", 1),
    Figure("token_accuracy", "accuracy", "Token accuracy", PERCENT, "higher", 1),
    Figure("exact_match", "accuracy", "Exact match", PERCENT, "higher", 1),
    Figure("field_f1", "accuracy", "JSON field F1", PERCENT, "higher", 1),
    Figure("rouge_l", "accuracy", "ROUGE-L", PERCENT, "higher", 1),
    Figure("perplexity", "accuracy", "Perplexity", PLAIN, "lower", 2),
    Figure("loss", "accuracy", "Held-out loss", NATS, "lower", 3),
    Figure("retention_loss", "accuracy", "Loss on general text", NATS, "lower", 3),
    Figure("retention_change", "accuracy", "Forgetting, against the base", NATS, "lower", 3),
    Figure("shipped_bytes", "storage", "Shipped for this task", MIB_OF_BYTES, "lower"),
    Figure("adapter_mib", "storage", "Shipped for this task", MIB, "lower"),
    Figure("ten_tasks_bytes", "storage", "Ten such tasks", MIB_OF_BYTES, "lower"),
    Figure("trainable_parameters", "storage", "Trained parameters", COUNT, "lower"),
    Figure("trainable_share", "storage", "Trained share of the base", PERCENT, "lower"),
    Figure("train_peak_mib", "memory", "Peak, training", MIB, "lower"),
    Figure("train_weights_mib", "memory", "Training: weights", MIB, None),
    Figure("train_gradients_mib", "memory", "Training: gradients", MIB, None),
    Figure("train_optimiser_mib", "memory", "Training: optimiser", MIB, None),
    Figure("train_activations_mib", "memory", "Training: activations", MIB, None),
    Figure("train_rest_mib", "memory", "Training: the rest of the peak", MIB, None),
    Figure("generate_peak_mib", "memory", "Peak, answering", MIB, "lower"),
    Figure("base_generate_peak_mib", "memory", "The base’s peak, answering", MIB, None),
    Figure("forward_flops_per_token", "computation", "Forward, a token", FLOP, "lower"),
    Figure("backward_flops_per_token", "computation", "Backward, a token", FLOP, "lower"),
    Figure("train_flops_per_token", "computation", "A trained token, as trained", FLOP, "lower"),
    Figure("flops_ratio_to_full", "computation", "Forward and backward", OF_FULL, "lower", 2),
    Figure("step_time_s", "computation", "Optimiser step", SECONDS, "lower"),
    Figure("step_time_ratio_to_full", "computation", "Optimiser step", OF_FULL, "lower", 2),
    Figure("train_tokens_per_s", "computation", "Training rate", RATE, "higher"),
    Figure("turbo_parameters", "storage", "Parameters of Turbo heads", COUNT, "lower"),
    Figure("swap_ms", "overhead", "Change of adapter", MS, "lower"),
    Figure("ten_adapters_mib", "overhead", "Ten adapters in memory", MIB, "lower"),
]
KNOWN = {figure.name: figure for figure in _KNOWN}
ORDER = {figure.name: place for place, figure in enumerate(_KNOWN)}

LATENCY = re.compile(r"(prefill|token)_(p50_ms|p95_ms|ratio)_b(\d+)(?:_p(\d+))?(_merged)?")


#: Of Turbo heads: figure, title, unit.
SPEED = re.compile(r"(speedup|speculation|tokens_per_pass|tokens_per_s)_b(\d+)")
SPEED_TITLES: dict[str, tuple[str, Ladder]] = {
    "speedup": ("With heads", ((1, "× generate()"),)),
    "speculation": ("With heads", ((1, "× no drafts"),)),
    "tokens_per_pass": ("Tokens a pass", PLAIN),
    "tokens_per_s": ("Writing with heads", RATE),
}


def figure(name: str) -> Figure:
    """What is known of a figure; one that is not known is shown by its own name."""
    if name in KNOWN:
        return KNOWN[name]
    if match := SPEED.fullmatch(name):
        title, ladder = SPEED_TITLES[match[1]]
        decimals = None if ladder is RATE else 2
        where = f"{title}, batch {match[2]}"
        return Figure(name, "overhead", where, ladder, "higher", decimals)
    match = LATENCY.fullmatch(name)
    if match is None:
        return Figure(name, "accuracy", name.replace("_", " ").capitalize(), PLAIN, None)
    phase = "Prefill" if match[1] == "prefill" else "Per token"
    where = f"batch {match[3]}" + (f", {match[4]} tokens" if match[4] else "")
    where += ", merged" if match[5] else ""
    if match[2] == "ratio":
        return Figure(name, "overhead", f"{phase}, {where}", OF_BASE, "lower", 2)
    phase += " p95" if match[2] == "p95_ms" else ""
    return Figure(name, "overhead", f"{phase}, {where}", MS, "lower")


def page_order(name: str) -> tuple[int, int, int, int, str]:
    """Sorts figure names as the table shows them."""
    match = LATENCY.fullmatch(name)
    batch = int(match[3]) if match else 0
    length = int(match[4] or 0) if match else 0  # the recipe's first length has no number
    criterion = list(CRITERIA).index(figure(name).criterion)
    return criterion, ORDER.get(name, len(ORDER)), length, batch, name


@dataclass(frozen=True)
class Scale:
    """How the values of one row are written: divided by `factor`, with `decimals`."""

    factor: float
    unit: str
    decimals: int

    def text(self, value: float) -> str:
        if not math.isfinite(value):
            return "not finite"
        if value == 0:
            return "0"
        rounded = f"{value / self.factor:,.{self.decimals}f}"
        return rounded.replace("-", "−") if float(rounded.replace(",", "")) else rounded.strip("-")


def scale(figure: Figure, values: Sequence[float]) -> Scale:
    """One unit and one precision for all values of a row, so that they compare at a glance."""
    sizes = [abs(value) for value in values if math.isfinite(value) and value != 0]
    largest, smallest = (max(sizes), min(sizes)) if sizes else (1.0, 1.0)
    fitting = [step for step in figure.ladder if largest >= step[0]]
    factor, unit = fitting[0] if fitting else figure.ladder[-1]
    if figure.decimals is not None:
        return Scale(factor, unit, figure.decimals)
    # Three digits of the largest value and two of the smallest, but never more than six in all.
    before = _exponent(largest / factor) + 1
    wanted = max(3 - before, 1 - _exponent(smallest / factor), 0)
    return Scale(factor, unit, min(wanted, max(6 - before, 0)))


def in_words(name: str, value: float, interval: Interval | None = None) -> str:
    """A figure with its unit, e.g. `92.6 % (95 % interval 91.6 to 93.5)`."""
    written = scale(figure(name), [value])
    words = written.text(value) + (f"\u00a0{written.unit}" if written.unit else "")
    if interval is None:
        return words
    low, high = written.text(interval.low), written.text(interval.high)
    return f"{words} (95\u00a0% interval {low} to {high})"


def _exponent(value: float) -> int:
    return math.floor(math.log10(value))
