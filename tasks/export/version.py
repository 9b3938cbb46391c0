"""A registered version as its package says it: what it holds, and on which base."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from schemas.errors import UserError
from tasks.core import adapters
from tasks.core.files import sha256_file
from tasks.core.runtime import Dtype
from tasks.core.shots import is_prompt
from tasks.speculate.heads import HeadsError, TurboHeads, is_heads

#: Of a package, beside `model/` and `serving.json` (`tasks/register/package.py`).
HEADS = "heads"


@dataclass(frozen=True)
class Version:
    """name: as people call it, e.g. `quickstart/3`. package: its directory. serving: what it says
    of how it is asked. base: the directory of the base it needs; None where it is whole."""

    name: str
    package: Path
    serving: dict[str, Any]
    base: Path | None

    @classmethod
    def open(cls, name: str, package: Path, base: Path | None) -> Version:
        """Read a package, and hold its base against what the version was made with.

        Raises:
            UserError: the base is not there, or is another.
        """
        serving = read_serving(package)
        if serving["base"] is not None:
            base = checked_base(serving["base"], base)
        return cls(name, package, serving, base)

    @property
    def model(self) -> Path:
        return self.package / "model"

    @property
    def task(self) -> str:
        return str(self.serving["task"])

    @property
    def dtype(self) -> Dtype:
        """In which it was measured and is served."""
        dtype: Dtype = self.serving["dtype"]
        return dtype

    @property
    def adapters(self) -> list[Path]:
        """The directories of its adapters, in the order in which they are put on; often one."""
        return adapters.directories(self.model)

    @property
    def is_prompt(self) -> bool:
        """Whether it is its base as it is, behind a prompt."""
        return is_prompt(self.model)

    @property
    def is_whole(self) -> bool:
        return self.base is None

    @property
    def base_name(self) -> str:
        """By which a program finds the base: an id of the hub, or the directory on this machine."""
        described = self.serving["base"]
        return str(described["model"] if described["revision"] else self.base)

    @property
    def revision(self) -> str | None:
        revision: str | None = self.serving["base"]["revision"]
        return revision

    @cached_property
    def heads(self) -> TurboHeads:
        """Its Turbo heads, float32.

        Raises:
            UserError: it has none, none of which a Medusa head can be made, or damaged ones.
        """
        if self.task != "causal-lm":
            raise UserError.at(
                self.name,
                f"is a {self.task} model, and heads draft for causal-lm alone",
                "choose --format peft or --format merged",
            )
        if not is_heads(self.package / HEADS):
            raise UserError.at(
                self.name,
                "has no Turbo heads, which this format is for",
                "train some: run its recipe with `finish: {turbo: {heads: 5, rank: 256}}`; or "
                "choose --format peft or --format merged",
            )
        try:
            heads = TurboHeads.load(self.package / HEADS)
        except HeadsError as error:
            raise UserError.at(self.name, str(error), "register it again") from error
        if heads.config.rank == 0:
            raise UserError.at(
                self.name,
                "its heads have rank 0: all they know is in the state over drafted tokens, which "
                "Medusa's format has no place for",
                "train heads with a rank: `finish: {turbo: {rank: 256}}`",
            )
        return heads


def read_serving(package: Path) -> dict[str, Any]:
    serving: dict[str, Any] = json.loads((package / "serving.json").read_text())
    return serving


def checked_base(described: dict[str, Any], place: Path | None) -> Path:
    """The directory of a version's base, every file of which is what it was made with."""
    fix = f"set PEFTFLOW_BASE to a directory with the {described['model']} it was made with"
    if place is None or not place.is_dir():
        raise UserError.at(place or described["path"], "the version's base is not there", fix)
    for name, wanted in described["sha256"].items():
        path = place / name
        if not path.is_file() or sha256_file(path) != wanted:
            raise UserError.at(
                path, f"is not the file that the version was made with (SHA-256 {wanted})", fix
            )
    return place.resolve()
