"""The loss and what it reads, against one position after another in float64."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from schemas.turbo import Turbo
from tasks.speculate.heads import HeadsConfig, TurboHeads
from tasks.turbo import loss as module
from tasks.turbo.distil import foreseen, heads_loss, left
from tasks.turbo.loss import HeadsLoss
from tasks.turbo.states import Texts

D, V, K = 8, 11, 4
#: Some have fewer tokens than there are heads, one has none, and all are several blocks.
LENGTHS = [5, 1, 9, 0, 2, 30, 3, 4, 17, 1]
WEIGHTS = [1.0, 0.8, 0.64, 0.512]


def texts(seed: int = 0, dtype: torch.dtype = torch.float32) -> Texts:
    generator = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)
    return Texts(
        torch.randn((total, D), generator=generator).to(dtype),
        torch.randint(0, V, (total,), generator=generator, dtype=torch.int32),
        torch.tensor([0, *itertools.accumulate(LENGTHS)]),
    )


def slow_left() -> list[int]:
    return [length - 1 - at for length in LENGTHS for at in range(length)]


def slow_loss(
    h_KTD: torch.Tensor,
    x_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    tokens_T: torch.Tensor,
    hard: float,
) -> torch.Tensor:
    """The formula of `tasks/turbo/loss.py`, a position and a head at a time."""
    total = torch.zeros((), dtype=torch.float64)
    linear = torch.nn.functional.linear
    for t, (k, weight) in itertools.product(range(len(x_TD)), enumerate(WEIGHTS, start=1)):
        if slow_left()[t] < k:
            continue
        p_V = linear(x_TD[t + k], weight_VD, bias_V).softmax(-1)
        logq_V = linear(h_KTD[k - 1, t], weight_VD, bias_V).log_softmax(-1)
        divergence = (p_V * (p_V.log() - logq_V)).sum()
        surprise = -logq_V[int(tokens_T[t + k])]
        total = total + weight * ((1 - hard) * divergence + hard * surprise)
    return total


def drawn(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> list[Any]:
    generator = torch.Generator().manual_seed(7)
    shapes = [(K, sum(LENGTHS), D), (V, D), (V,)]
    h, weight, offset = (torch.randn(shape, generator=generator) for shape in shapes)
    return [h, weight.to(dtype), offset.to(dtype) if bias else None]


def test_how_much_of_each_text_is_left() -> None:
    assert left(texts()).tolist() == slow_left()


@pytest.mark.parametrize("block", [1, 1 << 30], ids=["blocks", "whole"])
@pytest.mark.parametrize("hard", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradient_are_those_of_the_formula(monkeypatch, block, hard, bias) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    some = texts()
    h, weight, offset = drawn(bias=bias)
    h.requires_grad_()
    found = HeadsLoss.apply(
        h, some.states_TD, weight, offset, some.tokens_T, left(some), WEIGHTS, hard
    )
    (3 * found).backward()

    exact = h.detach().double().requires_grad_()
    doubles = [one if one is None else one.double() for one in (some.states_TD, weight, offset)]
    wanted = slow_loss(exact, *doubles, some.tokens_T, hard)
    (3 * wanted).backward()
    # Sums of some 100 logits' terms in float32, each good to 1e-7 of numbers up to 10.
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert torch.allclose(h.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    for k in range(1, K + 1):
        silent = torch.tensor([rest < k for rest in slow_left()])
        assert not h.grad[k - 1, silent].any(), "nothing is told past the end of a text"


def test_a_step_along_the_gradient_changes_the_loss_by_its_length() -> None:
    """The loss of a head is its own: no reference stands between the two."""
    some = texts()
    h, weight, offset = drawn()

    def value(at: torch.Tensor) -> torch.Tensor:
        return HeadsLoss.apply(
            at, some.states_TD, weight, offset, some.tokens_T, left(some), WEIGHTS, 0.3
        )

    h.requires_grad_()
    value(h).backward()
    step = 1e-2 * h.grad / h.grad.norm()
    with torch.no_grad():
        change = float(value(h + step) - value(h - step)) / 2
    # Central differences: float32's rounding of the loss over the step, 1e-3 of the change.
    assert change == pytest.approx(1e-2 * float(h.grad.norm()), rel=1e-2)


def test_a_bfloat16_model_is_taught_with_its_own_rounding() -> None:
    """Products are rounded to 8 bits, as the model's own are; softmax and sums are not."""
    some = texts(dtype=torch.bfloat16)
    h, weight, offset = drawn(torch.bfloat16)
    # 8-bit numbers, so that reference and loss start from the same.
    h = h.bfloat16().float().requires_grad_()
    found = HeadsLoss.apply(
        h, some.states_TD, weight, offset, some.tokens_T, left(some), WEIGHTS, 0.3
    )
    found.backward()
    exact = h.detach().double().requires_grad_()
    wanted = slow_loss(
        exact, some.states_TD.double(), weight.double(), offset.double(), some.tokens_T, 0.3
    )
    wanted.backward()
    # A logit of up to 10 is rounded by up to 0.03.
    assert found.item() == pytest.approx(wanted.item(), rel=2e-2)
    assert h.grad.dtype == torch.float32
    assert float((h.grad - exact.grad).norm() / exact.grad.norm()) < 3e-2


