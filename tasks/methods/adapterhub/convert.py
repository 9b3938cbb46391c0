"""The directory of an adapter read, converted, and written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from peft import PeftConfig, TaskType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from schemas.errors import UserError
from tasks.core.adapters import TUNER
from tasks.core.files import write_atomic
from tasks.core.models import HEADS
from tasks.methods.adapterhub.config import check_ours, our_config, their_config
from tasks.methods.adapterhub.names import (
    MODELS,
    Weights,
    both_names,
    by_module,
    check,
    family_of,
    renamed,
)
from tasks.methods.tuners import bottleneck

CONFIG = "adapter_config.json"
OURS, OURS_PICKLE = "adapter_model.safetensors", "adapter_model.bin"
THEIRS, THEIRS_PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
HEAD, HEAD_PICKLE = "model_head.safetensors", "pytorch_model_head.bin"
HEAD_CONFIG = "head_config.json"
#: Whose format it is. Without a version their loader takes "gelu" for "gelu_new".
VERSION = "adapters.1.3.0"
PREFIX = "base_model.model."


def from_adapterhub(source: Path, target: Path) -> None:
    """Write the PEFT adapter that computes what AdapterHub's in `source` does.

    Raises:
        UserError: a pickle, or what has no counterpart here, every field of it.
    """
    place = source / CONFIG
    facts = _json(place)
    if missing := {"name", "version"} - set(facts):
        raise UserError.at(place, f"no {min(missing)}", "save it again with adapters 1.3.0")
    family = family_of(facts.get("model_type"), place)
    config = our_config(facts, family, place)
    ours, theirs = both_names(family, config.placement)
    weights = _weights(source, THEIRS, THEIRS_PICKLE)
    # Their own name of the adapter; PEFT's files have none.
    plain = {key.replace(f".adapters.{facts['name']}.", "."): w for key, w in weights.items()}
    modules = by_module(plain, theirs, source / THEIRS)
    check(modules, theirs, config, source / THEIRS)
    out = renamed(modules, theirs, ours)
    if head := _their_head(source):
        config.task_type = TaskType.SEQ_CLS
        config.modules_to_save = sorted({_head_of(key, source / HEAD) for key in head})
        out |= head
    _start(target)
    out = {PREFIX + key: tensor for key, tensor in out.items()}
    save_file(out, target / OURS, metadata={"format": "pt"})
    shutil.copyfile(bottleneck.__file__, target / TUNER)
    config.save_pretrained(str(target))


def to_adapterhub(source: Path, target: Path, model_type: str, name: str = "default") -> None:
    """Write the AdapterHub adapter that computes what PEFT's in `source` does.

    model_type: of the base's config.json; PEFT's files do not say it.
    name: the adapter's, by which `set_active_adapters` will know it.

    Raises:
        UserError: a pickle, another kind of adapter, or what has no counterpart there.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError.at("name", f"{name!r}", "choose letters, digits, _ and -")
    family = family_of(model_type, "model_type")
    kind = _json(source / CONFIG).get("peft_type")
    if kind != bottleneck.PEFT_TYPE:
        raise UserError.at(source / CONFIG, f"peft_type {kind!r}", "a bottleneck adapter")
    config = PeftConfig.from_pretrained(str(source))
    check_ours(config, model_type, family, source / CONFIG)
    ours, theirs = both_names(family, config.placement)
    weights = _weights(source, OURS, OURS_PICKLE)
    plain = {key.removeprefix(PREFIX): tensor for key, tensor in weights.items()}
    head = {key: tensor for key, tensor in plain.items() if bottleneck.PREFIX not in key}
    for key in head:
        _head_of(key, source / OURS)
    modules = by_module(
        {key: tensor for key, tensor in plain.items() if key not in head}, ours, source / OURS
    )
    width = check(modules, ours, config, source / OURS)
    facts = {"model_type": model_type, "hidden_size": width, "version": VERSION}
    _start(target)
    save_file(renamed(modules, ours, theirs, f".adapters.{name}"), target / THEIRS)
    if head:
        save_file(head, target / HEAD)
        # Their loader passes over a head whose class is not the model's.
        model_class = f"{MODELS[model_type][1]}ForSequenceClassification"
        of_head = {"config": None, "name": None, "model_class": model_class}
        _write(target / HEAD_CONFIG, facts | of_head)
    _write(target / CONFIG, facts | {"name": name, "config": their_config(config)})


def _their_head(source: Path) -> Weights:
    """A static classification head beside their adapter, by the base's names; or nothing."""
    if not (source / HEAD).exists() and not (source / HEAD_PICKLE).exists():
        return {}
    if _json(source / HEAD_CONFIG).get("config") is not None:
        raise UserError.at(
            source / HEAD_CONFIG,
            "a flexible head, which is no part of a transformers model",
            "save_adapter(..., with_head=False), and train a head here",
        )
    return _weights(source, HEAD, HEAD_PICKLE)


def _head_of(key: str, place: Path) -> str:
    """The classification head that a tensor belongs to."""
    for part in key.split(".")[:-1]:
        if part in HEADS:
            return part
    raise UserError.at(
        place,
        f"{key}: no part of an adapter or of a classification head",
        "an adapter saved without it (AdapterHub: save_adapter(..., with_head=False))",
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError.at(path, f"cannot be read ({error})", "an adapter's directory") from error
    if not isinstance(facts, dict):
        raise UserError.at(path, "no JSON object", "an adapter's directory")
    return facts


def _weights(source: Path, name: str, pickled: str) -> Weights:
    """The tensors of a safetensors file. A pickle runs code when it is read, so none is."""
    if not (source / name).exists() and (source / pickled).exists():
        raise UserError.at(
            source / pickled,
            "pickled weights, which run code when they are loaded; refused",
            "load it where it was made and save it again: AdapterHub's save_adapter(..., "
            "use_safetensors=True), PEFT's save_pretrained",
        )
    try:
        weights: Weights = load_file(source / name)
    except (OSError, SafetensorError) as error:
        fix = f"an adapter's directory with {name}"
        raise UserError.at(source / name, f"cannot be read ({error})", fix) from error
    return weights


def _start(target: Path) -> None:
    if target.exists() and any(target.iterdir()):
        raise UserError.at(target, "holds files already", "name a new directory")
    target.mkdir(parents=True, exist_ok=True)


def _write(path: Path, facts: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(facts, indent=2, sort_keys=True) + "\n")
