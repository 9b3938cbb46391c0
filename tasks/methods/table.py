"""Every method by name. A new one is one file here with a `METHOD`, its fields in
`schemas/candidates.py`, and an entry of the tests (docs/methods.md)."""

from __future__ import annotations

import importlib
import pkgutil

from schemas.candidates import CandidateBase
from schemas.errors import UserError
from tasks import methods
from tasks.methods.method import Method


def _discover() -> dict[str, Method]:
    found = {}
    for info in pkgutil.iter_modules(methods.__path__):
        if info.name == "table":
            continue
        method = getattr(importlib.import_module(f"{methods.__name__}.{info.name}"), "METHOD", None)
        if method is not None:
            found[method.name] = method
    return found


METHODS: dict[str, Method] = _discover()


def methods_of(candidate: CandidateBase) -> list[Method]:
    """The methods that learn: the candidate's own, or those of its parts."""
    return [METHODS[part.method] for part in candidate.parts]


def method_for(name: str, task: str) -> Method:
    """The method of that name.

    Raises:
        UserError: it does not exist, or not for this task.
    """
    if name not in METHODS:
        raise UserError.at(
            "candidates[].method", f"unknown method {name}", f"choose from {', '.join(METHODS)}"
        )
    method = METHODS[name]
    if task not in method.tasks:
        raise UserError.at(
            f"candidates[method={name}]",
            f"{name} cannot be used for {task}",
            f"it works for {', '.join(method.tasks)}",
        )
    return method
