"""The tasks, as data: what the stages ask of one, so that none of them has a branch for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Task = Literal[
    "causal-lm",
    "seq2seq",
    "sequence-classification",
    "token-classification",
    "image-classification",
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
    encoder_decoder: whether an encoder reads the prompt and a decoder writes the answer, so that
        both are padded, cut and counted apart.
    """

    labels: Literal["row", "token"] | None
    metrics: dict[str, bool]
    reads: Reads = "text"
    encoder_decoder: bool = False


#: Of tasks whose answers are generated.
ANSWERS = {"exact_match": True, "field_f1": True, "perplexity": False, "loss": False}


#: Of one label a row.
CLASS_METRICS = {"accuracy": True, "macro_f1": True, "loss": False}

TASKS: dict[str, TaskKind] = {
    "causal-lm": TaskKind(None, ANSWERS),
    "seq2seq": TaskKind(None, {**ANSWERS, "rouge_l": True}, encoder_decoder=True),
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


def is_encoder_decoder(task: str) -> bool:
    """Whether its rows are a source for an encoder and a target for a decoder."""
    return TASKS[task].encoder_decoder


def is_packable(task: str) -> bool:
    """Whether a row is one sequence that a decoder reads, which can stand behind another."""
    return not is_labelled(task) and not is_encoder_decoder(task)
