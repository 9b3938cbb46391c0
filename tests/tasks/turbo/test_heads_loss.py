"""The loss and what it reads, against one position after another in float64."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from schemas.turbo import Turbo
from tasks.speculate.heads import HeadsConfig, TurboHeads
from tasks.turbo import loss as module
from tasks.turbo.distil import heads_loss, scored_by
from tasks.turbo.foresee import Ahead, foreseen, learned_from, left
from tasks.turbo.loss import HeadLoss, Scored, lanes, target_of
from tasks.turbo.states import Texts

D, V, K = 8, 11, 4
#: Some have fewer tokens than there are heads, one has none, and together they are several blocks
#: of the smallest size.
LENGTHS = [5, 1, 9, 0, 2, 230, 3, 4, 77, 1]
WEIGHTS = [1.0, 0.8, 0.64, 0.512]
TOTAL = sum(LENGTHS)


def texts(seed: int = 0, dtype: torch.dtype = torch.float32) -> Texts:
    generator = torch.Generator().manual_seed(seed)
    return Texts(
        torch.randn((TOTAL, D), generator=generator).to(dtype),
        torch.randint(0, V, (TOTAL,), generator=generator, dtype=torch.int32),
        torch.tensor([0, *itertools.accumulate(LENGTHS)]),
    )


def slow_left() -> list[int]:
    return [length - 1 - at for length in LENGTHS for at in range(length)]


def slow_loss(
    h_KTD: torch.Tensor,
    x_TD: torch.Tensor,
    scored: Scored,
    tokens_T: torch.Tensor,
    hard: float,
    places: list[int],
) -> torch.Tensor:
    """The formula of `tasks/turbo/loss.py`, a position and a head at a time, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    weight_VD = scored.weight_VD.double()
    bias_V = None if scored.bias_V is None else scored.bias_V.double()
    for t, (k, weight) in itertools.product(places, enumerate(WEIGHTS, start=1)):
        if slow_left()[t] < k:
            continue
        linear = torch.nn.functional.linear
        p_V = linear(x_TD[t + k].double(), weight_VD, bias_V).softmax(-1)
        logq_V = linear(h_KTD[k - 1, t], weight_VD, bias_V).log_softmax(-1)
        divergence = (p_V * (p_V.log() - logq_V)).sum()
        surprise = -logq_V[int(tokens_T[t + k])]
        total = total + weight * ((1 - hard) * divergence + hard * surprise)
    return total


