"""An adapter as PEFT saves it: what it makes of which weight, and what cannot be folded."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from schemas.errors import StageError
from tasks.core.progress import warn
from tasks.merge.checkpoint import FORMAT_NAMES
from tasks.methods.method import TASK_TYPES

PREFIX = "base_model.model."

#: Fields of adapter_config.json that folding reads, or that no longer matter after training.
#: Any other field with a value may change what the adapter computes, and is refused.
UNDERSTOOD = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "feedforward_modules",
    "inference_mode",
    "init_ia3_weights",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}

#: Where PEFT keeps DoRA's lengths.
LENGTHS = ".lora_magnitude_vector"

#: Kinds of adapter that fold into the base's weights.
FOLDED = ("LORA", "IA3", "LN_TUNING", "BITFIT")

#: Initialisations that leave the base's weights alone. PiSSA, CorDA, OLoRA and LoftQ do not.
PLAIN_INITS = (True, False, "gaussian", "eva")


@dataclass(frozen=True)
class LowRank:
    """The update of one module, scaling * B A; for embeddings A and B as PEFT names them.

    lengths_O: of DoRA, the length that each row of the sum has, whatever B A made of it.
    """

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scaling: float
    lengths_O: torch.Tensor | None = None


@dataclass(frozen=True)
class Adapter:
    """What an adapter adds to its base.

    updates: module name in the transformers model: its low-rank update.
    scales: module name: what its outputs [O, 1] or its inputs [1, I] are multiplied with (IA3).
    whole: tensor name in the transformers model: a trained tensor that replaces or joins the
    base's (a classification head, biases).
    task: as in a recipe.
    """

    updates: dict[str, LowRank]
    scales: dict[str, torch.Tensor]
    whole: dict[str, torch.Tensor]
    task: str


def read_adapter(directory: Path) -> Adapter:
    """Read a PEFT adapter directory.

    Raises:
        StageError: the adapter does something that W + scaling * B A does not say.
    """
    config = json.loads((directory / "adapter_config.json").read_text())
    refuse_unknown(config, directory)
    tensors = load_file(directory / "adapter_model.safetensors")
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    scales: dict[str, torch.Tensor] = {}
    lengths: dict[str, torch.Tensor] = {}
    whole: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise StageError(f"{directory}: {key} does not start with {PREFIX}; cannot be folded")
        name = key.removeprefix(PREFIX)
        module, side = split_lora_key(name)
        if name.endswith(LENGTHS):
            lengths[name.removesuffix(LENGTHS)] = tensor.float().flatten()
            continue
        if side is not None:
            pairs.setdefault(module, {})[side] = tensor
        elif name.endswith(".ia3_l"):
            scales[name.removesuffix(".ia3_l")] = tensor.float()
        elif "lora_" in name or "token_adapter" in name:
            raise StageError(
                f"{directory}: cannot fold {name} exactly; set `finish: {{merge: false}}`"
            )
        elif tensor.dtype not in FORMAT_NAMES:
            raise StageError(f"{directory}: {name} is {tensor.dtype}, not a weight")
        else:
            whole[own_name(name)] = tensor
    updates = {
        module: LowRank(
            pair["A"].float(),
            pair["B"].float(),
            scaling(module, config, pair["A"]),
            lengths.get(module),
        )
        for module, pair in pairs.items()
    }
    broken = sorted(key for key, tensor in tensors.items() if not tensor.isfinite().all())
    if broken:
        raise StageError(f"{directory}: {broken[0]} holds NaN or infinity: the training diverged")
    if updates and not any(update.b_OR.any() for update in updates.values()):
        warn(f"{directory}: every B of the adapter is zero: it changes no weight of the base")
    if not updates and not scales and not whole:
        raise StageError(f"{directory}: the adapter is empty; merging it would change nothing")
    return Adapter(updates, scales, whole, task_of(config, directory))


def own_name(name: str) -> str:
    """A trained copy of a weight (norms, biases, heads) under the name that the model has."""
    for inside in (".base_layer.", ".ln_tuning_layers."):
        name = name.replace(inside, ".")
    return name.removesuffix(".bitfit_bias") + ".bias" if name.endswith(".bitfit_bias") else name


def split_lora_key(name: str) -> tuple[str, str | None]:
    """`x.q_proj.lora_A.weight` -> (`x.q_proj`, `A`); (name, None) for any other tensor."""
    for ending in (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B"):
        if name.endswith(ending):
            return name.removesuffix(ending), "A" if "A" in ending else "B"
    return name, None


def scaling(module: str, config: dict[str, Any], a_RI: torch.Tensor) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv:2312.03732); the rank is A's own."""
    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), module), config["lora_alpha"])
    rank = a_RI.shape[0]
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def refuse_unknown(config: dict[str, Any], directory: Path) -> None:
    found = [f"{key}={value!r}" for key, value in config.items() if value and key not in UNDERSTOOD]
    if config["peft_type"] not in FOLDED:
        found.append(f"peft_type={config['peft_type']!r}")
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        found.append(f"init_lora_weights={config['init_lora_weights']!r}")
    if found:
        raise StageError(
            f"{directory}: cannot fold {', '.join(found)} exactly; "
            "set `finish: {merge: false}` to ship the adapter as it is"
        )


def task_of(config: dict[str, Any], directory: Path) -> str:
    tasks = {kind and kind.value: task for task, kind in TASK_TYPES.items()}
    if config.get("task_type") not in tasks:
        raise StageError(
            f"{directory}/adapter_config.json: task_type is {config.get('task_type')!r}, "
            f"not one of {', '.join(map(str, tasks))}: the class of the merged model is unknown"
        )
    return tasks[config["task_type"]]
