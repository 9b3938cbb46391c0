"""Ten adapters on one base, for every kind of adapter: what they weigh, and what comes back."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from schemas.candidates import BitFit, Bottleneck, Full, Ia3, LayerNorm, Lora, Peft, PrefixTuning
from schemas.together import Together
from tasks.core import adapters
from tasks.evaluate import swapping
from tasks.evaluate.subject import read_subject


def together(*parts):
    return Together(method="together", of=list(parts))


CANDIDATES = {
    "causal": [
        Lora(method="lora", rank=4, dora=True),
        Ia3(method="ia3"),
        LayerNorm(method="layer_norm"),
        Bottleneck(method="bottleneck", reduction_factor=4),
        together(Lora(method="lora", rank=4), PrefixTuning(method="prefix_tuning")),
    ],
    # With a head that each adapter trains whole.
    "classes": [
        Lora(method="lora", rank=4),
        Ia3(method="ia3"),
        LayerNorm(method="layer_norm"),
        BitFit(method="bitfit"),
        Bottleneck(method="bottleneck", reduction_factor=4),
        together(Lora(method="lora", rank=4), Bottleneck(method="bottleneck", reduction_factor=4)),
    ],
}


@pytest.mark.parametrize(
    ("world", "candidate"),
    [(world, candidate) for world, found in CANDIDATES.items() for candidate in found],
    ids=lambda value: value if isinstance(value, str) else value.method,
)
def test_every_kind_of_adapter_comes_back(world, candidate, trained, tmp_path, request):
    world = request.getfixturevalue(world)
    world = world.of("candidate", trained(world, tmp_path, candidate))
    subject = read_subject(world.spec, world.paths)
    fresh, base = subject.load(), subject.load_base()
    found, how = swapping.measure(subject, fresh, base, world.test_rows)
    assert how == swapping.HOW
    assert found.equal
    assert found.swap_ms > 0
    # Each file's tensors once, and for every module that is replaced whole a copy that PEFT keeps
    # of the base's own: at most one adapter's worth.
    files = (world.paths["subject"] / "model").rglob("adapter_model.safetensors")
    own = sum(tensor.nbytes for path in files for tensor in load_file(path).values()) / 2**20
    assert 10 * own <= found.ten_adapters_mib * (1 + 1e-9) <= 11 * own


@pytest.mark.parametrize("kind", ["VERA", "RANDLORA"])
def test_what_adapters_share_is_the_same_in_each(causal, trained, tmp_path, kind):
    options = {"peft_type": kind, "r": 4, "target_modules": ["q_proj", "o_proj"]}
    candidate = Peft(method="peft", peft=options)
    world = causal.of("candidate", trained(causal, tmp_path, candidate))
    subject = read_subject(world.spec, world.paths)
    fresh, base = subject.load(), subject.load_base()
    found, _ = swapping.measure(subject, fresh, base, world.test_rows)
    assert found.equal


def test_what_is_left_behind_is_told(causal_lora, monkeypatch, capsys):
    """A swap that leaves the others' weights in place, and one that changes nothing."""
    subject = read_subject(causal_lora.spec, causal_lora.paths)
    fresh, base = subject.load(), subject.load_base()

    def leaves(pool, name):
        pool.set_adapter(name)
        for layer in pool.modules():
            if hasattr(layer, "lora_A"):
                layer.lora_A["default"].weight.data *= 1.5

    monkeypatch.setattr(adapters, "activate", leaves)
    found, _ = swapping.measure(subject, fresh, base, causal_lora.test_rows)
    assert not found.equal
    assert "not those of a fresh load" in capsys.readouterr().err
    monkeypatch.setattr(adapters, "activate", lambda pool, name: None)
    found, _ = swapping.measure(subject, fresh, base, causal_lora.test_rows)
    assert not found.equal


def test_a_whole_model_has_nothing_to_swap(causal, trained, tmp_path):
    world = causal.of("candidate", trained(causal, tmp_path, Full(method="full")))
    subject = read_subject(world.spec, world.paths)
    none = torch.nn.Module()
    assert swapping.measure(subject, none, none, world.test_rows) == (None, swapping.WHOLE)


def test_adapters_that_cannot_stand_side_by_side_say_why(causal_lora, monkeypatch):
    subject = read_subject(causal_lora.spec, causal_lora.paths)
    fresh = subject.load()

    def refuse(subject, fresh):
        raise ValueError("supports only one adapter")

    monkeypatch.setattr(swapping, "load_pool", refuse)
    found, how = swapping.measure(subject, fresh, fresh, causal_lora.test_rows)
    assert found is None
    assert "supports only one adapter" in how
