"""Merge: an adapter folded into its base, shard by shard, without loading the model."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from schemas.errors import StageError
from schemas.stages import MergeSpec
from schemas.tasks import is_labelled
from tasks.core.adapters import is_adapter
from tasks.core.bases import tokenizer_files
from tasks.core.models import MODEL_CLASSES, read_labels
from tasks.core.progress import say
from tasks.core.runtime import peak_reset, peak_resident_mib, resident_mib
from tasks.merge.adapter import read_adapter
from tasks.merge.checkpoint import INDEX, Checkpoint
from tasks.merge.names import Skeleton
from tasks.merge.plan import Copy, Fold, New, Plan, index_of, make_plan
from tasks.merge.write import write_checkpoint


def run(spec: MergeSpec, paths: dict[str, Path], out_dir: Path) -> dict[str, Any]:
    """Make out_dir/model, a whole transformers directory with its tokenizer.

    W + scaling * B A is summed in float32 and rounded once to the dtype of the stored weight;
    tensors that the adapter does not change are copied byte for byte. A whole model (method
    `full`) is copied.

    Raises:
        UserError: the base is no safetensors checkpoint, or a damaged one.
        StageError: the adapter cannot be folded exactly.
    """
    assert spec.finish.merge, "the flow leaves this stage out where nothing is merged"
    started, floor_mib = time.monotonic(), resident_mib()
    peak_reset()
    model_dir = out_dir / "model"
    shutil.rmtree(model_dir, ignore_errors=True)
    model_dir.mkdir()
    trained = paths["trained"] / "model"
    if is_adapter(trained):
        counts = fold_into(trained, paths, model_dir)
    else:
        counts = copy_whole(trained, paths["base"], model_dir)
    seconds = time.monotonic() - started
    return {
        "format": "transformers",
        **counts,
        "bytes": sum(path.stat().st_size for path in model_dir.iterdir()),
        "seconds": round(seconds, 3),
        "peak_mib": round(peak_resident_mib() - floor_mib, 1),
    }


def fold_into(trained: Path, paths: dict[str, Path], model_dir: Path) -> dict[str, Any]:
    """Write the merged model of an adapter; returns what was done, for the facts."""
    adapter = read_adapter(trained)
    checkpoint = Checkpoint.open(paths["base"])
    config = json.loads((paths["base"] / "config.json").read_text())
    if "quantization_config" in config:
        raise StageError(f"{paths['base']} is quantised: its weights cannot be folded into")
    if is_labelled(adapter.task):
        config |= label_settings(paths)
    skeleton = Skeleton.build(config, adapter.task)
    config["architectures"] = [type(skeleton.model).__name__]
    plan = make_plan(checkpoint, adapter, skeleton)
    if plan.untied:
        config["tie_word_embeddings"] = False
        require_untied(plan, config, adapter.task)
        say(f"{' and '.join(plan.untied)} were one weight and now differ: the model is untied")
    write_checkpoint(plan, model_dir)
    copy_text(paths["base"], model_dir)
    (model_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    index = index_of(plan, checkpoint.index)
    if index is not None:
        (model_dir / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    origins = [tensor.origin for tensor in plan.tensors()]
    return {
        "tensors_folded": sum(isinstance(origin, Fold) for origin in origins),
        "tensors_copied": sum(isinstance(origin, Copy) for origin in origins),
        "tensors_new": sum(isinstance(origin, New) for origin in origins),
        "shards": len(plan.shards),
    }


def copy_whole(trained: Path, base: Path, model_dir: Path) -> dict[str, Any]:
    """A fully tuned model is merged already: copy it, and from the base what it lacks."""
    checkpoint = Checkpoint.open(trained)
    copy_text(base, model_dir)
    for path in sorted(path for path in trained.iterdir() if path.is_file()):
        shutil.copyfile(path, model_dir / path.name)
    return {
        "tensors_folded": 0,
        "tensors_copied": len(checkpoint.locations),
        "tensors_new": 0,
        "shards": len(checkpoint.shards),
    }


def copy_text(base: Path, model_dir: Path) -> None:
    """Configuration, generation settings, tokenizer and licence of the base, as they are."""
    notices = [path for path in base.iterdir() if path.stem.upper() in ("LICENSE", "NOTICE")]
    for path in [*tokenizer_files(base), *notices]:
        shutil.copyfile(path, model_dir / path.name)


def label_settings(paths: dict[str, Path]) -> dict[str, Any]:
    """The part of config.json that names the classes of a classifier."""
    labels = read_labels(paths["prepared"]) if "prepared" in paths else None
    if labels is None:
        raise StageError("a classifier is merged with its label names: give paths.prepared")
    return {
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def require_untied(plan: Plan, config: dict[str, Any], task: str) -> None:
    """Raise if the model class ties these weights whatever its config says."""
    still = Skeleton.build(config, task).tied
    if any(group & set(plan.untied) for group in still):
        raise StageError(
            f"{MODEL_CLASSES[task].__name__} always shares {', '.join(plan.untied)}, and the "
            "adapter changes one of them; set `finish: {merge: false}`"
        )
