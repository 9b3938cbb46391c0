"""A base model as files on disk, told apart without importing torch."""

from __future__ import annotations

from pathlib import Path

from schemas.errors import UserError

#: What a tokenizer and a configuration are made of. Model cards and pictures do not count.
TEXT_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}


def tokenizer_files(base: Path) -> list[Path]:
    """The files that decide how text becomes tokens: all but weights and their index."""
    return sorted(
        path
        for path in base.iterdir()
        if path.suffix in TEXT_SUFFIXES and not path.name.endswith(".safetensors.index.json")
    )


def base_files(base: Path) -> list[Path]:
    """The files that decide what the base computes: weights, configuration, tokenizer."""
    return sorted(
        path for path in base.iterdir() if path.suffix in TEXT_SUFFIXES | {".safetensors"}
    )


def weight_files(base: Path) -> list[Path]:
    return sorted(base.glob("*.safetensors"))


def require_safetensors(directory: Path) -> None:
    """Raise a UserError for a directory whose weights are pickles or missing."""
    if weight_files(directory):
        return
    refuse_pickles(directory)
    raise UserError.at(
        directory,
        "holds no *.safetensors weights",
        "give a transformers directory (config.json, tokenizer, *.safetensors) or a hub id",
    )


def refuse_pickles(directory: Path) -> None:
    """Raise a UserError for a directory whose weights are pickles."""
    pickles = sorted(path.name for path in directory.glob("*") if path.suffix in (".bin", ".pt"))
    if pickles:
        raise UserError.at(
            directory / pickles[0],
            "a pickled checkpoint, which runs code when it is loaded; refused",
            "convert it once with `save_pretrained(..., safe_serialization=True)`",
        )
