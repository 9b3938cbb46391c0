"""Adapters beside a base: in files, and on it.

model/                       one adapter, as PEFT saves it
model/1-lora/, 2-…/          several that learned together, each as PEFT saves it, in the order in
                             which they are put on one base

Each of several wraps the base as the one before has left it: modules of the base itself, so that
the names of one do not depend on what came after. The last one holds the head, if there is one,
and is the model: it has the others as its `parts`. (`tasks/register/served_model.py` has the same
rules, since it imports nothing of ours.)
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.ln_tuning.layer import LNTuningLayer
from torch import nn

from schemas.errors import StageError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
#: The tuner's own file, beside an adapter of a kind that PEFT lacks.
TUNER = "tuner.py"
#: What PEFT calls the adapter that a model is loaded with.
FIRST = "default"


def directories(model_dir: Path) -> list[Path]:
    """Those of an entry's adapters, in order: itself, its parts, or none."""
    if (model_dir / CONFIG).exists():
        return [model_dir]
    return sorted(path.parent for path in model_dir.glob(f"*/{CONFIG}"))


def is_adapter(model_dir: Path) -> bool:
    """Whether an entry holds an adapter, or several, and no whole model."""
    return bool(directories(model_dir))


def new_directories(model_dir: Path, names: Sequence[str]) -> list[Path]:
    """Where the adapters of these methods are to be saved."""
    if len(names) == 1:
        return [model_dir]
    return [model_dir / f"{number}-{name}" for number, name in enumerate(names, start=1)]


def parts_of(model: Any) -> tuple[PeftModel, ...]:
    """The adapters of a model in their order: itself, where it has but one."""
    return (*getattr(model, "earlier_parts", ()), model)


def with_parts(parts: Sequence[PeftModel]) -> nn.Module:
    """The last of several adapters on one base, which knows those before it."""
    *earlier, last = parts
    # A tuple is no module: the base and its layers are counted, moved and saved once.
    last.earlier_parts = tuple(earlier)
    return cast(nn.Module, last)


def wrappable(model: Any) -> Any:
    """The base inside an adapter, with its layers as they are now, for the next adapter.

    PEFT leaves the configurations of the adapter there, and would take the next one for more of it.
    """
    if not isinstance(model, PeftModel):
        return model
    base = model.get_base_model()
    vars(base).pop("peft_config", None)
    return base


def owner(parts: Sequence[PeftModel], name: str) -> PeftModel:
    """The part that a weight belongs to, by what PEFT puts in front of a method's own names; the
    head, whose names are the base's, belongs to the last."""
    for part in parts:
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(part.active_peft_config.peft_type)
        if prefix and any(word.startswith(prefix) for word in name.split(".")):
            return part
    return parts[-1]


def own_name(name: str) -> str:
    """A weight's name as it was before later adapters were put around its module."""
    return re.sub(r"(\.base_layer)+\.", ".", name)


def put_on(base: Any, adapters: Mapping[str, Path]) -> nn.Module:
    """A base with adapters in it, all of the same methods; the first is the active one.

    adapters: what PEFT shall call each, and the entry's `model/` that holds it.

    Raises:
        StageError: tensors are missing.
        ValueError, NotImplementedError: a method of which a base cannot have several.
    """
    names = list(adapters)
    parts: list[PeftModel] = []
    for places in zip(*map(directories, adapters.values()), strict=True):
        register_tuner(places[0])
        base = wrappable(parts[-1] if parts else base)
        with warnings.catch_warnings():
            # PEFT says this in a warning, and goes on with what it drew at random.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            try:
                part = PeftModel.from_pretrained(base, places[0], names[0])
                for name, place in zip(names[1:], places[1:], strict=True):
                    part.load_adapter(str(place), name, torch_device=str(part.device))
            except UserWarning as missing:
                raise StageError(f"{places[0].parent} is not whole: {missing}") from missing
        parts.append(part)
    return as_the_base(with_parts(parts)).eval()


def as_the_base(model: nn.Module) -> nn.Module:
    """Norms and whole layers that were learned in the dtype of those that they stand for. With
    each further adapter PEFT makes float32 of them, which layers in bfloat16 do not take."""
    for module in model.modules():
        if isinstance(module, LNTuningLayer):
            module.ln_tuning_layers.to(next(module.base_layer.parameters()).dtype)
    return model


def activate(model: nn.Module, name: str) -> None:
    """Make an adapter of that name the active one in each part, frozen, as it is served."""
    for part in parts_of(model):
        part.set_adapter(name, inference_mode=True)


def register_tuner(directory: Path) -> None:
    """Make PEFT know the kind of an adapter that brings its own tuner; that file registers itself
    on import. A kind that is known already stays as it is."""
    path = directory / TUNER
    kind = json.loads((directory / CONFIG).read_text())["peft_type"]
    if not path.exists() or kind in PEFT_TYPE_TO_TUNER_MAPPING:
        return
    found: Any = importlib.util.spec_from_file_location(f"peftflow_tuner_{kind.lower()}", path)
    # Before it runs: dataclasses look their module up by name.
    sys.modules[found.name] = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(sys.modules[found.name])
    except Exception as error:
        del sys.modules[found.name]
        raise StageError(
            f"{path} cannot be run with the PEFT that is installed: {error}"
        ) from error
