"""What a recipe may say of Turbo heads, and where it is told that there can be none."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.errors import UserError
from schemas.load import load_recipe
from schemas.recipe import Recipe

GOOD = """\
name: fast
task: causal-lm
base: {model: base}
data:
  train: {path: rows.jsonl}
  test: {holdout: 0.1}
candidates:
  - {method: none}
  - {method: lora, rank: 2}
finish: {turbo: {heads: 4, rank: 64}}
select: {minimize: loss}
register: {name: fast}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return tmp_path


def load(folder: Path, text: str) -> Recipe:
    (folder / "recipe.yaml").write_text(text)
    return load_recipe(folder / "recipe.yaml")


def problems(folder: Path, *changes: tuple[str, str]) -> list[str]:
    text = GOOD
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    with pytest.raises(UserError) as caught:
        load(folder, text)
    return [str(problem).replace(str(folder) + "/", "") for problem in caught.value.problems]


def test_heads_for_whichever_is_selected(folder: Path) -> None:
    recipe = load(folder, GOOD)
    assert recipe.finish.turbo is not None
    assert (recipe.finish.turbo.heads, recipe.finish.turbo.rank) == (4, 64)
    assert load(folder, GOOD.replace("finish", "# finish")).finish.turbo is None


def test_none_is_another_word_for_zero_shot(folder: Path) -> None:
    none, _ = load(folder, GOOD).candidates
    zero, _ = load(folder, GOOD.replace("none", "zero_shot")).candidates
    assert none == zero
    assert (none.method, none.label, none.heads()) == ("zero_shot", "zero_shot", None)


def test_turbo_lora_is_lora_and_heads_of_its_own(folder: Path) -> None:
    line = "{method: turbo_lora, rank: 2, alpha: 4, turbo: {heads: 3}}"
    recipe = load(folder, GOOD.replace("{method: lora, rank: 2}", line).replace("finish", "# f"))
    candidate = recipe.candidates[1]
    assert candidate.heads().heads == 3
    assert candidate.label == "turbo_lora-r2"
    trained = candidate.as_trained()
    assert (trained.method, trained.rank, trained.alpha, trained.heads()) == ("lora", 2, 4, None)


@pytest.mark.parametrize(
    ("setting", "place"),
    [
        ("heads: 0", "finish.turbo.heads"),
        ("heads: 17", "finish.turbo.heads"),
        ("rank: 0", "finish.turbo.rank"),
        ("state: -1", "finish.turbo.state"),
        ("sampled: 1.5", "finish.turbo.sampled"),
        ("hard: -0.1", "finish.turbo.hard"),
        ("decay: 0", "finish.turbo.decay"),
        ("state_dropout: 1", "finish.turbo.state_dropout"),
        ("store_mib: 0", "finish.turbo.store_mib"),
        ("head: 4", "finish.turbo.head"),
    ],
)
def test_each_bound_is_told_at_its_place(folder: Path, setting: str, place: str) -> None:
    [problem] = problems(folder, ("heads: 4, rank: 64", setting))
    assert problem.startswith("recipe.yaml:10")
    assert place in problem


@pytest.mark.parametrize(
    ("candidate", "why"),
    [
        ("{method: few_shot}", "few_shot shows examples before each prompt"),
        ("{method: few_shot, examples: 2, choose: seed}", "few_shot shows examples"),
    ],
)
def test_what_has_no_heads_is_told_with_the_reason(folder: Path, candidate: str, why: str) -> None:
    [problem] = problems(folder, ("{method: lora, rank: 2}", candidate))
    assert "candidates[1]" in problem
    assert why in problem
    assert "take `turbo` out" in problem
    # Without heads it is welcome.
    text = GOOD.replace("{method: lora, rank: 2}", candidate).replace("finish", "# finish")
    assert len(load(folder, text).candidates) == 2


def test_another_task_has_no_tokens_to_draft(folder: Path) -> None:
    other = ("task: causal-lm", "task: seq2seq")
    [problem] = problems(folder, other)
    assert "finish.turbo" in problem
    assert "the task is seq2seq" in problem
    # In the order of their lines.
    first, second = problems(folder, other, ("{method: lora,", "{method: turbo_lora,"))
    assert "candidates[1].method" in first
    assert "choose lora" in first
    assert "finish.turbo" in second


def test_turbo_lora_learns_with_nothing_else(folder: Path) -> None:
    line = "[{method: turbo_lora}, {method: bottleneck}]"
    found = "\n".join(problems(folder, ("{method: lora, rank: 2}", line)))
    assert "compose lora, and set finish.turbo" in found
