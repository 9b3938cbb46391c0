"""A version as a whole transformers directory, with its tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from schemas.errors import StageError, UserError
from schemas.recipe import Finish
from schemas.stages import MergeSpec
from tasks.core.store import SCRATCH
from tasks.export.adapter import beside_four_bits, only_adapter
from tasks.export.version import Version
from tasks.merge.stage import run as merge


def write_merged(version: Version, work: Path) -> list[str]:
    """Copy a whole model, or fold the adapter into its base, shard by shard. Returns what is to be
    said of it.

    Raises:
        UserError: the version has no weights of its own, or an adapter that does not fold.
    """
    if version.is_whole:
        shutil.copytree(version.model, work, dirs_exist_ok=True)
        return []
    adapter = only_adapter(version)
    assert version.base is not None
    # The stage reads `model/` of an entry, which a package has too, and labels of another.
    scratch = work / SCRATCH
    scratch.mkdir()
    (scratch / "labels.json").write_text(json.dumps(version.serving["labels"]))
    paths = {"base": version.base, "trained": version.package, "prepared": scratch}
    try:
        merge(MergeSpec(finish=Finish(merge=True)), paths, scratch)
    except StageError as error:
        # What follows is the fix for a recipe, which here is the other format.
        why = str(error).partition("; set `finish")[0]
        raise UserError.at(
            version.name,
            f"its adapter cannot be merged: {why}",
            "choose --format peft, which ships the adapter as it is",
        ) from error
    for path in (scratch / "model").iterdir():
        path.rename(work / path.name)
    shutil.rmtree(scratch)
    return beside_four_bits(adapter)
