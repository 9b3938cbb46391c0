"""The fused layers are PEFT's and transformers' own, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tasks.methods.fused import fuse_lora
from tasks.train.norm import fuse_norms


class Two(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(24, 40, dtype=dtype)
        self.second = nn.Linear(40, 16, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def lora_model(dtype: torch.dtype, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["first", "second"])
    model = get_peft_model(Two(dtype), config)
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            nn.init.normal_(layer.lora_B["default"].weight)
    return model


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
def test_fused_lora_is_pefts(dtype, tolerance):
    theirs = lora_model(dtype)
    ours = copy.deepcopy(theirs)
    assert fuse_lora(ours) == 2
    torch.manual_seed(1)
    x = torch.randn(3, 7, 24).to(dtype)
    for a, b in zip(outputs_and_gradients(ours, x), outputs_and_gradients(theirs, x), strict=True):
        assert a.dtype == b.dtype
        assert (a - b).float().norm() <= tolerance * b.float().norm()


def test_layers_with_dropout_keep_pefts_path():
    assert fuse_lora(lora_model(torch.float32, dropout=0.1)) == 0


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
