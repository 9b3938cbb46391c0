"""What training leaves: an adapter that names no place, or a whole model with its tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from tasks.core import adapters
from tasks.core.files import write_atomic
from tasks.core.runtime import TORCH_DTYPES, Dtype
from tasks.methods.method import Method, trained
from tasks.train.loss import unwrapped

#: What stands for the base's path in an adapter: its content hash is in the manifest.
BASE_NAME = "base"


def save_model(model: nn.Module, target: Path, base: Path, dtype: Dtype, *methods: Method) -> None:
    """Write `target`: `peft-adapter` (or one for each of several methods) or `transformers`.

    An adapter keeps its float32 weights, and has with it the file of a tuner that PEFT lacks. A
    whole model, or layers of one, are rounded once to `dtype`, the dtype in which they will be
    measured and served.
    """
    shutil.rmtree(target, ignore_errors=True)
    if methods[0].format == "peft-adapter":
        parts = adapters.parts_of(model)
        places = adapters.new_directories(target, [method.name for method in methods])
        for part, place, method in zip(parts, places, methods, strict=True):
            if method.replaces:
                for name, weight in trained(part).items():
                    if adapters.owner(parts, name) is part:
                        weight.data = weight.data.to(TORCH_DTYPES[dtype])
            _save_adapter(part, place, method)
            if len(parts) > 1:
                _leave_others_out(part, parts, place / adapters.WEIGHTS)
        return
    whole = unwrapped(model).to(TORCH_DTYPES[dtype])
    whole.config._name_or_path = ""
    whole.save_pretrained(target, safe_serialization=True)
    for path in sorted(base.iterdir()):
        if path.name not in _written_by_model(target) and not is_weights(path):
            shutil.copyfile(path, target / path.name)


def _save_adapter(part: PeftModel, place: Path, method: Method) -> None:
    part.save_pretrained(str(place), safe_serialization=True)
    (place / "README.md").unlink(missing_ok=True)
    _forget_place(place / adapters.CONFIG)
    if method.tuner is not None:
        shutil.copyfile(method.tuner, place / adapters.TUNER)


def _leave_others_out(part: PeftModel, parts: tuple[PeftModel, ...], path: Path) -> None:
    """PEFT saves with one adapter what others have put into the same base, under the names that
    modules have once all are there."""
    tensors = {
        adapters.own_name(name): tensor.clone()
        for name, tensor in load_file(path).items()
        if adapters.owner(parts, name) is part
    }
    save_file(tensors, path, metadata={"format": "pt"})


def is_weights(path: Path) -> bool:
    """Whether a file of a model directory is weights (or no plain file), not tokenizer or card."""
    return (
        not path.is_file()
        or path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx")
        or path.name.endswith(".index.json")
        or path.name.startswith(".")
    )


def _written_by_model(target: Path) -> set[str]:
    return {path.name for path in target.iterdir()}


def _forget_place(config: Path) -> None:
    """A path of this machine has no meaning on another, and would change the adapter's bytes."""
    record = json.loads(config.read_text())
    record["base_model_name_or_path"] = BASE_NAME
    # PEFT writes a set; its order differs in each process.
    if isinstance(record.get("target_modules"), list):
        record["target_modules"].sort()
    write_atomic(config, json.dumps(record, indent=2, sort_keys=True) + "\n")
