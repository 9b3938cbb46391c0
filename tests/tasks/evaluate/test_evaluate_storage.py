"""Bytes shipped are bytes on disk; parameters are those of the trained tensors."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from schemas.candidates import Bottleneck, Full, Lora
from schemas.together import Together
from tasks.core.adapters import TUNER
from tasks.evaluate import storage
from tasks.evaluate.subject import read_subject


def test_the_base_ships_nothing(causal) -> None:
    subject = read_subject(causal.spec, causal.paths)
    stored = storage.measure(subject, subject.load_base())
    assert (stored.shipped_bytes, stored.trainable_parameters, stored.trainable_share) == (0, 0, 0)
    # Zero-shot, one base does all ten.
    assert stored.ten_tasks_bytes == base_bytes(causal)


def base_bytes(world) -> int:
    """The base's files, among which is nothing that loading does not need."""
    return sum(path.stat().st_size for path in world.paths["base"].iterdir())


def test_an_adapter_ships_its_weights_and_configuration(causal_lora) -> None:
    subject = read_subject(causal_lora.spec, causal_lora.paths)
    base = subject.load_base()
    model_dir = causal_lora.paths["subject"] / "model"
    (model_dir / "README.md").write_text("a card is not read when loading")
    stored = storage.measure(subject, base)
    weights, config = model_dir / "adapter_model.safetensors", model_dir / "adapter_config.json"
    assert stored.shipped_bytes == weights.stat().st_size + config.stat().st_size
    assert stored.ten_tasks_bytes == base_bytes(causal_lora) + 10 * stored.shipped_bytes
    elements = sum(tensor.numel() for tensor in load_file(weights).values())
    assert stored.trainable_parameters == elements
    assert stored.trainable_share == elements / sum(w.numel() for w in base.parameters())
    assert storage.saved_elements(weights) == elements


def test_an_adapter_that_peft_lacks_ships_its_tuner(causal, trained, tmp_path) -> None:
    candidate = Bottleneck(method="bottleneck", reduction_factor=4)
    world = causal.of("candidate", trained(causal, tmp_path, candidate))
    model_dir = world.paths["subject"] / "model"
    subject = read_subject(world.spec, world.paths)
    after = storage.measure(subject, subject.load_base()).shipped_bytes
    tuner = (model_dir / TUNER).stat().st_size
    (model_dir / TUNER).unlink()
    before = storage.measure(subject, subject.load_base()).shipped_bytes
    assert after - before == tuner > 0


def test_of_several_adapters_every_file_ships(causal, trained, tmp_path) -> None:
    parts = [Bottleneck(method="bottleneck", reduction_factor=4), Lora(method="lora", rank=4)]
    candidate = Together(method="together", of=parts)
    world = causal.of("candidate", trained(causal, tmp_path, candidate))
    subject = read_subject(world.spec, world.paths)
    stored = storage.measure(subject, subject.load_base())
    files = [path for path in (world.paths["subject"] / "model").rglob("*") if path.is_file()]
    assert sorted(
        path.relative_to(world.paths["subject"] / "model").as_posix() for path in files
    ) == [
        "1-lora/adapter_config.json",
        "1-lora/adapter_model.safetensors",
        "2-bottleneck/adapter_config.json",
        "2-bottleneck/adapter_model.safetensors",
        "2-bottleneck/tuner.py",
    ]
    assert stored.shipped_bytes == sum(path.stat().st_size for path in files)
    assert stored.ten_tasks_bytes == base_bytes(causal) + 10 * stored.shipped_bytes


def test_full_tuning_ships_the_whole_model(causal, trained, tmp_path) -> None:
    world = causal.of("candidate", trained(causal, tmp_path, Full(method="full")))
    subject = read_subject(world.spec, world.paths)
    stored = storage.measure(subject, subject.load_base())
    files = [path for path in (world.paths["subject"] / "model").rglob("*") if path.is_file()]
    assert stored.shipped_bytes == sum(path.stat().st_size for path in files)
    assert stored.trainable_share == 1
    assert stored.ten_tasks_bytes == 10 * stored.shipped_bytes
    assert isinstance(subject.load(), torch.nn.Module)
