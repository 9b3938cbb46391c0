"""Which examples stand in front of a prompt, beside a reference that counts by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tasks.core.shots import K1, B, Shots, Similarity, is_prompt
from tasks.core.tokens import TokenRows

BOS = 1


def rows_of(*parts: tuple[list[int], list[int]]) -> TokenRows:
    """Rows of (prompt, answer)."""
    rows = [[*prompt, *answer] for prompt, answer in parts]
    return TokenRows(
        input_ids=np.array([token for row in rows for token in row], dtype=np.int32),
        offsets=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        source_rows=np.arange(len(rows), dtype=np.int64) + 1,
        answer_start=np.array([len(prompt) for prompt, _ in parts], dtype=np.int64),
    )


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def reference(prompt: list[int], others: list[list[int]]) -> list[float]:
    """BM25 as the formula reads."""
    mean = sum(map(len, others)) / len(others)
    scores = []
    for other in others:
        score = 0.0
        for token in set(prompt):
            having = sum(token in each for each in others)
            rarity = math.log(1 + (len(others) - having + 0.5) / (having + 0.5))
            times = other.count(token)
            score += rarity * times * (K1 + 1) / (times + K1 * (1 - B + B * len(other) / mean))
        scores.append(score)
    return scores


def test_scores_are_bm25s() -> None:
    draw = np.random.default_rng(0)
    others = [draw.integers(0, 30, draw.integers(1, 25)).tolist() for _ in range(40)]
    similarity = Similarity([tokens(*other) for other in others])
    for _ in range(10):
        prompt = draw.integers(0, 40, 12).tolist()  # some of its tokens no row has
        # Sums of a dozen products in another order.
        expected = pytest.approx(reference(prompt, others), rel=1e-12, abs=1e-12)
        assert similarity.scores(tokens(*prompt)) == expected


POOL = rows_of(
    ([BOS, 10, 11], [50, 2]),
    ([BOS, 20, 21], [51, 2]),
    ([BOS, 10, 12], [52, 2]),
    ([BOS, 10, 11], [53, 2]),
)


def test_the_nearest_stands_last_and_of_equals_the_first_row_is_nearer() -> None:
    shots = Shots(POOL, 3, "similarity", BOS)
    asked = shots.ask(tokens(BOS, 10, 11), None)
    assert asked.examples == [2, 3, 0]
    by_hand = [BOS, 10, 12, 52, 2, 10, 11, 53, 2, 10, 11, 50, 2, 10, 11]
    assert asked.tokens.tolist() == by_hand
    # Nothing in common but the BOS, which all rows have: they are equals, in file order.
    assert shots.ask(tokens(BOS, 77), None).examples == [2, 1, 0]


def test_answers_are_not_searched() -> None:
    assert Shots(POOL, 1, "similarity", BOS).ask(tokens(20, 53), None).examples == [1]


@pytest.mark.parametrize("bos", [None, 3])
def test_a_token_that_is_no_bos_is_kept(bos: int | None) -> None:
    asked = Shots(POOL, 1, "similarity", bos).ask(tokens(BOS, 20, 21), None)
    assert asked.tokens.tolist() == [BOS, 20, 21, 51, 2, BOS, 20, 21]


def test_what_there_is_no_room_for_goes_from_the_far_end() -> None:
    shots = Shots(POOL, 3, "similarity", BOS)
    prompt = tokens(BOS, 10, 11)
    whole = len(shots.ask(prompt, None).tokens)
    assert whole == 15
    found = {room: shots.ask(prompt, room) for room in (15, 14, 10, 7, 6, -5)}
    assert [len(one.tokens) for one in found.values()] == [15, 11, 7, 7, 3, 3]
    assert [one.examples for one in found.values()] == [[2, 3, 0], [3, 0], [0], [0], [], []]


def test_by_seed_the_same_rows_stand_before_every_prompt() -> None:
    shots = Shots(POOL, 4, "seed", BOS)
    assert shots.ask(tokens(BOS, 10), None).examples == [3, 2, 1, 0]
    assert shots.ask(tokens(BOS, 20), None).examples == [3, 2, 1, 0]


@pytest.mark.parametrize("choose", ["similarity", "seed"])
def test_what_is_saved_asks_alike(tmp_path: Path, choose: str) -> None:
    shots = Shots(POOL, 2, choose, BOS)
    shots.save(tmp_path)
    loaded = Shots.load(tmp_path)
    assert loaded is not None
    for prompt in (tokens(BOS, 10, 12), tokens(BOS, 20), tokens(BOS)):
        one, other = shots.ask(prompt, 12), loaded.ask(prompt, 12)
        assert one.examples == other.examples
        assert one.tokens.tolist() == other.tokens.tolist()


def test_no_examples_are_no_shots(tmp_path: Path) -> None:
    assert Shots.load(tmp_path) is None
    assert not is_prompt(tmp_path)
    Shots(rows_of(), 0, "seed", None).save(tmp_path)
    assert is_prompt(tmp_path)
    assert Shots.load(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["prompt.json"]
