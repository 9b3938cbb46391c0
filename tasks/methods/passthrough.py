"""Any other tuner of PEFT's, from its configuration in PEFT's own words.

A recipe gives `peft_type` and the fields of that type's configuration; the task's head and type
are ours to say. PEFT drops fields that it does not know and takes values of any type, so both are
checked here, against the configuration's own annotations. What it trains is as many weights as
PEFT makes on the base's shapes. What the rest of this project needs of a tuner (rows of the
backbone that go through alone, weights of the base that nobody has to read first) some of PEFT's
do not have: they are refused, with what to use instead.
"""

from __future__ import annotations

import copy
import difflib
import json
from typing import Any, get_type_hints

import torch
from peft import PeftConfig, PeftType
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import TypeAdapter, ValidationError
from torch import nn
from transformers import PreTrainedModel

from schemas.candidates import Peft
from schemas.errors import Problem, UserError
from tasks.core.models import MODEL_CLASSES, head_modules
from tasks.methods.method import Method, adapted, task_settings, trained
from tasks.methods.targets import linear_targets

PLACE = "candidates[method=peft].peft"
TARGETS = f"{PLACE}.target_modules"

#: Types that learn in another way than through the loss of rows alone, and what to use.
REFUSED = {
    "ADALORA": ("needs to be told of each step", "use method: adalora"),
    "ADAPTION_PROMPT": ("replaces attention by its own", "use method: prefix_tuning"),
    "CARTRIDGE": ("puts virtual tokens before a row", "use method: prefix_tuning"),
    "CPT": ("puts virtual tokens before a row", "use method: prompt_tuning"),
    "MULTITASK_PROMPT_TUNING": ("puts virtual tokens before a row", "use method: prompt_tuning"),
    "POLY": ("reads the number of a task with each row", "choose another type"),
    "PREFIX_TUNING": ("puts virtual tokens before a row", "use method: prefix_tuning"),
    "PROMPT_TUNING": ("puts virtual tokens before a row", "use method: prompt_tuning"),
    "P_TUNING": ("puts virtual tokens before a row", "use method: p_tuning"),
    "SHADOW": ("carries a second stream through the backbone", "choose another type"),
    "TRAINABLE_TOKENS": (
        "learns embeddings of chosen tokens and no head",
        "use peft_type: LORA with trainable_token_indices",
    ),
    "WAVEFT": (
        "makes shapes from numbers, so that a run cannot be planned",
        "use peft_type: FOURIERFT",
    ),
    "XLORA": ("mixes adapters that were trained before", "choose another type"),
}


def build(model: PreTrainedModel, candidate: Peft, task: str) -> nn.Module:
    """The model wrapped by PEFT, with what is trained in float32 and the rest frozen.

    Raises:
        UserError: a type or a field that PEFT does not know, or with which it cannot build.
    """
    config = settings(model, candidate, task)
    if not next(model.parameters()).is_meta:
        return wrapped(model, config)
    try:
        with torch.device("meta"):
            return wrapped(copy.deepcopy(model), copy.deepcopy(config))
    except UserError:
        # Some look at what they draw, which only a device with values has.
        with torch.device("cpu"):
            return wrapped(model, config).to("meta")


def trainable_parameters(model: PreTrainedModel, candidate: Peft, task: str) -> int:
    """As many weights as PEFT trains on the same shapes."""
    with torch.device("meta"):
        shapes = MODEL_CLASSES[task].from_config(copy.deepcopy(model.config))
    return sum(weight.numel() for weight in trained(build(shapes, candidate, task)).values())


def wrapped(model: PreTrainedModel, config: PeftConfig) -> nn.Module:
    """The model with its tuner. Raises a UserError, whatever it is that PEFT raises."""
    name = PeftType(config.peft_type).value
    try:
        return adapted(model, config, PLACE)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Its tuners check their fields where they use them, each with exceptions of its own.
        found = first_line(error)
        if getattr(config, "target_modules", None) is None and "target_modules" in found:
            kinds = ", ".join(sorted(module_names(model)))
            raise UserError.at(
                TARGETS,
                f"not given, and PEFT has none for {name} on a {model.config.model_type} base",
                f"write `target_modules: all-linear`, or choose from {kinds}",
            ) from error
        if isinstance(error, NotImplementedError) and "meta" in found:
            raise UserError.at(
                f"{PLACE}.peft_type",
                f"{name} makes its weights from the base's, so they cannot be counted on shapes",
                "choose another type",
            ) from error
        raise UserError.at(
            PLACE, f"PEFT cannot build {name}: {found}", "change its fields, or choose another type"
        ) from error


