"""The tasks, as data: what the stages ask of one, so that none of them has a branch for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Task = Literal[
    "causal-lm", "sequence-classification", "token-classification", "image-classification"
]

#: What a row's input is.
Reads = Literal["text", "image"]


@dataclass(frozen=True)
class TaskKind:
    """What a task is.

    labels: what has a label of its own, and so a head that is new for each task; None: answers
        are generated.
    metrics: the names of its figures, and whether more is better.
    reads: what the input of a row is.
    """

    labels: Literal["row", "token"] | None
    metrics: dict[str, bool]
    reads: Reads = "text"


#: Of one label a row.
CLASS_METRICS = {"accuracy": True, "macro_f1": True, "loss": False}

TASKS: dict[str, TaskKind] = {
    "causal-lm": TaskKind(
        None, {"exact_match": True, "field_f1": True, "perplexity": False, "loss": False}
    ),
    "sequence-classification": TaskKind("row", CLASS_METRICS),
    "token-classification": TaskKind(
        "token",
        {
            "entity_f1": True,
            "entity_precision": True,
            "entity_recall": True,
            "token_accuracy": True,
            "loss": False,
        },
    ),
    "image-classification": TaskKind("row", CLASS_METRICS, reads="image"),
}


def is_labelled(task: str) -> bool:
    """Whether a task has labels.json and a head of as many outputs."""
    return TASKS[task].labels is not None


def reads_images(task: str) -> bool:
    """Whether rows are images, which a processor makes ready and no tokenizer."""
    return TASKS[task].reads == "image"
