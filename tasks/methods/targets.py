"""Which linear layers of a base a method adapts, from `target_modules` of a recipe."""

from __future__ import annotations

import difflib

from torch import nn

from schemas.errors import Problem, UserError
from tasks.core.models import head_modules


def linear_targets(model: nn.Module, wanted: str | list[str]) -> dict[str, nn.Linear]:
    """The linear layers that `wanted` names, by full name.

    wanted: `all-linear`, every linear layer but the output head; or names that end a layer's
    full name at a dot (`q_proj`, `attention.output.dense`).

    Raises:
        UserError: a name that matches no linear layer, with those of this base.
    """
    layers = adaptable(model)
    if wanted == "all-linear":
        if not layers:
            raise UserError.at(
                "candidates[].target_modules", "this base has no linear layer", "use method: full"
            )
        return layers
    chosen: dict[str, nn.Linear] = {}
    problems = []
    for name in wanted:
        matches = {full: layer for full, layer in layers.items() if f".{full}".endswith(f".{name}")}
        chosen.update(matches)
        if not matches:
            problems.append(_unmatched(name, layers))
    if not wanted:
        problems.append(_unmatched("an empty list", layers))
    if problems:
        raise UserError(problems)
    return chosen


def adaptable(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer but the output head (the language model's, or the classifier)."""
    embedding_head = getattr(model, "get_output_embeddings", lambda: None)()
    heads = {id(part) for head in head_modules(model).values() for part in head.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not embedding_head
        and id(module) not in heads
    }


def _unmatched(name: str, layers: dict[str, nn.Linear]) -> Problem:
    allowed = sorted({full.rsplit(".", 1)[-1] for full in layers})
    nearest = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    if not allowed:
        return Problem(
            "candidates[].target_modules",
            f"{name} matches no linear layer, and this base has none",
            "use method: full",
        )
    return Problem(
        "candidates[].target_modules",
        f"{name} matches no linear layer of this base",
        f"{hint}choose from {', '.join(allowed)}, or all-linear",
    )
