"""Whatever the prompts, the heads and the settings: the same tokens as generate()."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.speculate.decode import Writer
from tasks.speculate.heads import HeadsConfig, TurboHeads
from tasks.speculate.pace import WIDTHS, Fixed
from tasks.speculate.parts import parts_of

#: Few tokens and few positions: texts repeat, ends are met, and the context ends within drafts.
VOCABULARY, POSITIONS = 7, 20

prompts_of = st.lists(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=POSITIONS),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module")
def models(make: Any) -> dict[str, Any]:
    return {
        "llama": make["llama"](vocab_size=VOCABULARY, max_position_embeddings=POSITIONS),
        "gpt2": make["gpt2"](positions=POSITIONS),
    }


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    name=st.sampled_from(["llama", "gpt2"]),
    prompts=prompts_of,
    room=st.integers(1, 2 * POSITIONS),
    ends=st.frozensets(st.integers(0, VOCABULARY - 1), max_size=2),
    heads=st.integers(0, 6),
    state=st.sampled_from([0, 3]),
    noise=st.sampled_from([0.0, 0.05, 1.0]),
    lookup=st.booleans(),
    nodes=st.sampled_from([*WIDTHS, None]),
)
def test_the_same_tokens(
    models: dict[str, Any],
    name: str,
    prompts: list[list[int]],
    room: int,
    ends: frozenset[int],
    heads: int,
    state: int,
    noise: float,
    lookup: bool,
    nodes: int | None,
) -> None:
    model = models[name]
    parts = parts_of(model)
    made = None
    if heads:
        vocabulary, width = parts.scored.shape
        made = TurboHeads(HeadsConfig(heads, 2, state, width, vocabulary))
        generator = torch.Generator().manual_seed(heads)
        for parameter in made.parameters():
            parameter.data += noise * torch.randn(parameter.shape, generator=generator)
    pace = None if nodes is None else Fixed(nodes)
    answers, account = Writer(parts, made, lookup=lookup, pace=pace).write(prompts, room, ends)
    assert account.tokens == sum(map(len, answers))
    for prompt, answer in zip(prompts, answers, strict=True):
        # One token behind the last position: no pass reads it.
        longest = min(room, POSITIONS - len(prompt) + 1)
        with torch.no_grad():
            ids = model.generate(
                torch.tensor([prompt]),
                # Without it, a prompt's token 0 would be taken for padding.
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=longest,
                eos_token_id=sorted(ends) or None,
            )
        assert answer == ids[0, len(prompt) :].tolist()
