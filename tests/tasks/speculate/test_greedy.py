"""Greedy in float32, what is written with drafts is what transformers' generate() writes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from tasks.speculate.model import TurboModel
from tasks.speculate.pace import WIDTHS, Fixed

#: Tokens asked for of each batch in turn, so that limits fall inside drafts.
ROOMS = (24, 23, 17, 20, 9, 24, 13, 22, 1, 24, 2, 19, 6)
#: name: heads, lookup, nodes (None: as many as pay).
DECODERS = {
    **{f"both-{width}": (True, True, width) for width in WIDTHS},
    **{f"heads-{width}": (True, False, width) for width in (4, 16)},
    "lookup-8": (False, True, 8),
    "both-adaptive": (True, True, None),
    "nothing": (False, False, None),
}
#: Those that have all 560 prompts of the five models; the others have the first 35 of each.
WHOLE = ("both-16", "heads-4", "both-adaptive")


def padded(prompts: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids, mask = [], []
    for prompt in prompts:
        fill = [0] * (longest - len(prompt))
        ones = [1] * len(prompt)
        ids.append(fill + prompt if side == "left" else prompt + fill)
        mask.append(fill + ones if side == "left" else ones + fill)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def ending(speaker: Any) -> int:
    """A token that about a third of the answers come to."""
    batch = padded(speaker.prompts)
    start = batch["input_ids"].shape[1]
    answers = speaker.model.generate(**batch, max_new_tokens=24)[:, start:].tolist()
    seen = Counter(token for answer in answers for token in set(answer))
    return min(seen, key=lambda token: abs(seen[token] - len(answers) / 3))


@pytest.fixture(scope="module")
def expected(speaker: Any) -> tuple[int, list[torch.Tensor]]:
    """The end token, and what generate() gives for each batch."""
    end = ending(speaker)
    found = [
        speaker.model.generate(**padded(batch), max_new_tokens=room, eos_token_id=end)
        for batch, room in zip(speaker.batches(), ROOMS, strict=True)
    ]
    return end, found


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_same_tokens(speaker: Any, expected: Any, decoder: str) -> None:
    heads, lookup, nodes = DECODERS[decoder]
    end, references = expected
    turbo = TurboModel(
        speaker.model,
        speaker.heads if heads else None,
        lookup=lookup,
        pace=None if nodes is None else Fixed(nodes),
    )
    brought: Counter[int] = Counter()
    ended = 0
    count = len(ROOMS) if decoder in WHOLE else 5
    for batch, room, reference in list(zip(speaker.batches(), ROOMS, references, strict=True))[
        :count
    ]:
        found = turbo.generate(**padded(batch), max_new_tokens=room, eos_token_id=end)
        assert torch.equal(found, reference)
        brought += Counter(turbo.account.lengths)
        ended += int((reference[:, -room:] == end).any(1).sum())
    # Else this would show nothing: answers did end early, and drafts were right.
    assert ended > 2
    drafted = sum(n for length, n in brought.items() if length > 1)
    if nodes == 1 or decoder == "nothing":
        assert not drafted
    elif nodes is not None:
        # The quickstart's short answers seldom copy.
        assert drafted > (0.005 if decoder == "lookup-8" else 0.1) * sum(brought.values())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [1, 3])
def test_padding_on_either_side(small: Any, side: str, rows: int) -> None:
    """Padded behind, a prompt has the answer that it has by itself; generate() cannot do that."""
    prompts = small.prompts[:rows]
    turbo = TurboModel(small.model, small.heads, pace=Fixed(16))
    batch = padded(prompts, side)
    found = turbo.generate(**batch, max_new_tokens=12)
    assert torch.equal(found[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    for prompt, row in zip(prompts, found, strict=True):
        alone = small.model.generate(torch.tensor([prompt]), max_new_tokens=12)[0, len(prompt) :]
        assert torch.equal(row[batch["input_ids"].shape[1] :], alone)


@pytest.mark.parametrize("prompt", [1, 30, 44, 47, 48])
def test_the_last_position(make: Any, untaught: Any, prompt: int) -> None:
    """GPT-2 has a row of weights for each position: behind the last there is nothing to read.
    The token after the last position needs none itself, and drafts behind it are never kept."""
    model = make["gpt2"](positions=48)
    room = 48 - prompt + 1
    ids = torch.tensor([[1, 2, 3, 4] * 12])[:, :prompt]
    expected = model.generate(ids, max_new_tokens=room)
    for nodes in (1, 16, 64):
        turbo = TurboModel(model, None, pace=Fixed(nodes))
        turbo = TurboModel(model, untaught(turbo.writer.parts, heads=8), pace=Fixed(nodes))
        assert torch.equal(turbo.generate(ids, max_new_tokens=room), expected)
        # More than that cannot be had; transformers fails with an IndexError here.
        assert torch.equal(turbo.generate(ids, max_new_tokens=room + 9), expected)


def test_answers_that_end_early_make_room(small: Any) -> None:
    """Rows that end leave the pass; those at the end of the batch take their places."""
    batch = padded(small.prompts[:16])
    start = batch["input_ids"].shape[1]
    whole = small.model.generate(**batch, max_new_tokens=20)[:, start:]
    # Each row's own place of ending: tokens of other rows' answers are ends too.
    ends = whole[:, 3].unique()[:4].tolist()
    expected = small.model.generate(**batch, max_new_tokens=20, eos_token_id=ends)
    for nodes in (1, 8, 64):
        turbo = TurboModel(small.model, small.heads, pace=Fixed(nodes))
        found = turbo.generate(**batch, max_new_tokens=20, eos_token_id=ends)
        assert torch.equal(found, expected)
        assert turbo.account.nodes < 16 * nodes * turbo.account.passes
