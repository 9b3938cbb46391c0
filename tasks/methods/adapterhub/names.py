"""Where the tensors of an adapter are: PEFT's names, AdapterHub's, and the way between."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from schemas.errors import UserError
from tasks.methods.tuners.bottleneck import BottleneckConfig, bottleneck_width

Weights = dict[str, torch.Tensor]

TENSORS = ("weight", "bias")


class Place(NamedTuple):
    """The end of the name of the module with the adapter in it; `#` is the block's number."""

    ours: str
    theirs: str


class Family(NamedTuple):
    """Where the adapters of a kind of model are. The last two are empty in pre-norm blocks, where
    theirs read the residual: ours reads what the feed-forward reads, or what it writes."""

    attention: tuple[Place, ...]
    feed_forward: tuple[Place, ...]
    parallel: tuple[Place, ...] = ()
    normed: tuple[Place, ...] = ()


class Names(NamedTuple):
    """One side's words: the places of an adapter, and its two layers."""

    places: list[str]
    down: str
    up: str


BERT = Family(
    (Place("layer.#.attention.output.dense", "layer.#.attention.output"),),
    (Place("layer.#.output.dense", "layer.#.output"),),
    (Place("layer.#.output", "layer.#.output"),),
    (Place("layer.#.output.LayerNorm", "layer.#.output"),),
)
LLAMA = Family(
    (Place("layers.#.self_attn.o_proj", "layers.#.attention_adapters"),),
    (Place("layers.#.mlp", "layers.#.output_adapters"),),
)
GPT2 = Family(
    (Place("h.#.attn.c_proj", "h.#.attention_adapters"),),
    (Place("h.#.mlp", "h.#.output_adapters"),),
)
T5 = Family(
    (
        Place("encoder.block.#.layer.0.SelfAttention.o", "encoder.block.#.layer.0"),
        Place("decoder.block.#.layer.0.SelfAttention.o", "decoder.block.#.layer.0"),
    ),
    (
        Place("encoder.block.#.layer.1.DenseReluDense", "encoder.block.#.layer.1"),
        Place("decoder.block.#.layer.2.DenseReluDense", "decoder.block.#.layer.2"),
    ),
)
#: By `model_type`: the family, and how the names of its classes begin.
MODELS = {
    "bert": (BERT, "Bert"),
    "roberta": (BERT, "Roberta"),
    "xlm-roberta": (BERT, "XLMRoberta"),
    "electra": (BERT, "Electra"),
    "llama": (LLAMA, "Llama"),
    "mistral": (LLAMA, "Mistral"),
    "gpt2": (GPT2, "GPT2"),
    "t5": (T5, "T5"),
}


def family_of(model_type: Any, place: object) -> Family:
    """Raises a UserError for a model whose names are not known."""
    if model_type not in MODELS:
        raise UserError.at(
            place,
            f"model_type {model_type!r}, whose names of modules are not known here",
            f"choose from {', '.join(MODELS)}",
        )
    return MODELS[model_type][0]


def both_names(family: Family, placement: str) -> tuple[Names, Names]:
    """Ours and theirs, place by place."""
    places = {
        "double_sequential": family.attention + family.feed_forward,
        "sequential": family.feed_forward,
        "sequential_normed": family.normed,
        "parallel": family.parallel,
    }[placement]
    ours = Names([place.ours for place in places], "bottleneck_down", "bottleneck_up")
    theirs = Names([place.theirs for place in places], "adapter_down.0", "adapter_up")
    return ours, theirs


def by_module(weights: Weights, names: Names, place: Path) -> dict[str, Weights]:
    """The tensors of each adapter, by the module that it is in and its layer."""
    layers = "|".join(map(re.escape, (names.down, names.up)))
    modules: dict[str, Weights] = {}
    for key, tensor in weights.items():
        match = re.fullmatch(rf"(.+)\.((?:{layers})\.(?:{'|'.join(TENSORS)}))", key)
        if match is None:
            raise UserError.at(place, f"{key}: no part of a bottleneck adapter", "one without it")
        modules.setdefault(match[1], {})[match[2]] = tensor
    return modules


def check(modules: dict[str, Weights], names: Names, config: BottleneckConfig, place: Path) -> int:
    """The model's width, if every module is known, every block has its adapters, and each adapter
    its four tensors in the shapes that the configuration says.

    Neither PEFT nor `adapters` refuses an adapter with a part missing: it would start there anew.
    """
    numbers: dict[int, set[int]] = {}
    width = 0
    for module, tensors in modules.items():
        located = _located(module, names)
        if located is None:
            raise UserError.at(
                place, f"an adapter in {module}", f"places are {', '.join(names.places)}"
            )
        _, which, number = located
        numbers.setdefault(which, set()).add(number)
        width = _check_shapes(module, tensors, names, config, place)
    gaps = any(found != set(range(len(found))) for found in numbers.values())
    if len(numbers) < len(names.places) or gaps:
        raise UserError.at(place, "not every block has its adapters", "a whole adapter")
    return width


def moved(module: str, old: Names, new: Names) -> str:
    """The name on the other side, of a module that `check` has seen."""
    located = _located(module, old)
    assert located is not None, f"{module} is not one of {old.places}"
    before, which, number = located
    return before + new.places[which].replace("#", str(number))


def renamed(modules: dict[str, Weights], old: Names, new: Names, between: str = "") -> Weights:
    """The tensors by the other side's names, with `between` after the module's."""
    layers = ((old.down, new.down), (old.up, new.up))
    return {
        f"{moved(module, old, new)}{between}.{there}.{kind}": tensors[f"{here}.{kind}"]
        for module, tensors in modules.items()
        for here, there in layers
        for kind in TENSORS
    }


def _located(module: str, names: Names) -> tuple[str, int, int] | None:
    """What stands before the place in a module's name, which place it is, the block's number."""
    for which, place in enumerate(names.places):
        pattern = r"(\d+)".join(map(re.escape, place.split("#")))
        match = re.fullmatch(rf"(.*\.)?{pattern}", module)
        if match:
            return match[1] or "", which, int(match[2])
    return None


def _check_shapes(
    module: str, tensors: Weights, names: Names, config: BottleneckConfig, place: Path
) -> int:
    wanted = {f"{layer}.{kind}" for layer in (names.down, names.up) for kind in TENSORS}
    if missing := wanted - set(tensors):
        raise UserError.at(place, f"{module} has no {min(missing)}", "a whole adapter")
    width = tensors[f"{names.up}.bias"].numel()
    narrow = bottleneck_width(width, config.reduction_factor)
    shapes = {
        f"{names.down}.weight": (narrow, width),
        f"{names.down}.bias": (narrow,),
        f"{names.up}.weight": (width, narrow),
        f"{names.up}.bias": (width,),
    }
    for key, shape in shapes.items():
        if tuple(tensors[key].shape) != shape:
            raise UserError.at(
                place,
                f"{module}.{key} has the shape {tuple(tensors[key].shape)}",
                f"{shape}, by reduction_factor {config.reduction_factor}",
            )
    return width
