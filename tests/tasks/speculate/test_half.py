"""In bfloat16 a sum in another order is another number: it may show only where two tokens were
all but equally likely.

The loop with drafts against the loop without *at the same query shape*: every pass has as many
nodes, and the drafts come from heads that learned the model, or from heads that are never right,
so that a pass brings one token. Between the two a token stands at another slot, in another row of
each product, and before another number of slots; none of the three may show.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tasks.speculate.cache import LANES
from tasks.speculate.decode import Writer
from tasks.speculate.heads import TurboHeads
from tasks.speculate.pace import Fixed
from tasks.speculate.parts import parts_of

NEW, NODES = 24, 8


@pytest.fixture(scope="module")
def model(make: Any) -> Any:
    return make["llama"]().to(torch.bfloat16)


def noise(model: Any, texts: list[list[int]]) -> float:
    """The most that a logit of bfloat16 is away from the same weights' in float32."""
    ids = torch.tensor(texts)
    with torch.no_grad():
        half = model(ids).logits.float()
        whole = model.float()(ids).logits
    model.to(torch.bfloat16)
    return float((half - whole).abs().max())


def gap(model: Any, text: list[int]) -> float:
    """Between the two likeliest next tokens, in float32."""
    with torch.no_grad():
        best = model.float()(torch.tensor([text])).logits[0, -1].topk(2).values
    model.to(torch.bfloat16)
    return float(best[0] - best[1])


def test_only_near_ties_differ(small: Any, model: Any) -> None:
    prompts = [prompt[:1] * 2 + prompt[:6] for prompt in small.prompts if len(prompt) >= 6][:64]
    texts = model.generate(torch.tensor(prompts), max_new_tokens=NEW).tolist()
    torch.manual_seed(0)
    wrong = TurboHeads(small.heads.config)
    for parameter in wrong.parameters():
        parameter.data = 3 * torch.randn_like(parameter)
    parts = parts_of(model)
    found, brought = {}, {}
    for name, heads in (("right", small.heads), ("wrong", wrong), ("none", None)):
        writer = Writer(parts, heads, lookup=name == "right", pace=Fixed(NODES))
        answers, account = writer.write(prompts, NEW)
        found[name] = [[*prompt, *new] for prompt, new in zip(prompts, answers, strict=True)]
        brought[name] = account.tokens_per_pass
    # Else this would show nothing. The wrong ones hit by chance, 7 of 96 tokens being tried.
    assert brought["right"] > 1.2 > 1.1 > brought["wrong"]
    assert brought["none"] == 1
    assert found["right"] == found["wrong"]
    allowed = 2 * noise(model, texts)
    for one, other in (
        (found["right"], texts),
        (found["none"], texts),
    ):
        differ = 0
        for own, reference in zip(one, other, strict=True):
            pairs = zip(own, reference, strict=True)
            first = next((at for at, (a, b) in enumerate(pairs) if a != b), None)
            if first is not None:
                differ += 1
                assert gap(model, reference[:first]) <= allowed
        # Most are the same to the last token: 50 of 64, of a model that nobody trained.
        assert differ < 0.5 * len(one)


@pytest.mark.parametrize("width", [8, 64])
def test_attention_over_whole_lanes_has_the_bits_of_any_slot_and_any_row(width: int) -> None:
    """The property of SDPA's kernel on a CPU that the cache is made for. Over `LANES` slots more or
    less, at another row and beside other queries, a query's result is the same to the bit. With
    what is left over of the lanes it is not: else `whole_lanes` would be for nothing."""
    draw = torch.Generator().manual_seed(0)
    sure, slots = 4 * LANES - 9, 4 * LANES

    def drawn(count: int) -> torch.Tensor:
        return torch.randn(4, 4, count, width, generator=draw).to(torch.bfloat16)

    keys, values, queries = drawn(slots + LANES), drawn(slots + LANES), drawn(NODES)

    def attend(count: int, order: list[int]) -> torch.Tensor:
        seen = (torch.arange(count) < sure).expand(1, 1, NODES, -1)
        found = torch.nn.functional.scaled_dot_product_attention(
            queries[:, :, order], keys[:, :, :count], values[:, :, :count], attn_mask=seen
        )
        return found[:, :, torch.tensor(order).argsort()]

    forward = list(range(NODES))
    once = attend(slots, forward)
    assert torch.equal(attend(slots + LANES, forward), once)
    assert torch.equal(attend(slots, forward[::-1]), once)
    assert not torch.equal(attend(sure, forward), once)