def parts(dtype: torch.dtype = torch.float32) -> Any:
    """An lm_head and embeddings, apart from each other."""
    generator = torch.Generator().manual_seed(5)
    embeddings = torch.randn((V, D), generator=generator).to(dtype)
    head = torch.nn.Linear(D, V)
    head.requires_grad_(False)
    return SimpleNamespace(
        embed=lambda ids: embeddings[ids],
        lm_head=head,
        scored=head.weight,
        device=torch.device("cpu"),
    )


def learned(state: int) -> TurboHeads:
    heads = TurboHeads(HeadsConfig(K, 3, state, D, V), seed=3)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in heads.parameters():
            weight += 0.5 * torch.randn(weight.shape, generator=generator)
    return heads


@pytest.mark.parametrize("state", [0, 6])
@pytest.mark.parametrize("with_state", [False, True])
def test_what_heads_foresee_is_what_a_draft_that_was_right_so_far_reads(state, with_state) -> None:
    heads, some, around = learned(state), texts(), parts()
    found = foreseen(heads, around, some.states_TD, some.tokens_T.long(), with_state)
    for t, rest in enumerate(slow_left()):
        x_1D = some.states_TD[t : t + 1]
        begun_1S = heads.begin(x_1D) if state else None
        state_1S = None
        for k in range(1, K + 1):
            wanted_1D = heads.ahead(x_1D)[k - 1]
            if with_state and state and rest >= k - 1:
                token_1D = around.embed(some.tokens_T[t + k - 1 : t + k].long())
                state_1S = heads.follow(state_1S, heads.read(token_1D), begun_1S)
                wanted_1D = wanted_1D + heads.correction(state_1S)
            if rest >= k:
                # Products of 8 numbers in another order.
                assert torch.allclose(found[k - 1, t], wanted_1D[0], atol=1e-5)


def test_heads_begin_as_the_models_own_guess() -> None:
    """B and C are zero: each head has the lm_head read x itself, to the bit."""
    heads, some = TurboHeads(HeadsConfig(K, 3, 6, D, V), seed=3), texts()
    found = foreseen(heads, parts(), some.states_TD, some.tokens_T.long(), True)
    assert torch.equal(found, some.states_TD.expand(K, -1, -1))


@pytest.mark.parametrize("with_state", [False, True])
def test_the_loss_is_a_mean_over_what_is_foreseen_and_reaches_every_weight(with_state) -> None:
    heads, some, around = learned(6), texts(), parts()
    turbo = Turbo(heads=K, hard=0.3, decay=0.8)
    found = heads_loss(heads, around, some, turbo, with_state)
    h_KTD = foreseen(heads, around, some.states_TD, some.tokens_T.long(), with_state).detach()
    head = around.lm_head
    total = slow_loss(
        h_KTD.double(),
        some.states_TD.double(),
        head.weight.double(),
        head.bias.double(),
        some.tokens_T,
        0.3,
    )
    told = sum(w * sum(rest >= k for rest in slow_left()) for k, w in enumerate(WEIGHTS, start=1))
    assert found.item() == pytest.approx(float(total) / told, rel=1e-5)
    found.backward()
    reached = {name for name, weight in heads.named_parameters() if weight.grad is not None}
    own = {"down_KRD", "up_KDR", "bias_KD"}
    assert reached == (set(dict(heads.named_parameters())) if with_state else own)
    assert head.weight.grad is None
