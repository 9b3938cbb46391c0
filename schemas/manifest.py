"""The manifest: what a store entry is, what made it, and the hash of each of its files."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

#: What a train entry's `model/` holds: an adapter, a whole model, or what stands before a prompt.
ModelFormat = Literal["peft-adapter", "transformers", "prompt"]
FileFormat = Literal[ModelFormat, "rows", "report", "page", "registration", "heads"]


class FileRecord(BaseModel):
    """One file of an entry. bytes: its size. sha256: of its content, hexadecimal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str


class Provenance(BaseModel):
    """Where and with what an entry was made. Never part of a key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    started: str = Field(description="UTC, ISO 8601.")
    seconds: float
    machine: str
    python: str
    libraries: dict[str, str]
    git_commit: str | None
    git_dirty: bool | None


class Manifest(BaseModel):
    """Written last: a directory without a whole manifest does not exist."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    stage_version: int
    key: str
    format: FileFormat
    quantisation: str | None = None
    spec: dict[str, Any]
    inputs: dict[str, str] = Field(description="Input name: key of the entry.")
    outside: dict[str, str] = Field(description="Name: content hash of what was read from outside.")
    facts: dict[str, Any] = Field(description="What the stage says of its result, as JSON.")
    files: dict[str, FileRecord]
    provenance: Provenance
