"""A list of methods is one candidate; what cannot learn together is refused at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.errors import UserError
from schemas.load import load_recipe
from schemas.recipe import Recipe
from schemas.stages import InspectSpec
from schemas.together import Candidate

RECIPE = """\
name: intents
task: causal-lm
base: {{model: base}}
data:
  train: {{path: rows.jsonl}}
  test: {{holdout: 0.1}}
candidates:
  - {{method: full}}
  - {written}
select: {{minimize: loss}}
register: {{name: intents}}
"""


def load(folder: Path, written: str, overrides: list[str] | None = None) -> Recipe:
    (folder / "base").mkdir(exist_ok=True)
    (folder / "rows.jsonl").touch()
    (folder / "recipe.yaml").write_text(RECIPE.format(written=written))
    return load_recipe(folder / "recipe.yaml", overrides)


def second(folder: Path, written: str, overrides: list[str] | None = None) -> Candidate:
    return load(folder, written, overrides).candidates[1]


def test_a_list_is_short_for_together_whatever_its_order(tmp_path: Path) -> None:
    whole = "{method: together, of: [{method: lora, rank: 8}, {method: prefix_tuning}]}"
    written = [
        "[{method: lora, rank: 8}, {method: prefix_tuning}]",
        "[{method: prefix_tuning}, {method: lora, rank: 8}]",
    ]
    candidate = second(tmp_path, whole)
    assert candidate.label == "lora-r8-and-prefix-tuning-20"
    assert [part.method for part in candidate.parts] == ["lora", "prefix_tuning"]
    assert [second(tmp_path, text) for text in written] == [candidate, candidate]
    assert second(tmp_path, written[0], ["candidates.1.0.rank=8"]) == candidate
    # As a stage is told of it, and a manifest holds it.
    spec = InspectSpec(task="causal-lm", candidates=[candidate])
    assert InspectSpec.model_validate_json(spec.model_dump_json()).candidates == [candidate]


def test_the_whole_has_a_name_and_a_schedule(tmp_path: Path) -> None:
    candidate = second(
        tmp_path,
        "{method: together, name: both, train: {epochs: 2}, "
        "of: [{method: bottleneck}, {method: lora}]}",
    )
    assert candidate.label == "both"
    assert candidate.train.epochs == 2
    assert candidate.TRAINS
    assert candidate.FORMAT == "peft-adapter"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("[]", "candidates[1]: found []\n    fix: an empty list composes nothing"),
        ("[{method: lora}]", "one method is no composition: write lora without the list"),
        ("[{method: full}, {method: lora}]", "full trains every weight of the base already: make"),
        ("[{method: zero_shot}, {method: lora}]", "zero_shot trains nothing: make it a candidate"),
        ("[{method: few_shot}, {method: lora}]", "few_shot trains nothing: make it a candidate"),
        (
            "[{method: peft, peft: {peft_type: LOHA}}, {method: bitfit}]",
            "peft does inside of a layer what only PEFT knows: make it a candidate",
        ),
        ("[{method: lora}, {method: lora, rank: 2}]", "lora stands twice: keep one of them"),
        (
            "[{method: lora}, {method: adalora}]",
            "lora and adalora both change the weights of linear layers: keep one of them",
        ),
        ("[{method: lora}, {method: qlora}]", "both change the weights of linear layers"),
        ("[{method: ia3}, {method: qlora}]", "cannot learn together: PEFT's ia3 gives float32"),
        (
            "[{method: prefix_tuning}, {method: p_tuning}]",
            "prefix_tuning and p_tuning both change what stands before a row: keep one",
        ),
        ("[{method: bitfit}, {method: layer_norm}]", "bitfit and layer_norm both change the norms"),
        ("[{method: last_layers}, {method: ia3}]", "both change the scale of what layers read"),
        ("[{method: last_layers}, {method: bottleneck}]", "both change the top blocks"),
        ("[[{method: lora}], {method: bitfit}]", "cannot hold another: write all methods in one"),
        (
            "[{method: together, of: [{method: lora}, {method: ia3}]}, {method: bitfit}]",
            "cannot hold another: write all methods in one list",
        ),
        (
            "[{method: lora, name: a, train: {epochs: 2}}, {method: bitfit}]",
            "`name` of lora is the whole composition's: write {method: together, of: […], name: …}"
            "; `train` of lora is",
        ),
        ("[{method: lora, rnk: 2}, {method: bitfit}]", "[1][0].rnk: unknown key\n    fix: did you"),
        ("[{method: lroa}, {method: bitfit}]", "[1][0]: unknown method 'lroa'\n    fix: did you"),
        ("[lora, bitfit]", "[1][0]: found 'lora'\n    fix: a section with keys is needed here"),
        ("{method: together}", "candidates[1].of: is missing"),
    ],
)
def test_what_cannot_compose_says_why_and_what_to_do(
    tmp_path: Path, written: str, expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, written)
    assert expected in str(caught.value)
    assert ":9 " in str(caught.value)
