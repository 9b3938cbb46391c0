"""P-tuning: the embeddings of V virtual tokens are written by a small network that is learned.

Liu et al. 2021, arXiv:2103.10385, with all virtual tokens in front, as PEFT has it. With d the
width of an embedding and h that of the network, it trains V * d weights of the network's own
embeddings and

    mlp   three linear layers, d to h to h to d
    lstm  two bidirectional layers, d to 2h to 2h, and two linear ones, 2h to 2h to d

Only the V * d embeddings that come out are kept. For classification the head learns too.
"""

from __future__ import annotations

from peft import PromptEncoderConfig, PromptEncoderReparameterizationType, PromptLearningConfig
from transformers import PreTrainedModel

from schemas.candidates import PTuning
from tasks.methods import soft
from tasks.methods.method import Method, head_parameters

ENCODERS = {
    "mlp": PromptEncoderReparameterizationType.MLP,
    "lstm": PromptEncoderReparameterizationType.LSTM,
}


def config(model: PreTrainedModel, candidate: PTuning, task: str) -> PromptLearningConfig:
    """What PEFT is told.

    Raises:
        UserError: a base whose layers do not see all virtual tokens.
    """
    width = soft.embedding_width(model)
    return soft.config(
        model,
        candidate,
        task,
        PromptEncoderConfig,
        token_dim=width,
        encoder_reparameterization_type=ENCODERS[candidate.encoder],
        encoder_hidden_size=candidate.hidden_size or width,
    )


def trainable_parameters(model: PreTrainedModel, candidate: PTuning, task: str) -> int:
    """V * d and the network, and the head."""
    d = soft.embedding_width(model)
    h = candidate.hidden_size or d
    if candidate.encoder == "mlp":
        network = linear(d, h) + linear(h, h) + linear(h, d)
    else:
        network = lstm(d, h) + lstm(2 * h, h) + linear(2 * h, 2 * h) + linear(2 * h, d)
    return candidate.virtual_tokens * d + network + head_parameters(model, task)


def shipped_parameters(model: PreTrainedModel, candidate: PTuning, task: str) -> int:
    """V * d, and the head."""
    own = candidate.virtual_tokens * soft.embedding_width(model)
    return own + head_parameters(model, task)


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def lstm(inputs: int, width: int) -> int:
    """One bidirectional layer: in each direction four gates, each with two biases, as torch."""
    return 2 * 4 * (inputs * width + width * width + 2 * width)


METHOD = Method(
    name="p_tuning",
    paper="arXiv:2103.10385",
    family="additive",
    merges=False,
    tasks=("causal-lm", "seq2seq", "sequence-classification"),
    trained_base=False,
    format="peft-adapter",
    config=config,
    trainable_parameters=trainable_parameters,
    decays=lambda name: "prompt_encoder." not in name,
    course=soft.SoftCourse,
    ships=shipped_parameters,
)
