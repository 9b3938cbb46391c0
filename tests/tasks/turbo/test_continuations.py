"""What the model writes is what transformers would have it write, and what it read while it did."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from schemas.errors import UserError
from schemas.turbo import Turbo
from tasks.core.tokens import TokenRows
from tasks.speculate.decode import Writer
from tasks.speculate.parts import Parts, parts_of
from tasks.turbo import continuations, states
from tasks.turbo.continuations import Prompts, choose_prompts, continued, write
from tasks.turbo.states import States

CONTEXT, NEW_TOKENS, END = 48, 16, 2


@pytest.fixture(scope="module")
def parts(world) -> Parts:
    return parts_of(world.model())


def rows_of(*prompts: list[int]) -> TokenRows:
    """Rows with an answer of one token."""
    rows = [[*prompt, END] for prompt in prompts]
    return TokenRows(
        input_ids=np.concatenate(rows).astype(np.int32),
        offsets=np.cumsum([0, *map(len, rows)]),
        source_rows=np.arange(len(rows)) + 1,
        loss_mask=np.ones(sum(map(len, rows)), dtype=np.uint8),
        answer_start=np.array([len(prompt) for prompt in prompts]),
    )


def generated(model: Any, prompt: np.ndarray, longest: int = NEW_TOKENS) -> list[int]:
    ids_1T = torch.from_numpy(prompt.astype(np.int64))[None]
    return model.generate(
        input_ids=ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=longest,
        do_sample=False,
        eos_token_id=END,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()


def texts_of(found: states.Texts) -> list[list[int]]:
    ends = found.offsets.tolist()
    return [found.tokens_T[a:b].tolist() for a, b in pairwise(ends)]


def test_greedy_ones_are_generates_and_their_states_gave_them(world, parts) -> None:
    prompts = choose_prompts(world.rows, Turbo(sampled=0, prompts=40), CONTEXT - NEW_TOKENS)
    stops = frozenset({END})
    found = continued(prompts, slice(0, 40), Writer(parts), stops, NEW_TOKENS, Turbo(), 0)
    wanted = [generated(parts.model, prompt) for prompt in prompts.tokens]
    assert texts_of(found) == wanted
    assert len({len(text) for text in wanted}) > 3, "they must end at different places"
    with torch.no_grad():
        assert torch.equal(parts.lm_head(found.states_TD).argmax(-1), found.tokens_T.long())
        # What transformers calls the last hidden state is what the lm_head reads.
        prompt, answer = prompts.tokens[0], wanted[0]
        ids_1T = torch.tensor([[*prompt.tolist(), *answer]])
        hidden_TD = parts.model(ids_1T, output_hidden_states=True).hidden_states[-1][0]
    own_TD = hidden_TD[len(prompt) - 1 : -1]
    # Padded beside longer rows: sums over masked columns are in another order.
    assert torch.allclose(found.states_TD[: len(answer)], own_TD, atol=1e-4)


def test_the_seed_alone_decides_prompts_and_texts(world, parts, tmp_path) -> None:
    def texts(name: str, **changes: Any) -> list[list[int]]:
        turbo = Turbo(**({"prompts": 30, "temperature": 3.0} | changes))
        prompts = choose_prompts(world.rows, turbo, CONTEXT - NEW_TOKENS)
        shards = write(prompts, parts, frozenset({END}), NEW_TOKENS, turbo, tmp_path / name)
        whole = States(tmp_path / name, shards)
        return texts_of(whole.texts(np.arange(len(whole))))

    first = texts("first")
    assert texts("again") == first
    assert texts("other", seed=1) != first
    greedy, drawn = (texts(f"s{share}", sampled=share) for share in (0, 1))
    assert greedy != drawn
    prompts = choose_prompts(world.rows, Turbo(prompts=30), CONTEXT - NEW_TOKENS)
    for at, sampled in enumerate(prompts.sampled):
        assert sampled or first[at] == greedy[at]


def test_what_is_sampled_differs_from_shard_to_shard(world, parts) -> None:
    prompts = choose_prompts(world.rows, Turbo(prompts=8, sampled=1), CONTEXT - NEW_TOKENS)
    hot, everything = Turbo(temperature=3.0), slice(0, 8)
    one, same, other = (
        continued(prompts, everything, Writer(parts), frozenset(), 8, hot, number)
        for number in (0, 0, 1)
    )
    assert texts_of(one) == texts_of(same) != texts_of(other)


def test_shards_hold_the_prompts_in_order_and_damage_is_written_again(
    world, parts, tmp_path, monkeypatch, capfd
) -> None:
    monkeypatch.setattr(continuations, "SHARD", 7)
    turbo = Turbo(prompts=17)
    prompts = choose_prompts(world.rows, turbo, CONTEXT - NEW_TOKENS)

    def written() -> dict[str, bytes]:
        assert write(prompts, parts, frozenset({END}), NEW_TOKENS, turbo, tmp_path) == 3
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    first = written()
    whole = States(tmp_path, 3)
    assert len(whole) == 17
    greedy = [at for at in range(17) if not prompts.sampled[at]]
    for at in greedy:
        found = whole.texts(np.array([at])).tokens_T.tolist()
        assert found == generated(parts.model, prompts.tokens[at])
    path = states.shard_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-9])
    states.shard_path(tmp_path, 2).unlink()
    untouched = states.shard_path(tmp_path, 0).stat().st_mtime_ns
    assert written() == first
    assert "damaged" in capfd.readouterr().err
    assert states.shard_path(tmp_path, 0).stat().st_mtime_ns == untouched


def test_each_prompt_once_and_those_without_room_left_out_aloud(capfd) -> None:
    rows = rows_of([5, 6], [7], [5, 6], list(range(10, 26)), [8, 9, 10])
    found = choose_prompts(rows, Turbo(sampled=1), longest=15)
    assert sorted(prompt.tolist() for prompt in found.tokens) == [[5, 6], [7], [8, 9, 10]]
    assert found.sampled.all()
    assert "1 prompts leave no room to write" in capfd.readouterr().err
    assert len(choose_prompts(rows, Turbo(prompts=2), longest=15).tokens) == 2
    with pytest.raises(UserError, match="or lower evaluate"):
        choose_prompts(rows, Turbo(), longest=0)


def test_a_prompt_that_leaves_exactly_the_room_fills_the_context(parts) -> None:
    """Beside a short one: each ends at its own length, the last position included."""
    prompts = [np.arange(3, 3 + CONTEXT - NEW_TOKENS, dtype=np.int32), np.array([60], np.int32)]
    asked = Prompts(prompts, np.zeros(2, dtype=bool))
    found = continued(asked, slice(0, 2), Writer(parts), frozenset(), NEW_TOKENS, Turbo(), 0)
    assert [len(text) for text in texts_of(found)] == [NEW_TOKENS, NEW_TOKENS]
    assert texts_of(found)[0] == _free(parts.model, prompts[0])


def _free(model: Any, prompt: np.ndarray) -> list[int]:
    """Without a stop."""
    ids_1T = torch.from_numpy(prompt.astype(np.int64))[None]
    mask = torch.ones_like(ids_1T)
    return model.generate(
        ids_1T,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()


def test_texts_that_end_at_once_are_kept_as_empty_of_states(parts) -> None:
    """A stop token first: one token, and nothing that a head could foresee."""
    prompt = np.array([60], np.int32)
    first = generated(parts.model, prompt)[0]
    asked = Prompts([prompt], np.zeros(1, dtype=bool))
    found = continued(asked, slice(0, 1), Writer(parts), frozenset({first}), 4, Turbo(), 0)
    assert texts_of(found) == [[first]]
