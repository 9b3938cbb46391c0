"""With drafts, texts are drawn from the model's own distribution, and from nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chi2
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tasks.speculate.choose import Sampled
from tasks.speculate.decode import Writer
from tasks.speculate.model import TurboModel
from tasks.speculate.pace import Fixed
from tasks.speculate.parts import parts_of

V, LENGTH, DRAWS = 12, 3, 6000
SETTINGS: dict[str, dict[str, float]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 4},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.1},
    "all": {"temperature": 1.4, "top_k": 8, "top_p": 0.9},
}
WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}


@pytest.fixture(scope="module")
def model(make: Any) -> Any:
    return make["llama"](vocab_size=V)


def exact(model: Any, prompt: list[int], settings: dict[str, float]) -> torch.Tensor:
    """The chance of each text of three tokens, [V, V, V]: every one of them asked of the model."""
    shape = LogitsProcessorList(WARPERS[name](value) for name, value in settings.items())

    def after(texts: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([torch.tensor([prompt]).expand(len(texts), -1), texts], 1)
        with torch.no_grad():
            logits = model(ids).logits[:, -1].double()
        return shape(None, logits).softmax(-1)

    first_V = after(torch.zeros(1, 0, dtype=torch.long))[0]
    one = torch.arange(V)[:, None]
    second_VV = after(one)
    two = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    third_VVV = after(two).view(V, V, V)
    return first_V[:, None, None] * second_VV[:, :, None] * third_VVV


def surprise(counts: torch.Tensor, chance: torch.Tensor) -> float:
    """p of Pearson's test; texts expected fewer than 5 times are one cell, impossible ones must
    not have come."""
    counts, expected = counts.flatten().double(), chance.flatten() * counts.sum()
    if counts[expected == 0].sum():
        return 0.0
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    kept = expected > 0
    statistic = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    return float(chi2.sf(statistic, int(kept.sum()) - 1))


def drawn(writer: Writer, prompt: list[int], choice: Sampled) -> torch.Tensor:
    # Longer than what is counted, so that drafts are verified behind it too.
    rows = [prompt] * choice.drawn.shape[0]
    answers, account = writer.write(rows, LENGTH + 1, choice=choice)
    assert sum(n for length, n in account.lengths.items() if length > 1) > 0.05 * DRAWS
    counts = torch.zeros(V, V, V)
    texts = torch.tensor(answers)[:, :LENGTH]
    return counts.index_put_(tuple(texts.T), torch.ones(len(texts)), accumulate=True)


class Greedier(Sampled):
    """Wrong on purpose: behind the first token, the likeliest where it is likely enough. This is
    what acceptance by a threshold does."""

    def __call__(self, logits_BNV: torch.Tensor, rows: Any, position_BN: torch.Tensor) -> Any:
        chosen_BN = super().__call__(logits_BNV, rows, position_BN)
        best = logits_BNV.softmax(-1).max(-1)
        return torch.where((best.values > 0.15) & (position_BN > 0), best.indices, chosen_BN)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_models_own_distribution(model: Any, untaught: Any, name: str) -> None:
    parts, prompt = parts_of(model), [3, 1, 4]
    chance = exact(model, prompt, SETTINGS[name])
    writer = Writer(parts, untaught(parts), lookup=True, pace=Fixed(16))
    counts = drawn(writer, prompt, Sampled(DRAWS, LENGTH + 1, seed=0, **SETTINGS[name]))
    # By chance, one of a thousand seeds would fall below; this one is fixed.
    assert surprise(counts, chance) > 1e-3


def test_the_test_has_power(model: Any, untaught: Any) -> None:
    """The same draws, a rule that favours what is likely, and another setting, all stand out."""
    parts, prompt = parts_of(model), [3, 1, 4]
    chance = exact(model, prompt, {})
    writer = Writer(parts, untaught(parts), lookup=True, pace=Fixed(16))
    wrong = drawn(writer, prompt, Greedier(DRAWS, LENGTH + 1, seed=0))
    assert surprise(wrong, chance) < 1e-6
    near = drawn(writer, prompt, Sampled(DRAWS, LENGTH + 1, seed=0, temperature=0.8))
    assert surprise(near, chance) < 1e-6


@pytest.mark.parametrize("name", SETTINGS)
def test_one_seed_one_text(small: Any, name: str) -> None:
    """With heads, without, with any number of nodes: the same numbers write the same answers."""
    ids = torch.tensor([prompt[:1] * 6 for prompt in small.prompts[:4]])
    asked = {"max_new_tokens": 20, "do_sample": True, "top_k": 0, **SETTINGS[name]}
    texts = [
        TurboModel(small.model, heads, lookup=lookup, pace=Fixed(nodes)).generate(
            ids, seed=5, **asked
        )
        for heads, lookup, nodes in (
            (None, False, 1),
            (None, True, 8),
            (small.heads, False, 4),
            (small.heads, True, 64),
        )
    ]
    for text in texts[1:]:
        assert torch.equal(text, texts[0])
    other = TurboModel(small.model, None).generate(ids, seed=6, **asked)
    assert not torch.equal(other, texts[0])


def test_torchs_own_numbers(small: Any) -> None:
    """Without a seed, as in transformers: torch's generator says."""
    turbo = TurboModel(small.model, small.heads)
    ids = torch.tensor([[5, 6, 7]])
    torch.manual_seed(3)
    first, second = (turbo.generate(ids, do_sample=True, max_new_tokens=16) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(turbo.generate(ids, do_sample=True, max_new_tokens=16), first)
    assert not torch.equal(first, second)


def test_several_answers_to_one_prompt(small: Any) -> None:
    turbo = TurboModel(small.model, small.heads)
    found = turbo.generate(
        torch.tensor([[5, 6, 7]]), do_sample=True, max_new_tokens=16, num_return_sequences=3, seed=1
    )
    assert found.shape == (3, 19)
    assert len(found.unique(dim=0)) == 3
