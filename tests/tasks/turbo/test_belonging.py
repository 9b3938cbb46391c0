"""Heads beside a model, a tokenizer or an adapter that they were not made for."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tasks import speculate
from tasks.register.served_heads import writer_with_heads
from tasks.speculate import identity
from tasks.speculate.decode import Writer
from tasks.speculate.heads import HeadsConfig, HeadsError, TurboHeads
from tasks.speculate.identity import Guard, fingerprint, tokenizer_fingerprint
from tasks.speculate.parts import Parts, parts_of

LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


def heads_for(model: Any, tokenizer: Any = None) -> TurboHeads:
    parts = parts_of(model)
    vocabulary, width = parts.scored.shape
    made_for = {"model": fingerprint(parts)}
    if tokenizer is not None:
        made_for["tokenizer"] = tokenizer_fingerprint(tokenizer)
    return TurboHeads(HeadsConfig(2, 4, 8, width, vocabulary, made_for))


def draw(model: Any, adapter: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if f"lora_B.{adapter}." in name:
                weight.normal_(std=0.05, generator=generator)


@pytest.fixture
def adapters(world, tmp_path) -> tuple[Path, Path]:
    """Two adapters of one shape, saved."""
    for seed, name in enumerate(("one", "other")):
        model = get_peft_model(world.model(), LORA)
        draw(model, "default", seed)
        model.save_pretrained(tmp_path / name)
    return tmp_path / "one", tmp_path / "other"


def write(writer: Writer) -> list[int]:
    return writer.write([[5, 6, 7]], 4)[0][0]


def test_one_weight_that_differs_is_another_model(world) -> None:
    heads, other = heads_for(world.model()), world.model()
    Writer(parts_of(world.model()), heads)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(HeadsError, match=r"trained for another model .* another base"):
        Writer(parts_of(other), heads)
    with pytest.raises(HeadsError, match="another dtype"):
        Writer(parts_of(world.model().bfloat16()), heads)


def test_training_that_moves_most_weights_is_seen_in_a_sample(monkeypatch) -> None:
    """The last value is one of those that are hashed, and of two tensors with as many values as
    float32 has no odd numbers for, which has been an index too high."""
    monkeypatch.setattr(identity, "SAMPLE", 7)
    layer = torch.nn.Linear(2**13, 2**12 + 1, bias=False).requires_grad_(False)
    assert layer.weight.numel() > 2**24
    parts = Parts(layer, None, layer)
    first = fingerprint(parts)
    assert fingerprint(parts) == first
    layer.weight[-1, -1] += 1
    assert fingerprint(parts) != first


def test_a_vocabulary_that_was_resized_is_told(world) -> None:
    model = world.model()
    heads = heads_for(model)
    writer = Writer(parts_of(model), heads)
    model.resize_token_embeddings(520)
    for again in (lambda: write(writer), lambda: Writer(parts_of(model), heads)):
        with pytest.raises(HeadsError, match=r"vocabulary was resized since.*train heads for it"):
            again()


def test_an_lm_head_put_in_its_place_is_told(world) -> None:
    """The same numbers in another layer: the parts would go on with the old one."""
    model = world.model()
    writer = Writer(parts_of(model), heads_for(model))
    head = torch.nn.Linear(64, 512, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    with pytest.raises(HeadsError, match="lm_head was replaced"):
        write(writer)


def switched(model: Any, other: Path) -> None:
    model.load_adapter(other, "other")
    model.set_adapter("other")


def overwritten(model: Any, other: Path) -> None:
    model.load_adapter(other, "default")


def deleted(model: Any, other: Path) -> None:
    """As a server of many adapters does; what was freed may be used again at the same address."""
    model.load_adapter(other, "other")
    model.set_adapter("other")
    model.delete_adapter("default")


def wrapped_again(model: Any, other: Path) -> None:
    base = model.unload()
    PeftModel.from_pretrained(base, other)


def scaled(model: Any, other: Path) -> None:
    """As `set_scale` and adapters of another alpha do: no tensor changes."""
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 2


SWAPS: dict[str, Callable[[Any, Path], Any]] = {
    "set_adapter": switched,
    "load over": overwritten,
    "load and delete": deleted,
    "disabled": lambda model, other: model.base_model.disable_adapter_layers(),
    "merged": lambda model, other: model.merge_adapter(),
    "unloaded": lambda model, other: model.unload(),
    "another around the base": wrapped_again,
    "scaled": scaled,
    "trained on": lambda model, other: draw(model, "default", 9),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_an_adapter_swapped_under_the_heads_is_noticed_at_the_next_answer(
    world, adapters, swap
) -> None:
    one, other = adapters
    model = PeftModel.from_pretrained(world.model(), one).eval()
    writer = Writer(parts_of(model), heads_for(model))
    plain = Writer(parts_of(model))
    assert write(writer) == write(plain)
    SWAPS[swap](model, other)
    for _ in range(2):
        with pytest.raises(HeadsError, match="another adapter in its layers"):
            write(writer)
    # What has no heads goes on with whatever is there.
    assert write(plain)


def test_an_adapter_that_comes_back_or_does_not_act_is_no_swap(world, adapters) -> None:
    one, other = adapters
    model = PeftModel.from_pretrained(world.model(), one).eval()
    writer = Writer(parts_of(model), heads_for(model))
    first = write(writer)
    model.load_adapter(other, "other")  # beside the active one
    assert write(writer) == first
    model.set_adapter("other")
    with pytest.raises(HeadsError):
        write(writer)
    model.set_adapter("default")
    assert write(writer) == first
    with model.disable_adapter(), pytest.raises(HeadsError):
        write(writer)
    assert write(writer) == first


def test_an_adapter_has_its_heads_by_whatever_name_it_is_loaded(world, adapters) -> None:
    one, other = adapters
    heads = heads_for(PeftModel.from_pretrained(world.model(), one))
    named = PeftModel.from_pretrained(world.model(), other, adapter_name="first")
    named.load_adapter(one, "second")
    with pytest.raises(HeadsError, match="another adapter"):
        Writer(parts_of(named), heads)
    named.set_adapter("second")
    Writer(parts_of(named), heads)


def test_another_alpha_is_another_adapter(world, adapters, tmp_path) -> None:
    """The same tensors, saved with a config of its own."""
    one, _ = adapters
    heads = heads_for(PeftModel.from_pretrained(world.model(), one))
    changed = shutil.copytree(one, tmp_path / "alpha") / "adapter_config.json"
    config = json.loads(changed.read_text())
    changed.write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))
    with pytest.raises(HeadsError, match="another adapter"):
        Writer(parts_of(PeftModel.from_pretrained(world.model(), changed.parent)), heads)


def test_an_adapter_of_other_layers_beside_it_is_no_swap(world, adapters) -> None:
    """Nor is its scaling, in layers that the active one does not have."""
    few = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(world.model(), few)
    first = fingerprint(parts_of(model))
    model.load_adapter(adapters[0], "other")
    assert fingerprint(parts_of(model)) == first


def test_nothing_is_hashed_while_nothing_is_touched(world, adapters, monkeypatch) -> None:
    model = PeftModel.from_pretrained(world.model(), adapters[0])
    parts = parts_of(model)
    guard = Guard(heads_for(model).config, parts)
    hashed = []
    monkeypatch.setattr(identity, "require_same", lambda *_: hashed.append(1))
    for _ in range(3):
        guard.require()
    assert not hashed
    draw(model, "default", 9)
    guard.require()
    guard.require()
    assert len(hashed) == 1


def package(directory: Path, heads: TurboHeads) -> Path:
    (directory / "heads").mkdir(parents=True)
    heads.save(directory / "heads")
    shutil.copytree(Path(speculate.__file__).parent, directory / "speculate")
    return directory


def tokenizer_of(**words: int) -> Any:
    return SimpleNamespace(get_vocab=lambda: words)


def test_a_package_with_other_parts_is_refused_as_it_is_loaded(world, tmp_path) -> None:
    tokenizer = tokenizer_of(a=0, b=1)
    good = package(tmp_path / "good", heads_for(world.model(), tokenizer))
    assert write(writer_with_heads(good, world.model(), tokenizer))
    with pytest.raises(RuntimeError, match="trained with another tokenizer"):
        writer_with_heads(good, world.model(), tokenizer_of(a=1, b=0))
    other = world.model()
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight += 1e-3
    # The package's own class of the same name.
    with pytest.raises(ValueError, match="the heads were trained for another model") as caught:
        writer_with_heads(good, other, tokenizer)
    assert type(caught.value).__name__ == "HeadsError"
    (good / "heads" / "turbo_config.json").unlink()
    with pytest.raises(ValueError, match=re.escape("turbo_config.json")):
        writer_with_heads(good, world.model(), tokenizer)


def test_a_package_whose_drafts_cannot_be_verified_is_refused(world, tmp_path, monkeypatch) -> None:
    """A model that reads no mask, as another version of transformers might."""
    heads = heads_for(world.model(), tokenizer_of(a=0))
    directory, model = package(tmp_path / "package", heads), world.model()
    layers, forward = model.model, model.model.forward

    def blind(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    monkeypatch.setattr(layers, "forward", blind)
    with pytest.raises(ValueError, match="otherwise than each path alone") as caught:
        writer_with_heads(directory, model, tokenizer_of(a=0))
    assert type(caught.value).__name__ == "NotSpeculableError"


def test_heads_of_unknown_origin_are_held_to_their_shape_alone(world) -> None:
    model = world.model()
    heads = heads_for(model)
    anonymous = TurboHeads(replace(heads.config, made_for={}))
    Writer(parts_of(model), anonymous)
    wider = TurboHeads(replace(heads.config, made_for={}, hidden_size=65))
    with pytest.raises(HeadsError, match="a width of 65"):
        Writer(parts_of(model), wider)
