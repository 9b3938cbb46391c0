"""Hollow tensors answer as real ones on a CPU do, in all but numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tasks.cost.hollow import META, Hollow


def hollow(tensor: torch.Tensor) -> Hollow:
    return Hollow(torch.empty(tensor.shape, dtype=tensor.dtype, device=META))


OPERATIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "product": lambda x: x @ x.mT,
    "view": lambda x: x[:, 1:].transpose(0, 1),
    "softmax": lambda x: x.float().softmax(-1).to(x.dtype),
    "layer norm and its moments": lambda x: torch.native_layer_norm(x, [8], None, None, 1e-5),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "rows that a real index chooses": lambda x: x[torch.tensor([2, 0])],
    "losses": lambda x: F.cross_entropy(x.float().flatten(0, 1), torch.zeros(20).long()),
    "made like it": lambda x: torch.zeros_like(x, device="cpu"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_shapes_dtypes_strides_and_devices_are_those_of_a_cpu(
    name: str, dtype: torch.dtype
) -> None:
    real = torch.randn(4, 5, 8).to(dtype)
    expected, found = OPERATIONS[name](real), OPERATIONS[name](hollow(real))
    pairs = zip(expected, found, strict=True) if name.startswith("layer") else [(expected, found)]
    for one, other in pairs:
        assert isinstance(other, Hollow)
        assert (one.shape, one.dtype, one.stride(), one.device) == (
            (other.shape, other.dtype, other.stride(), other.device)
        )
        assert other.untyped_storage().nbytes() == one.untyped_storage().nbytes()


def test_a_view_shares_the_storage_and_a_change_in_place_gives_the_tensor_itself() -> None:
    x = hollow(torch.empty(4, 6))
    assert x.view(6, 4).untyped_storage()._cdata == x.untyped_storage()._cdata
    assert (x + 1).untyped_storage()._cdata != x.untyped_storage()._cdata
    assert x.add_(1) is x


def test_gradients_reach_a_hollow_weight() -> None:
    layer = nn.Linear(6, 3)
    weight = hollow(layer.weight)
    weight._is_param = True
    weight.requires_grad_(True)
    layer.weight = weight
    assert isinstance(layer.weight, nn.Parameter)
    layer(torch.randn(2, 6)).sum().backward()
    assert isinstance(weight.grad, Hollow)
    assert weight.grad.shape == weight.shape
