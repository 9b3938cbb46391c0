"""Prompt tuning: the embeddings of V virtual tokens in front of every row are learned.

Lester et al. 2021, arXiv:2104.08691. It trains V * d weights, d the width of an embedding; for
classification the head learns too. They start from embeddings of tokens that are drawn from the
vocabulary: N(0, 1), PEFT's default, is far from what a base has ever read.
"""

from __future__ import annotations

from peft import PromptLearningConfig, PromptTuningConfig, PromptTuningInit
from transformers import PreTrainedModel

from schemas.candidates import PromptTuning
from tasks.methods import soft
from tasks.methods.method import Method, head_parameters

STARTS = {"vocabulary": PromptTuningInit.SAMPLE_VOCAB, "random": PromptTuningInit.RANDOM}


def config(model: PreTrainedModel, candidate: PromptTuning, task: str) -> PromptLearningConfig:
    """What PEFT is told.

    Raises:
        UserError: a base whose layers do not see all virtual tokens.
    """
    return soft.config(
        model,
        candidate,
        task,
        PromptTuningConfig,
        token_dim=soft.embedding_width(model),
        prompt_tuning_init=STARTS[candidate.init],
    )


def trainable_parameters(model: PreTrainedModel, candidate: PromptTuning, task: str) -> int:
    """V * d, and the head."""
    own = candidate.virtual_tokens * soft.embedding_width(model)
    return own + head_parameters(model, task)


METHOD = Method(
    name="prompt_tuning",
    paper="arXiv:2104.08691",
    family="additive",
    merges=False,
    tasks=("causal-lm", "seq2seq", "sequence-classification"),
    trained_base=False,
    format="peft-adapter",
    config=config,
    trainable_parameters=trainable_parameters,
    # Zero is no neutral embedding.
    decays=lambda name: "prompt_encoder." not in name,
    course=soft.SoftCourse,
)
