"""FLOPs of operations against two for each multiply-add."""

from __future__ import annotations

import torch

from tasks.core.flops import FlopCounter

N, IN, OUT = 3, 64, 32


def counted(work) -> float:
    counter = FlopCounter()
    with counter:
        work()
    return counter.flops


def test_products_are_counted_in_place_or_not() -> None:
    x_NI, w_IO, out_NO = torch.ones(N, IN), torch.ones(IN, OUT), torch.ones(N, OUT)
    product = 2 * N * IN * OUT
    assert counted(lambda: x_NI @ w_IO) == product
    assert counted(lambda: torch.addmm(out_NO, x_NI, w_IO)) == product
    assert counted(lambda: out_NO.addmm_(x_NI, w_IO)) == product
    batch_BNI, batch_BIO = torch.ones(5, N, IN), torch.ones(5, IN, OUT)
    assert counted(lambda: torch.ones(5, N, OUT).baddbmm_(batch_BNI, batch_BIO)) == 5 * product
    assert counted(lambda: out_NO.add_(1).mul_(2).relu_()) == 0


def test_a_backward_pass_has_a_product_for_each_gradient() -> None:
    x_NI = torch.ones(N, IN, requires_grad=True)
    layer = torch.nn.Linear(IN, OUT)
    loss = layer(x_NI).sum()
    assert counted(loss.backward) == 2 * 2 * N * IN * OUT
    layer.requires_grad_(False)
    assert counted(layer(x_NI).sum().backward) == 2 * N * IN * OUT


def test_a_product_of_four_bits_counts_as_the_layer_that_it_stands_for() -> None:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(IN, OUT, bias=False, quant_type="nf4")
    layer.load_state_dict({"weight": torch.randn(OUT, IN)})
    layer = layer.to("cpu")
    x_NI = torch.ones(N, IN)
    layer(x_NI)  # which quantises what was not yet
    assert counted(lambda: layer(x_NI)) == 2 * N * IN * OUT
