"""IA3: keys and values, and what the feed-forward's last layer reads, times learned vectors.

Liu et al. 2022, arXiv:2205.05638. The vectors start at one, so that training starts from the
base exactly. A scaled output trains as many weights as it has, a scaled input likewise; for
classification the head learns too.
"""

from __future__ import annotations

import re

from peft import IA3Config
from torch import nn
from transformers import PreTrainedModel

from schemas.candidates import Ia3
from schemas.errors import UserError
from tasks.methods.method import Method, head_parameters, task_settings
from tasks.methods.targets import adaptable, linear_targets

PLACE = "candidates[method=ia3]"

#: By kind of base: how the full names of keys and values end, and of the feed-forward's last
#: layer. Not PEFT's table: it has queries for keys on Qwen and Gemma, and for BERT the output of
#: attention beside the feed-forward's.
GATED = (r"[kv]_proj", r"down_proj")
PLAIN = (r"[kv]_proj", r"fc2")
T5 = (r"(Self|EncDec)Attention\.[kv]", r"wo")
BERT = (r"attention\.self\.(key|value)", r"layer\.\d+\.output\.dense")
KINDS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2"), GATED),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), GATED),
    **dict.fromkeys(("opt", "phi", "bart"), PLAIN),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), BERT),
    **dict.fromkeys(("t5", "mt5", "umt5"), T5),
    **dict.fromkeys(("vit", "deit", "beit", "dinov2", "dinov2_with_registers"), PLAIN),
    "distilbert": (r"[kv]_lin", r"ffn\.lin2"),
}


def config(model: PreTrainedModel, candidate: Ia3, task: str) -> IA3Config:
    """What PEFT is told.

    Raises:
        UserError: a base whose usual modules are not known, or a name that matches none.
    """
    outputs, inputs = scaled(model, candidate)
    return IA3Config(
        **task_settings(model, task),
        target_modules=sorted({**outputs, **inputs}),
        feedforward_modules=sorted(inputs),
    )


def trainable_parameters(model: PreTrainedModel, candidate: Ia3, task: str) -> int:
    """The width of every output and input that is scaled, and the head."""
    outputs, inputs = scaled(model, candidate)
    vectors = sum(layer.out_features for layer in outputs.values())
    vectors += sum(layer.in_features for layer in inputs.values())
    return vectors + head_parameters(model, task)


def scaled(
    model: PreTrainedModel, candidate: Ia3
) -> tuple[dict[str, nn.Linear], dict[str, nn.Linear]]:
    """The layers whose outputs, and those whose inputs are scaled, by full name."""
    targets, inside = candidate.target_modules, candidate.feedforward_modules
    if targets is None or inside is None:
        return usual(model)
    inputs = linear_targets(model, inside) if inside else {}
    outputs = linear_targets(model, [name for name in targets if name not in inside])
    return outputs, inputs


def usual(model: PreTrainedModel) -> tuple[dict[str, nn.Linear], dict[str, nn.Linear]]:
    """Keys and values, and the feed-forward's last layer, where the kind of base is known."""
    kind, layers = model.config.model_type, adaptable(model)
    outputs, inputs = (
        {name: layer for name, layer in layers.items() if re.search(rf"(^|\.){ending}$", name)}
        for ending in KINDS.get(kind, ("(?!)", "(?!)"))
    )
    if not outputs or not inputs:
        raise UserError.at(
            f"{PLACE}.target_modules",
            f"not given, and where keys, values and feed-forward of a {kind} base are is not known",
            "name those linear layers, and in feedforward_modules the last of the feed-forward",
        )
    return outputs, inputs


METHOD = Method(
    name="ia3",
    paper="arXiv:2205.05638",
    family="additive",
    merges=True,
    trained_base=False,
    format="peft-adapter",
    config=config,
    trainable_parameters=trainable_parameters,
    # A vector of ones says nothing; one that decays to zero silences what it scales.
    decays=lambda name: ".ia3_l" not in name,
)
