"""The adapter of a version, as PEFT loads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from schemas.errors import UserError
from tasks.core import quantised
from tasks.core.adapters import CONFIG, TUNER, WEIGHTS
from tasks.export.version import Version


def write_adapter(version: Version, work: Path) -> list[str]:
    """Write adapter_config.json, which names the base, the tensors as they are, and the file of a
    tuner that PEFT lacks. Returns what is to be said of it.

    Raises:
        UserError: the version has no adapter, or several.
    """
    source = only_adapter(version)
    config = read_config(source)
    config |= {"base_model_name_or_path": version.base_name, "revision": version.revision}
    (work / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    shutil.copyfile(source / WEIGHTS, work / WEIGHTS)
    said = beside_four_bits(source)
    if (source / TUNER).exists():
        shutil.copyfile(source / TUNER, work / TUNER)
        said.append(
            f"PEFT has no {config['peft_type']}: run {TUNER}, which is beside it, before loading"
        )
    return said


def only_adapter(version: Version) -> Path:
    """The directory of a version's one adapter."""
    found = version.adapters
    if version.is_whole:
        raise UserError.at(
            version.name,
            "is a whole model, without an adapter (it was merged, or tuned in full)",
            "choose --format merged; or run its recipe with `--set finish.merge=false`",
        )
    if not found:
        raise UserError.at(
            version.name,
            f"has no adapter: it is its base, {version.serving['base']['model']}, as it is",
            "use that base",
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError.at(
            version.name,
            f"has {len(found)} adapters that learned together ({names}), and no other program "
            "puts those on one base",
            "ask it through MLflow, or register a candidate of one method",
        )
    return found[0]


def read_config(adapter: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((adapter / CONFIG).read_text())
    return config


def beside_four_bits(adapter: Path) -> list[str]:
    """What to say of an adapter that learned beside a quantised base."""
    how = quantised.read(adapter)
    if how is None:
        return []
    double = ", double quantisation" if how.double_quantisation else ""
    return [
        f"it learned beside a base in 4 bits ({how.quant_type}{double}): on the base as it is, its "
        "answers are close to those that were measured and not the same"
    ]
