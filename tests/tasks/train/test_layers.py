"""The fused layers are PEFT's and transformers' own, forward and backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXModel, LlamaConfig, LlamaModel
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tasks.methods import fused
from tasks.methods.fused import fuse_lora
from tasks.train.norm import fuse_norms
from tasks.train.rotary import fuse_rotary


class Two(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(24, 40, dtype=dtype)
        self.second = nn.Linear(40, 16, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


KINDS = ("lora", "dora", "adalora")


def config(kind: str, targets: list[str], ranks: dict[str, int] | None = None, **given) -> Any:
    """Rank 4; `ranks` are those of some layers, which AdaLoRA has all alike at its start."""
    given = {"lora_alpha": 8, "target_modules": targets, **given}
    if kind == "adalora":
        return AdaLoraConfig(init_r=4, target_r=2, total_step=10, **given)
    return LoraConfig(r=4, rank_pattern=ranks or {}, use_dora=kind == "dora", **given)


def learned(model: nn.Module, config: Any) -> nn.Module:
    """With LoRA as if it had learned: B and AdaLoRA's E are not 0, a triplet of E is masked, what
    is divided by is another rank, and DoRA's lengths are not those of the rows."""
    model = get_peft_model(model, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name or "lora_E" in name:
            nn.init.normal_(weight)
        if "lora_E" in name:
            weight.data[1] = 0
        if "ranknum" in name:
            weight.requires_grad_(False).fill_(3)
        if "lora_magnitude_vector" in name:
            weight.data *= torch.empty_like(weight).uniform_(0.5, 1.5)
    return model


def lora_model(dtype: torch.dtype, kind: str = "lora", dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return learned(Two(dtype), config(kind, ["first", "second"], lora_dropout=dropout))


def outputs_and_gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *weights])]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # float32: sums in another order. bfloat16 (8 bits): PEFT rounds its float32 update once
    # where we round each of two products, and errors add over the layer's 24 to 40 inputs.
    [(torch.float32, 1e-5), (torch.bfloat16, 0.03)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_fused_lora_is_pefts(dtype, tolerance, kind):
    theirs = lora_model(dtype, kind)
    ours = copy.deepcopy(theirs)
    assert fuse_lora(ours) == 2
    torch.manual_seed(1)
    x = torch.randn(3, 7, 24).to(dtype)
    for a, b in zip(outputs_and_gradients(ours, x), outputs_and_gradients(theirs, x), strict=True):
        assert a.dtype == b.dtype
        assert (a - b).float().norm() <= tolerance * b.float().norm()


#: Where B of the keys' layer is.
K_B = dict.fromkeys(("lora", "dora"), "base_model.model.k.lora_B.default.weight")
K_B["adalora"] = "base_model.model.k.lora_B.default"


class Attentive(nn.Module):
    """Three layers of one input, and one of another."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.q = nn.Linear(24, 24, dtype=dtype)
        self.k = nn.Linear(24, 24, dtype=dtype, bias=False)
        self.v = nn.Linear(24, 24, dtype=dtype)
        self.o = nn.Linear(24, 16, dtype=dtype)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        keys = x if other is None else other
        return self.o(torch.tanh(self.q(x)) * self.k(keys) + self.v(keys))


def attentive(dtype: torch.dtype, kind: str) -> nn.Module:
    torch.manual_seed(0)
    return learned(Attentive(dtype), config(kind, ["q", "k", "v", "o"], {"k": 2}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_layers_that_share_an_input_are_computed_together_and_the_same(
    monkeypatch, dtype, tolerance, kind
):
    """From the pass on that follows one without gradients; the tolerances are those above."""
    theirs = attentive(dtype, kind)
    ours = copy.deepcopy(theirs)
    assert fuse_lora(ours) == 4
    torch.manual_seed(1)
    x = torch.randn(3, 7, 24).to(dtype)
    counts = []
    own = fused.LoraProducts.apply
    monkeypatch.setattr(
        fused.LoraProducts,
        "apply",
        lambda x, *layers: counts.append(len(layers) // fused.GIVEN) or own(x, *layers),
    )
    # A pass that may be computed a second time shows nothing.
    for looks, expected in ((False, [1, 1, 1, 1]), (True, [1, 1, 1, 1]), (False, [3, 1])):
        with torch.no_grad():
            if looks:
                ours(x)
        counts.clear()
        found = outputs_and_gradients(ours, x)
        assert counts == ([3, 1] if looks else expected)
        for a, b in zip(found, outputs_and_gradients(theirs, x), strict=True):
            assert a.dtype == b.dtype
            assert (a - b).float().norm() <= tolerance * b.float().norm()


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_share_an_input_once_may_have_another_the_next_time(kind):
    """Cross attention: keys and values from elsewhere, after passes that went together."""
    theirs = attentive(torch.float32, kind)
    ours = copy.deepcopy(theirs)
    fuse_lora(ours)
    torch.manual_seed(1)
    x, other = torch.randn(3, 24), torch.randn(3, 24)
    with torch.no_grad():
        ours(x), ours(x)
    assert torch.allclose(ours(x, other), theirs(x, other), atol=1e-5)
    assert torch.allclose(ours(x, x.clone()), theirs(x), atol=1e-5)
    for model in (ours, theirs):
        model.get_parameter(K_B[kind]).data.mul_(3)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_pass_under_gradient_checkpointing_is_computed_twice_alike(kind):
    """Layers that learnt from it who shares an input would save other tensors the second time."""
    model = learned(tiny_llama(), config(kind, ["q_proj", "k_proj", "v_proj"]))
    fuse_lora(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    for _ in range(2):
        model(input_ids=torch.randint(0, 60, (2, 9))).last_hidden_state.sum().backward()
    assert all(w.grad is not None for w in model.parameters() if w.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_with_dropout_keep_pefts_path(kind):
    assert fuse_lora(lora_model(torch.float32, kind, dropout=0.1)) == 0


def test_no_gradient_is_made_for_an_input_that_needs_none():
    model = lora_model(torch.float32)
    fuse_lora(model)
    x = torch.randn(5, 24)
    model(x).sum().backward()
    assert x.grad is None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_fused_norm_is_transformers(dtype, tolerance):
    """bfloat16: one rounding of 1 / 256 more or less in each direction."""
    torch.manual_seed(0)
    theirs = LlamaRMSNorm(48).to(dtype).requires_grad_(False)
    theirs.weight.uniform_(0.5, 1.5)
    ours = copy.deepcopy(theirs)
    assert fuse_norms(ours) == 1
    x = (3 * torch.randn(2, 5, 48)).to(dtype)
    results = []
    for norm in (ours, theirs):
        given = x.clone().requires_grad_()
        y = norm(given)
        results.append((y, *torch.autograd.grad((y.float() ** 3).sum(), given)))
    for a, b in zip(*results, strict=True):
        assert (a - b).float().norm() <= tolerance * b.float().norm()


def test_norms_of_another_kind_or_that_learn_are_left_alone():
    gemma = GemmaRMSNorm(16).requires_grad_(False)
    gemma.variance_epsilon = gemma.eps
    gemma.weight.fill_(0.3)
    assert fuse_norms(gemma) == 0
    assert fuse_norms(LlamaRMSNorm(16)) == 0


def tiny_llama(**options) -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )
    return LlamaModel(config)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_turned_heads_are_transformers(dtype, tolerance):
    """Output and the gradients of all weights. bfloat16: two roundings of 1 / 256 where
    transformers has three."""
    theirs = tiny_llama().to(dtype)
    ours = copy.deepcopy(theirs)
    own = modeling_llama.apply_rotary_pos_emb
    assert fuse_rotary(ours) == 2
    assert modeling_llama.apply_rotary_pos_emb is own
    ids = torch.randint(0, 60, (2, 9))
    grads = []
    for model in (ours, theirs):
        model(ids).last_hidden_state.float().pow(3).sum().backward()
        grads.append([weight.grad for weight in model.parameters()])
    # Not the key's bias-like directions alone: queries and keys both get gradients.
    assert all(grad.abs().max() > 0 for grad in grads[0])
    for a, b in zip(*grads, strict=True):
        assert (a - b).float().norm() <= tolerance * b.float().norm()
    assert torch.allclose(
        ours(ids).last_hidden_state, theirs(ids).last_hidden_state, atol=tolerance
    )


def test_heads_that_are_turned_another_way_are_left_alone(monkeypatch):
    """GPT-NeoX turns a part of each head, in a function of the same name; and one that pairs
    neighbours in place of halves."""
    neox = GPTNeoXModel(
        GPTNeoXConfig(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            rotary_pct=0.5,
        )
    )
    ids = torch.randint(0, 60, (2, 9))
    expected = neox(ids).last_hidden_state
    fuse_rotary(neox)
    assert torch.equal(neox(ids).last_hidden_state, expected)

    def neighbours(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        turned = [torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) for x in (q, k)]
        return q * cos + turned[0] * sin, k * cos + turned[1] * sin

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", neighbours)
    assert fuse_rotary(tiny_llama()) == 0