def drawn(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> tuple[torch.Tensor, Scored]:
    """What heads would have an lm_head read, in the dtype, and that lm_head."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(K, TOTAL, D), (V, D), (V,)]
    h, weight, offset = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return h, Scored(weight, offset if bias else None)


def fast_loss(h_KTD: torch.Tensor, some: Texts, scored: Scored, hard: float) -> torch.Tensor:
    """The same for all positions, with the parts that training puts together."""
    tokens_T, left_T = some.tokens_T.long(), left(some)
    scored = Scored.of(scored.weight_VD, scored.bias_V)
    target = target_of(some.states_TD, tokens_T, scored, hard)
    loss = torch.zeros(())
    for k, weight in enumerate(WEIGHTS, start=1):
        after_T = (torch.arange(TOTAL) + k).clamp(max=TOTAL - 1)
        weights_T = weight * (left_T >= k)
        loss = loss + HeadLoss.apply(h_KTD[k - 1], target.at(after_T), weights_T, scored)
    return loss


def test_how_much_of_each_text_is_left() -> None:
    assert left(texts()).tolist() == slow_left()


@pytest.mark.parametrize("block", [1, 1 << 30], ids=["blocks", "whole"])
@pytest.mark.parametrize("hard", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradient_are_those_of_the_formula(monkeypatch, block, hard, bias) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    some = texts()
    h, scored = drawn(bias=bias)
    h.requires_grad_()
    found = fast_loss(h, some, scored, hard)
    (3 * found).backward()

    exact = h.detach().double().requires_grad_()
    wanted = slow_loss(exact, some.states_TD, scored, some.tokens_T, hard, list(range(TOTAL)))
    (3 * wanted).backward()
    # A loss is what is left of numbers up to 20 in float32, each good to 1e-7 of itself.
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert torch.allclose(h.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    for k in range(1, K + 1):
        silent = torch.tensor([rest < k for rest in slow_left()])
        assert not h.grad[k - 1, silent].any(), "nothing is told past the end of a text"


def test_a_head_that_says_what_the_model_says_has_nothing_to_learn() -> None:
    """The difference of two mean rows, not of two sets of logits, is zero to the bit."""
    some = texts()
    _, scored = drawn()
    target = target_of(some.states_TD, some.tokens_T.long(), scored, 0.0)
    h_TD = some.states_TD.clone().requires_grad_()
    loss = HeadLoss.apply(h_TD, target, torch.ones(TOTAL), scored)
    loss.backward()
    assert not h_TD.grad.any()
    # Of 300 positions, each what is left of numbers up to 20 that cancel.
    assert abs(loss.item()) < 300 * 20 * 2**-23


def test_a_step_along_the_gradient_changes_the_loss_by_its_length() -> None:
    """The loss of a head is its own: no reference stands between the two."""
    some = texts()
    h, scored = drawn()
    h.requires_grad_()
    fast_loss(h, some, scored, 0.3).backward()
    step = 1e-1 * h.grad / h.grad.norm()
    with torch.no_grad():
        values = [float(fast_loss(at, some, scored, 0.3)) for at in (h + step, h - step)]
    # Central differences: float32's rounding of the loss over the step, 1e-3 of the change.
    assert (values[0] - values[1]) / 2 == pytest.approx(1e-1 * float(h.grad.norm()), rel=1e-2)


def test_a_bfloat16_model_is_taught_with_its_own_rounding() -> None:
    """Products are rounded to 8 bits, as the model's own are; softmax and sums are not."""
    some = texts(dtype=torch.bfloat16)
    h, scored = drawn(torch.bfloat16)
    h.requires_grad_()
    found = fast_loss(h, some, scored, 0.3)
    found.backward()
    exact = h.detach().double().requires_grad_()
    wanted = slow_loss(exact, some.states_TD, scored, some.tokens_T, 0.3, list(range(TOTAL)))
    wanted.backward()
    # A logit of up to 10 is rounded by up to 0.03, a row of the lm_head to 2^-9 of itself.
    assert found.item() == pytest.approx(wanted.item(), rel=2e-2)
    assert h.grad.dtype == torch.bfloat16
    assert float((h.grad - exact.grad).norm() / exact.grad.norm()) < 3e-2


def test_what_all_rows_of_the_lm_head_share_does_not_drown_the_gradient() -> None:
    """Rows with a part in common of three times their spread, as of many models, in bfloat16; a
    head near the model, where mean rows nearly cancel."""
    generator = torch.Generator().manual_seed(8)
    shapes = [(2048, 256), (256,), (64, 256), (64, 256)]
    spread, common, x, apart = (torch.randn(shape, generator=generator) for shape in shapes)
    weight = (0.2 * (spread + 3 * common)).bfloat16()
    x_CD = x.bfloat16()
    h_CD = (x + 0.1 * apart).bfloat16().requires_grad_()
    scored = Scored.of(weight, None)
    target = target_of(x_CD, torch.zeros(64, dtype=torch.long), scored, 0.0)
    HeadLoss.apply(h_CD, target, torch.ones(64), scored).backward()

    exact = h_CD.detach().double().requires_grad_()
    own, theirs = (at.double() @ weight.double().T for at in (exact, x_CD))
    torch.nn.functional.kl_div(own.log_softmax(-1), theirs.softmax(-1), reduction="sum").backward()
    # 0.08, as where rows share nothing. Without their mean taken off 0.18.
    assert float((h_CD.grad - exact.grad).norm() / exact.grad.norm()) < 0.12


def test_logits_far_apart_stay_finite() -> None:
    """A token whose share underflows, written all the same."""
    scored = Scored(200 * torch.eye(3), None)
    h_CD = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    target = target_of(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([1]), scored, 0.5)
    loss = HeadLoss.apply(h_CD, target, torch.ones(1), scored)
    loss.backward()
    assert loss.item() == pytest.approx(200)
    assert h_CD.grad.tolist() == [[200, -200, 0]]


def parts(dtype: torch.dtype = torch.float32) -> Any:
    """An lm_head and embeddings, apart from each other."""
    generator = torch.Generator().manual_seed(5)
    embeddings = torch.randn((V, D), generator=generator).to(dtype)
    head = torch.nn.Linear(D, V)
    with torch.no_grad():
        for weight in head.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    head.requires_grad_(False).to(dtype)
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


def everywhere() -> Ahead:
    return Ahead.of(left(texts()), torch.arange(TOTAL), K)


def test_positions_with_most_text_to_come_are_first_and_fill_whole_lanes() -> None:
    some = torch.from_numpy(np.random.default_rng(0).permutation(TOTAL)[:50])
    ahead = Ahead.of(left(texts()), some, K)
    assert sorted(ahead.at_C[:50].tolist()) == sorted(some.tolist())
    assert len(ahead.at_C) == lanes(50) == 128
    for k, (count, rows) in enumerate(zip(ahead.counts_K, ahead.rows_K, strict=True), start=1):
        places = ahead.at_C[:50].tolist()
        assert {at for at in places if slow_left()[at] >= k} == set(places[:count])
        assert rows == lanes(count)
        assert ahead.after(k, k)[:count].tolist() == [at + k for at in places[:count]]


@pytest.mark.parametrize("state", [0, 6])
@pytest.mark.parametrize("with_state", [False, True])
def test_what_heads_foresee_is_what_a_draft_that_was_right_so_far_reads(state, with_state) -> None:
    heads, some, around = learned(state), texts(), parts()
    ahead = everywhere()
    found = foreseen(heads, around, some.states_TD, some.tokens_T.long(), with_state, ahead)
    assert [len(h_CD) for h_CD in found] == ahead.rows_K
    for row, t in enumerate(ahead.at_C[: ahead.counts_K[0]].tolist()):
        x_1D = some.states_TD[t : t + 1]
        begun_1S = heads.begin(x_1D) if state else None
        state_1S = None
        for k in range(1, min(K, slow_left()[t]) + 1):
            wanted_1D = heads.ahead(x_1D)[k - 1]
            if with_state and state:
                token_1D = around.embed(some.tokens_T[t + k - 1 : t + k].long())
                state_1S = heads.follow(state_1S, heads.read(token_1D), begun_1S)
                wanted_1D = wanted_1D + heads.correction(state_1S)
            # Products of 8 numbers in another order.
            assert torch.allclose(found[k - 1][row], wanted_1D[0], atol=1e-5)


def test_heads_begin_as_the_models_own_guess() -> None:
    """B and C are zero: each head has the lm_head read x itself, to the bit."""
    heads, some = TurboHeads(HeadsConfig(K, 3, 6, D, V), seed=3), texts()
    ahead = everywhere()
    for h_CD in foreseen(heads, parts(), some.states_TD, some.tokens_T.long(), True, ahead):
        assert torch.equal(h_CD, some.states_TD[ahead.at_C[: len(h_CD)]])


@pytest.mark.parametrize("positions", [0.3, 1.0])
@pytest.mark.parametrize("with_state", [False, True])
def test_the_loss_is_a_mean_over_what_is_foreseen_and_reaches_every_weight(
    with_state, positions
) -> None:
    heads, some, around = learned(6), texts(), parts()
    turbo = Turbo(heads=K, hard=0.3, decay=0.8, positions=positions)
    at_C = learned_from(some, turbo, step=4)
    found = heads_loss(heads, around, scored_by(around), some, turbo, with_state, at_C)
    every = everywhere()
    h_KTD = torch.zeros((K, TOTAL, D), dtype=torch.float64)
    with torch.no_grad():
        read = foreseen(heads, around, some.states_TD, some.tokens_T.long(), with_state, every)
    for h_TD, h_CD, count in zip(h_KTD, read, every.counts_K, strict=True):
        h_TD[every.at_C[:count]] = h_CD[:count].double()
    head = around.lm_head
    scored = Scored(head.weight, head.bias)
    total = slow_loss(h_KTD, some.states_TD, scored, some.tokens_T, 0.3, at_C.tolist())
    rest = [slow_left()[at] for at in at_C.tolist()]
    told = sum(w * sum(one >= k for one in rest) for k, w in enumerate(WEIGHTS, start=1))
    assert found.item() == pytest.approx(float(total) / told, rel=1e-5)
    found.backward()
    reached = {name for name, weight in heads.named_parameters() if weight.grad is not None}
    own = {"down_KRD", "up_KDR", "bias_KD"}
    assert reached == (set(dict(heads.named_parameters())) if with_state else own)
    assert head.weight.grad is None


def test_a_step_learns_from_a_share_of_what_can_be_foreseen_another_each_time() -> None:
    some = texts()
    useful = {at for at, rest in enumerate(slow_left()) if rest}
    turbo = Turbo(positions=0.25)
    first, second, again = (learned_from(some, turbo, step).tolist() for step in (0, 1, 0))
    assert first == again != second
    assert len(set(first)) == len(first) == -(-len(useful) // 4)
    assert set(first) < useful
    assert set(learned_from(some, Turbo(positions=1), 0).tolist()) == useful


def test_texts_of_a_token_each_teach_nothing_and_break_nothing() -> None:
    some = Texts(torch.randn(3, D), torch.tensor([1, 2, 3]), torch.arange(4))
    heads, turbo = learned(6), Turbo(heads=K)
    around = parts()
    at_C = learned_from(some, turbo, 0)
    loss = heads_loss(heads, around, scored_by(around), some, turbo, True, at_C)
    loss.backward()
    assert loss.item() == 0
    assert all(weight.grad is None or not weight.grad.any() for weight in heads.parameters())


def test_a_step_in_bfloat16_points_where_float32_points() -> None:
    """The heads' own products too are made in the model's dtype; the gradients are float32."""
    turbo, found = Turbo(heads=K, positions=1), []
    for dtype in (torch.float32, torch.bfloat16):
        heads, some = learned(6), texts(dtype=dtype)
        around = parts(dtype)
        every_T = torch.arange(TOTAL)
        loss = heads_loss(heads, around, scored_by(around), some, turbo, True, every_T)
        loss.backward()
        assert all(weight.grad.dtype == torch.float32 for weight in heads.parameters())
        found.append(torch.cat([weight.grad.flatten() for weight in heads.parameters()]))
    # Numbers of 8 bits, three products deep.
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 0.05
