"""Which tensor of a checkpoint becomes which weight of the transformers model.

A checkpoint may lack the model's prefix (`encoder.layer.0…` for `bert.encoder.layer.0…`), carry
older names, or store one weight that two modules share. Adapters speak the model's names. The
model is built on the meta device, without weights, and asked; the renaming is the one that
`from_pretrained` applies.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from tasks.core.models import MODEL_CLASSES

#: Whether a weight is stored [out, in], as LoRA's B A is, or [in, out].
Layout = Literal["out_in", "in_out"]

LAYOUTS: dict[type[torch.nn.Module], Layout] = {
    torch.nn.Linear: "out_in",
    Conv1D: "in_out",
    torch.nn.Embedding: "in_out",
}


@dataclass(frozen=True)
class Sources:
    """Where the weights of a model are stored.

    unchanged: model tensor name: name of the stored tensor that is loaded as it is.
    converted: stored tensors that transformers splits, stacks or permutes on loading; an update
    in the model's terms cannot be folded into them.
    """

    unchanged: dict[str, str]
    converted: list[str]


@dataclass(frozen=True)
class Skeleton:
    """The model without its weights.

    layouts: module name: how its weight is stored, for the modules that LoRA can be folded into.
    shapes: name of each persistent tensor: its shape.
    tied: groups of names that are one parameter.
    """

    model: PreTrainedModel
    layouts: dict[str, Layout]
    shapes: dict[str, tuple[int, ...]]
    tied: list[set[str]]

    @classmethod
    def build(cls, config: dict[str, Any], task: str) -> Skeleton:
        """The model of a config.json (as a dictionary) for a task, on the meta device."""
        settings = dict(config)
        kind = settings.pop("model_type")
        with torch.device("meta"):
            model = MODEL_CLASSES[task].from_config(AutoConfig.for_model(kind, **settings))
        layouts = {
            name: layout
            for name, module in model.named_modules()
            for module_type, layout in LAYOUTS.items()
            if isinstance(module, module_type)
        }
        tensors = model.state_dict(keep_vars=True)
        groups: dict[int, set[str]] = {}
        for name, tensor in tensors.items():
            groups.setdefault(id(tensor), set()).add(name)
        return cls(
            model=model,
            layouts=layouts,
            shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
            tied=[group for group in groups.values() if len(group) > 1],
        )

    def sources(self, stored: Iterable[str]) -> Sources:
        """Match the names of a checkpoint with those of the model, as `from_pretrained` does."""
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        prefix = self.model.base_model_prefix
        known = self.model.state_dict()
        unchanged: dict[str, str] = {}
        converted: list[str] = []
        for name in sorted(stored):
            target, converter = rename_source_key(name, renamings, converters, prefix, known)
            if target not in known and name in known:
                target, converter = name, None
            if converter is not None:
                converted.append(name)
            elif target in known:
                unchanged[target] = name
        return Sources(unchanged, converted)

    def sharing(self, name: str) -> set[str]:
        """The names that are one parameter with `name`, itself included."""
        return next((group for group in self.tied if name in group), {name})
