"""What the train stage leaves of a candidate that trains nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from schemas.errors import UserError
from schemas.stages import TrainSpec
from tasks.core.shots import EXAMPLES, PROMPT, Shots
from tasks.core.tokens import TokenRows
from tasks.train.prompt import leading
from tasks.train.stage import run

QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart" / "base"
BOS, EOS = 1, 2


def rows_of(count: int, order: list[int] | None = None) -> TokenRows:
    """Row n asks n and answers n + 100."""
    rows = [[BOS, 10 + n, 100 + n, EOS] for n in order or range(count)]
    return TokenRows(
        input_ids=np.array(rows, dtype=np.int32).ravel(),
        offsets=np.arange(0, 4 * count + 1, 4, dtype=np.int64),
        source_rows=np.arange(count, dtype=np.int64) + 1,
        loss_mask=np.tile(np.array([0, 0, 1, 1], dtype=np.uint8), count),
        answer_start=np.full(count, 2, dtype=np.int64),
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Configuration and tokenizer alone: no weights are loaded."""
    if not QUICKSTART.exists():
        pytest.skip(f"{QUICKSTART} is missing")
    (tmp_path / "base").mkdir()
    for path in QUICKSTART.glob("*.json"):
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "base"


def made(
    base: Path, out: Path, rows: TokenRows, seed: int = 0, **candidate: Any
) -> tuple[dict[str, Any], Shots | None]:
    """The facts of the stage, and what it left."""
    prepared = out / "prepared"
    (prepared / "tokens").mkdir(parents=True)
    rows.save(prepared / "tokens" / "train.safetensors")
    spec = TrainSpec.model_validate(
        {
            "task": "causal-lm",
            "candidate": candidate,
            "train": {"seed": seed},
            "dtype": "float32",
        }
    )
    facts = run(spec, {"base": base, "prepared": prepared}, out)
    assert json.loads((out / "curve.json").read_text()) == []
    return facts, Shots.load(out / "model")


def test_zero_shot_leaves_a_marker_and_figures_of_nothing(base: Path, tmp_path: Path) -> None:
    facts, shots = made(base, tmp_path / "out", rows_of(5), method="zero_shot")
    assert shots is None
    assert [path.name for path in (tmp_path / "out" / "model").iterdir()] == [PROMPT]
    assert facts["format"] == "prompt"
    assert (facts["trainable_parameters"], facts["trainable_share"], facts["steps"]) == (0, 0, 0)
    weights = AutoModelForCausalLM.from_pretrained(QUICKSTART).parameters()
    assert facts["total_parameters"] == sum(weight.numel() for weight in weights)
    never = ("train_peak_mib", "step_time_s", "tokens_per_s", "first_loss", "final_loss")
    assert [facts[name] for name in never] == [None] * 5


def test_similarity_keeps_every_row_to_choose_from(base: Path, tmp_path: Path) -> None:
    rows = rows_of(7)
    _, shots = made(base, tmp_path / "out", rows, method="few_shot", examples=2)
    assert shots is not None
    assert (shots.count, shots.choose, shots.bos) == (2, "similarity", BOS)
    assert shots.rows.input_ids.tolist() == rows.input_ids.tolist()
    assert shots.rows.answer_start is not None
    assert shots.rows.answer_start.tolist() == [2] * 7
    assert (tmp_path / "out" / "model" / EXAMPLES).exists()


def test_a_seed_draws_rows_whatever_their_order(base: Path, tmp_path: Path) -> None:
    def drawn(name: str, rows: TokenRows, seed: int) -> list[int]:
        asked = {"method": "few_shot", "examples": 4, "choose": "seed"}
        _, shots = made(base, tmp_path / name, rows, seed, **asked)
        assert shots is not None
        assert len(shots.rows) == 4
        return shots.rows.input_ids.tolist()

    first = drawn("first", rows_of(40), seed=0)
    assert drawn("again", rows_of(40, list(reversed(range(40)))), seed=0) == first
    assert drawn("other", rows_of(40), seed=1) != first


def test_more_examples_than_rows_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"examples.*3, and there are 2 train rows"):
        made(base, tmp_path / "out", rows_of(2), method="few_shot", examples=3)


def test_a_token_that_begins_each_turn_is_no_bos() -> None:
    """ChatML's `<|im_start|>`, which some tokenizers call their BOS, stands before the answer."""
    rows = rows_of(3)
    assert leading(rows, BOS) == BOS
    assert leading(rows, None) is None
    assert leading(rows, 99) is None
    turns = rows.input_ids.copy()
    turns[1::4] = BOS
    assert leading(TokenRows(**(vars(rows) | {"input_ids": turns})), BOS) is None
    # One row that spells it once more does not make it a turn's.
    turns[[1, 5]] = 10
    assert leading(TokenRows(**(vars(rows) | {"input_ids": turns})), BOS) == BOS
