"""What a registered version carries: one directory that says all there is to say of a model.

model/           the whole model with its tokenizer, its adapters, or the examples of a prompt
tokenizer/       beside an adapter or a prompt: the tokenizer of its base
serving.json     how it is to be asked (`served_model.py` reads it)
report.html      the run's report: every candidate beside the base, plots, examples, the data
criteria.json    the five criteria, measured on this very model
data_report.json what became of the rows
manifest.json    hashes of data, base and files; git state; library versions
README.md        the model card
pictures.py      of a model of images: how a file becomes pixels
examples.py      of a prompt with examples: which of them stand before a question
heads/           Turbo heads, with which answers are written by default
speculate/       the code that drafts with them and verifies (`tasks/speculate/`)
turbo.py         which gives that code the heads and the model
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.manifest import Manifest
from schemas.report import CriteriaReport, DataReport
from schemas.stages import RegisterSpec
from schemas.tasks import is_labelled, reads_images
from tasks import speculate
from tasks.core import pictures, quantised
from tasks.core.adapters import is_adapter
from tasks.core.bases import base_files, tokenizer_files
from tasks.core.files import sha256_file, sha256_json
from tasks.core.models import load_config, load_tokenizer, read_labels
from tasks.core.shots import EXAMPLES, is_prompt
from tasks.core.store import read_manifest
from tasks.core.tokens import TokenRows
from tasks.register.asked import held_out_rows
from tasks.register.card import model_card

HERE = Path(__file__).parent

#: Held-out rows that stand in a version as an example of its input.
EXAMPLE_ROWS = 2

#: What a version is made from; heads only where it has some.
ENTRIES = ("prepared", "finished", "evaluated", "heads")

Paths = dict[str, Path]


@dataclass(frozen=True)
class Package:
    """The directory of a version, with what the registry is told of it.

    key: the hash of all that decides its content: the same model is registered once.
    example: rows to show how it is asked. requirements: exact versions, as pip writes them.
    """

    directory: Path
    key: str
    task: str
    report: CriteriaReport
    serving: dict[str, Any]
    card: str
    example: list[str] | list[bytes]
    requirements: list[str]


def make_package(spec: RegisterSpec, paths: Paths, directory: Path) -> Package:
    """Lay out the directory of a version."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    finished = paths["finished"] / "model"
    shutil.copytree(finished, directory / "model", copy_function=link_or_copy)
    report = CriteriaReport.model_validate_json((paths["evaluated"] / "criteria.json").read_bytes())
    data = DataReport.model_validate_json((paths["prepared"] / "data_report.json").read_bytes())
    has_peft = is_adapter(finished)
    base = describe_base(spec, paths["base"]) if has_peft or is_prompt(finished) else None
    if base is not None:
        (directory / "tokenizer").mkdir()
        for path in tokenizer_files(paths["base"]):
            shutil.copyfile(path, directory / "tokenizer" / path.name)
    serving = {
        "task": spec.task,
        "template": data.template,
        "dtype": report.dtype,
        "max_length": data.max_length,
        "max_new_tokens": spec.max_new_tokens,
        "stop_ids": stop_ids(spec, paths),
        "labels": read_labels(paths["prepared"]) if is_labelled(spec.task) else None,
        "base": base,
    }
    manifests = lineage(paths)
    example: Any = [row.text for row in held_out_rows(paths["prepared"], EXAMPLE_ROWS)]
    card = model_card(spec, report, data, manifests, serving, example)
    write_json(directory / "serving.json", serving)
    write_json(
        directory / "manifest.json",
        {name: manifest.model_dump(mode="json") for name, manifest in manifests.items()},
    )
    shutil.copyfile(paths["page"] / "report.html", directory / "report.html")
    shutil.copyfile(paths["evaluated"] / "criteria.json", directory / "criteria.json")
    shutil.copyfile(paths["prepared"] / "data_report.json", directory / "data_report.json")
    (directory / "README.md").write_text(card)
    if reads_images(spec.task):
        shutil.copyfile(pictures.__file__, directory / "pictures.py")
    if (finished / EXAMPLES).exists():
        shutil.copyfile(HERE / "served_examples.py", directory / "examples.py")
    if "heads" in paths:
        shutil.copytree(paths["heads"] / "heads", directory / "heads", copy_function=link_or_copy)
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(speculate.__file__).parent, directory / "speculate", ignore=skipped)
        shutil.copyfile(HERE / "served_heads.py", directory / "turbo.py")
    return Package(
        directory=directory,
        key=key_of_version(spec, manifests),
        task=spec.task,
        report=report,
        serving=serving,
        card=card,
        example=example,
        requirements=requirements(
            has_peft, quantised.read(finished) is not None, reads_images(spec.task)
        ),
    )


def link_or_copy(source: str, target: str) -> None:
    """A second name for a file of the store, for MLflow to copy from: it only reads it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def key_of_version(spec: RegisterSpec, manifests: dict[str, Manifest]) -> str:
    """The hash of the spec and of the entries that a version is made from."""
    entries = {name: manifests[name].key for name in ENTRIES if name in manifests}
    return sha256_json({"spec": spec.model_dump(mode="json"), "entries": entries})[:40]


def lineage(paths: Paths) -> dict[str, Manifest]:
    """The manifests behind a version, with that of the training run that was merged."""
    names = [name for name in ENTRIES if name in paths]
    manifests = {name: read_manifest(paths[name]) for name in names}
    trained_key = manifests["finished"].inputs.get("trained")
    if trained_key is not None:
        trained = paths["finished"].parent.parent / "train" / trained_key
        if (trained / "manifest.json").exists():
            manifests["trained"] = read_manifest(trained)
    else:
        manifests["trained"] = manifests["finished"]
    return manifests


def describe_base(spec: RegisterSpec, base: Path) -> dict[str, Any]:
    """Where the base of an adapter or a prompt is found, and the hash of each file that counts."""
    hashes = {path.name: sha256_file(path) for path in base_files(base)}
    return {**spec.base, "path": str(base.resolve()), "sha256": hashes}


def stop_ids(spec: RegisterSpec, paths: Paths) -> list[int]:
    """The tokens that end an answer: those the base names, and those that the rows end in."""
    if is_labelled(spec.task):
        return []
    found: set[int] = set()
    generation = paths["base"] / "generation_config.json"
    named = [
        load_config(paths["base"]).eos_token_id,
        json.loads(generation.read_text()).get("eos_token_id") if generation.exists() else None,
        load_tokenizer(paths["base"]).eos_token_id,
    ]
    for value in named:
        found.update([value] if isinstance(value, int) else value or [])
    rows = TokenRows.load(paths["prepared"] / "tokens" / "test.safetensors")
    found.update(int(rows.row(index)[-1]) for index in range(len(rows)))
    return sorted(found)


def requirements(has_peft: bool, is_quantised: bool = False, has_images: bool = False) -> list[str]:
    """What the version needs to be loaded and asked, pinned; MLflow adds itself.

    A local version label (`+cpu`, `+cu128`) names a build, not a release, and is left off.
    """
    from importlib import metadata

    names = ["torch", "transformers", "tokenizers", "safetensors", "numpy", "pandas", "mlflow"]
    if has_peft:
        names += ["peft", "accelerate"]
    if has_images:
        names.append("pillow")
    if is_quantised:
        names.append("bitsandbytes")
    return [f"{name}=={metadata.version(name).split('+')[0]}" for name in names]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
