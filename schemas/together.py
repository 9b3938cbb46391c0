"""Candidates of several methods that learn together, and what a recipe may say a candidate is.

    - [{method: lora, rank: 8}, {method: prefix_tuning, virtual_tokens: 10}]

is short for `{method: together, of: […]}`, which also takes a `name` and a `train`.
`tasks/methods/together.py` builds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator

from schemas.candidates import CandidateBase, Single, TrainOverrides

Part = Annotated[Single, Field(discriminator="method")]


class Together(CandidateBase):
    """Several methods on one base, which learn at once. He et al. 2022, arXiv:2110.04366; Mao et
    al. 2022, arXiv:2110.07577."""

    MERGES: ClassVar[bool] = False

    method: Literal["together"]
    of: list[Part] = Field(
        description="Two methods or more; their order does not matter. `name` and `train` are "
        "those of the whole."
    )

    @property
    def parts(self) -> tuple[CandidateBase, ...]:
        return tuple(self.of)

    def default_name(self) -> str:
        return "-and-".join(part.label for part in self.of)

    @field_validator("of", mode="before")
    @classmethod
    def _flat(cls, of: Any) -> Any:
        nested = (part.get("method") if isinstance(part, dict) else part for part in _listed(of))
        if any(isinstance(part, list) or part == "together" for part in nested):
            raise ValueError("a composition cannot hold another: write all methods in one list")
        return of

    @field_validator("of")
    @classmethod
    def _can_learn_together(cls, of: list[Part]) -> list[Part]:
        if problems := list(_problems(of)):
            raise ValueError("; ".join(problems))
        # In one order, so that the same methods are the same candidate.
        return sorted(of, key=lambda part: (part.LAYER, part.method))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _problems(of: list[Any]) -> Iterator[str]:
    """What keeps these methods from learning together, each with what to do."""
    if not of:
        yield "an empty list composes nothing: name two methods or more"
    if len(of) == 1:
        yield f"one method is no composition: write {of[0].method} without the list"
    for part in of:
        for key, given in (("name", part.name is not None), ("train", part.train != UNTOUCHED)):
            if given:
                yield (
                    f"`{key}` of {part.method} is the whole composition's: write "
                    f"{{method: together, of: […], {key}: …}}"
                )
        if part.ALONE and len(of) > 1:
            yield f"{part.method} {part.ALONE}: make it a candidate of its own"
    for one, other in combinations(of, 2):
        shared = sorted(one.CHANGES & other.CHANGES)
        why = APART.get(frozenset((one.method, other.method)))
        if one.method == other.method:
            yield f"{one.method} stands twice: keep one of them"
        elif why:
            yield f"{one.method} and {other.method} cannot learn together: {why}"
        elif shared:
            yield (
                f"{one.method} and {other.method} both change {shared[0]}: keep one of them, or "
                "make each a candidate of its own"
            )


UNTOUCHED = TrainOverrides()
#: Pairs that would not touch the same, and why they do not go together all the same.
APART = {
    frozenset(("qlora", "ia3")): "PEFT's ia3 gives float32 behind layers of 4 bits, which a base "
    "in bfloat16 does not take; use lora with ia3"
}


def _from_list(value: Any) -> Any:
    """A list of methods is short for their composition."""
    return {"method": "together", "of": value} if isinstance(value, list) else value


_Written = Annotated[Single | Together, Field(discriminator="method")]

Candidate = Annotated[
    _Written,
    BeforeValidator(_from_list, json_schema_input_type=_Written | list[Part]),
]
#: Every class of a candidate.
KINDS = (*Single.__args__, Together)
