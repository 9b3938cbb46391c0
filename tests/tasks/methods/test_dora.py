"""DoRA on the fused path: its formula, its start, what it holds, what PEFT makes of its file."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from schemas.candidates import Lora
from schemas.recipe import Finish
from schemas.stages import MergeSpec
from tasks.core.models import load_base, load_trained
from tasks.cost.ledger import Ledger
from tasks.merge.stage import run as merge
from tasks.methods import row_lengths
from tasks.methods.fused import LoraProducts, fuse_lora
from tasks.methods.lora import METHOD
from tasks.methods.method import trained
from tasks.train.output import save_model

IDS = torch.randint(3, 64, (2, 17), generator=torch.Generator().manual_seed(3))
DORA = Lora(method="lora", rank=4, alpha=8, dora=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_bias=True,
        initializer_range=0.2,
    )
    place = tmp_path_factory.mktemp("dora") / "base"
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight)
    model.save_pretrained(place)
    (place / "tokenizer_config.json").write_text("{}")
    return place


def built(place: Path, dtype: str = "float32") -> nn.Module:
    torch.manual_seed(1)
    return METHOD.build(load_base(place, "causal-lm", None, dtype), DORA, "causal-lm")


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: weight.grad for name, weight in trained(model).items()}
    assert all(grad is not None for grad in found.values())
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("nearly_cancelled", [False, True])
@pytest.mark.parametrize("block", [1 << 18, 100])
def test_is_the_formula_in_float64(monkeypatch, bias, nearly_cancelled, block):
    """m / ||W + s B A|| (W + s B A) x + b, by autograd, the length a constant."""
    monkeypatch.setitem(row_lengths.BLOCK, "cpu", block)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, w, b = draw(23, 24), draw(40, 24), draw(40) if bias else None
    a, up, m, scaling = draw(4, 24), draw(40, 4), draw(40), 2.0
    if nearly_cancelled:
        w = 0.01 * w - scaling * up @ a
    learned = [x, a, up, m]
    for tensor in learned:
        tensor.requires_grad_()
    [y] = LoraProducts.apply(x, w, b, scaling, a, up, m)
    found = [y, *torch.autograd.grad(y.pow(3).sum(), learned)]

    x, a, up, m = (tensor.detach().double().requires_grad_() for tensor in learned)
    summed = w.double() + scaling * up @ a
    scale = m / summed.detach().norm(dim=1)
    bias_O = None if b is None else b.double()
    y = F.linear(x, scale[:, None] * summed, bias_O)
    expected = [y, *torch.autograd.grad(y.pow(3).sum(), [x, a, up, m])]
    # float32 (6e-8) sums of some 24 terms, 200 times as long as their sum where they cancel.
    tolerance = 5e-4 if nearly_cancelled else 2e-6
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("bfloat16", 0.03)])
def test_starts_at_the_base(place, dtype, tolerance):
    """float32: bit for bit, as the lengths that PEFT starts from are those that we find. Of a base
    in bfloat16 PEFT rounds them to its dtype: each row of 14 layers is scaled by 1 +- 1 / 512."""
    plain, model = load_base(place, "causal-lm", None, dtype), built(place, dtype)
    assert fuse_lora(model) == 14
    with torch.no_grad():
        before, after = (found(input_ids=IDS).logits for found in (plain, model))
    assert (after - before).abs().max() <= tolerance * before.abs().max()


def test_gradient_checkpointing_makes_the_same_gradients(place):
    """Bit for bit: the same operations, some of them twice."""
    model = built(place).train()
    fuse_lora(model)
    with torch.no_grad():
        for weight in trained(model).values():
            weight.add_(0.1 * torch.randn_like(weight))
        model(input_ids=IDS)  # shows who shares an input
    whole = gradients(model)
    assert all(grad.abs().max() > 0 for grad in whole.values())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    for name, grad in gradients(model).items():
        assert torch.equal(grad, whole[name])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.03)])
def test_trained_fused_it_loads_in_peft_and_merges(tmp_path, place, dtype, tolerance):
    """After ten steps, on PEFT's path and folded; relative to the largest logit.

    float32: sums in another order, through two blocks. bfloat16: a few roundings of 1 / 256 more
    or less.
    """
    model = built(place, dtype).train()
    before = copy.deepcopy(trained(model))
    fuse_lora(model)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    losses = []
    for _ in range(10):
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for name, weight in trained(model).items():
        assert not torch.equal(weight, before[name]), name
    with torch.no_grad():
        tuned = model.eval()(input_ids=IDS).logits.float()
    target = tmp_path / "trained" / "model"
    save_model(model, target, place, dtype, METHOD)
    merged = tmp_path / "merged"
    merged.mkdir()
    merge(MergeSpec(finish=Finish(merge=True)), {"base": place, "trained": target.parent}, merged)
    for again in (
        load_trained(place, target, "causal-lm", None, dtype),
        load_base(merged / "model", "causal-lm", None, dtype),
    ):
        with torch.no_grad():
            found = again.eval()(input_ids=IDS).logits.float()
        assert (found - tuned).abs().max() <= tolerance * tuned.abs().max()


def test_holds_one_weight_in_the_dtype_of_the_base_and_blocks_of_float32():
    """Where PEFT's path holds W + s B A in float32, which alone is two of the weight."""
    outputs, inputs, rank = 2048, 1024, 8
    w = torch.randn(outputs, inputs, dtype=torch.bfloat16)
    a, b = torch.randn(rank, inputs), torch.randn(outputs, rank)
    m = w.float().norm(dim=1)
    x = torch.randn(4, inputs, dtype=torch.bfloat16)
    learned = [a, b, m]
    for tensor in learned:
        tensor.requires_grad_()
    ledger = Ledger([w, x, *learned])
    with ledger:
        [y] = LoraProducts.apply(x, w, None, 2.0, a, b, m)
        y.float().sum().backward()
    weight, block = 2 * w.numel(), 4 * row_lengths.BLOCK["cpu"]
    # Two blocks at a time, and a tenth for A, B, x, y and their gradients.
    assert weight < max(ledger.history) <= 1.1 * (weight + 2 * block)
