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
    expected = OPERATIONS[name](real)
    # The second answer is one that is remembered.
    answers = [OPERATIONS[name](hollow(real)) for _ in range(2)]
    several = name.startswith("layer")
    pairs = [
        pair
        for found in answers
        for pair in (zip(expected, found, strict=True) if several else [(expected, found)])
    ]
    for one, other in pairs:
        assert isinstance(other, Hollow)
        assert (one.shape, one.dtype, one.stride(), one.device) == (
            (other.shape, other.dtype, other.stride(), other.device)
        )
        assert other.room.nbytes == one.untyped_storage().nbytes()


def test_a_view_shares_the_storage_and_a_change_in_place_gives_the_tensor_itself() -> None:
    for x in (hollow(torch.empty(4, 6)), hollow(torch.empty(4, 6))):
        assert x.view(6, 4).room is x.room
        assert x.view(6, 4)[1:].T.room is x.room
        assert (x + 1).room is not x.room
        assert x.add_(1) is x
        assert torch.add(x, x, out=x) is x
        # Of two tensors that are alike, the one that it is a view of.
        assert torch.add(hollow(x), 1, out=x[:]).room is x.room


def test_what_is_remembered_is_told_apart_by_all_that_an_answer_depends_on() -> None:
    whole, real = hollow(torch.empty(4, 6).int()), torch.ones(4, 6).int()
    for _ in range(2):
        for factor in (1, 1.0, True):
            assert (whole * factor).dtype == (real * factor).dtype
        for x, y in ((whole, real), (whole.T, real.T), (whole[1:], real[1:])):
            found, expected = x.float().as_strided((2, 2), (1, 2)), y.float()
            assert found.shape == (2, 2)
            assert found.room.nbytes == expected.untyped_storage().nbytes()
            assert x.clone().stride() == y.clone().stride()
            assert x[:, 1:].storage_offset() == y[:, 1:].storage_offset()
        assert whole.sum(0).shape == (6,)
        assert whole.sum(1).shape == (4,)
        assert whole.to(torch.float64).room.nbytes == 2 * whole.to(torch.float32).room.nbytes


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