def settings(model: PreTrainedModel, candidate: Peft, task: str) -> PeftConfig:
    """PEFT's configuration of a candidate. Raises a UserError with all that is wrong in it."""
    kind = config_class(candidate.peft_type)
    fields: dict[str, Any] = {k: value for k, value in candidate.peft.items() if k != "peft_type"}
    hints = {key: hint for key, hint in get_type_hints(kind).items() if key not in candidate.OURS}
    problems = [
        problem
        for key, value in fields.items()
        if (problem := field_problem(kind, hints, key, value)) is not None
    ]
    if not problems and "target_modules" in fields:
        problems += target_problems(model, fields)
    if problems:
        raise UserError(problems)
    if fields.get("target_modules") == "all-linear":
        fields["target_modules"] = sorted(linear_targets(model, "all-linear"))
    try:
        config: PeftConfig = kind(**task_settings(model, task), **fields)
    except Exception as error:
        # As above: each type checks its own.
        raise UserError.at(
            PLACE,
            f"PEFT refuses these fields of {candidate.peft_type}: {first_line(error)}",
            "change them",
        ) from error
    return config


def config_class(name: str) -> type[PeftConfig]:
    """The configuration of a type. Raises a UserError for one that is unknown or refused."""
    place = f"{PLACE}.peft_type"
    known = {kind.value: PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) for kind in PeftType}
    usable: dict[str, type[PeftConfig]] = {
        one: kind
        for one, kind in known.items()
        if kind is not None and one not in REFUSED and not issubclass(kind, PromptLearningConfig)
    }
    if name in usable:
        return usable[name]
    if name in REFUSED:
        why, fix = REFUSED[name]
        raise UserError.at(place, f"{name} cannot be passed through: it {why}", fix)
    fix = f"{nearest(name.upper(), list(usable))}choose from {', '.join(sorted(usable))}"
    raise UserError.at(place, f"PEFT has no type {name} that trains inside layers", fix)


def field_problem(
    kind: type[PeftConfig], hints: dict[str, Any], key: str, value: Any
) -> Problem | None:
    """What is wrong with one field, or None."""
    if key not in hints:
        allowed = ", ".join(sorted(hints))
        fix = f"{nearest(key, list(hints))}choose from {allowed}"
        return Problem(f"{PLACE}.{key}", f"{kind.__name__} has no such field", fix)
    try:
        # From JSON, strictly: "8" is no number, and a list will do for a tuple.
        TypeAdapter(hints[key]).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        wanted = "; ".join(dict.fromkeys(one["msg"] for one in error.errors()))
        return Problem(f"{PLACE}.{key}", f"found {value!r}", wanted[:1].lower() + wanted[1:])
    return None


def target_problems(model: PreTrainedModel, fields: dict[str, Any]) -> list[Problem]:
    """Names that match nothing, which PEFT passes over where another name matches something."""
    wanted = fields["target_modules"]
    if wanted == "all-linear" and fields.get("layers_to_transform") is not None:
        found = "all-linear, of which PEFT takes every layer whatever layers_to_transform says"
        return [Problem(TARGETS, found, "name the layers, e.g. [q_proj, v_proj]")]
    if not isinstance(wanted, list):
        return []
    names = module_names(model)
    fulls = [full for group in names.values() for full in group]
    problems = []
    for name in wanted or ["an empty list"]:
        if not any(f".{full}".endswith(f".{name}") for full in fulls):
            fix = f"{nearest(name, list(names))}choose from {', '.join(sorted(names))}"
            problems.append(
                Problem(TARGETS, f"{name} matches no module of this base", f"{fix}, or all-linear")
            )
    return problems


def module_names(model: PreTrainedModel) -> dict[str, list[str]]:
    """The modules with weights of their own, outside of heads: full names by their last part."""
    output = model.get_output_embeddings()
    heads = {id(part) for head in head_modules(model).values() for part in head.modules()}
    found: dict[str, list[str]] = {}
    for full, module in model.named_modules():
        own = any(True for _ in module.parameters(recurse=False))
        if own and module is not output and id(module) not in heads:
            found.setdefault(full.rsplit(".", 1)[-1], []).append(full)
    return found


def nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}? " if near else ""


def first_line(error: Exception) -> str:
    """What an error says in short, with its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


METHOD = Method(
    name="peft",
    paper="https://huggingface.co/docs/peft",
    family="of its type",
    merges=False,
    trained_base=False,
    format="peft-adapter",
    builder=build,
    trainable_parameters=trainable_parameters,
    # As for `ia3`: a vector that decays to zero silences what it scales.
    decays=lambda name: ".ia3_l" not in name,
)
