"""A recipe is read whole: every error at once, each with its line, its find and its fix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from schemas.candidates import Lora
from schemas.errors import UserError
from schemas.load import load_recipe, recipe_json_schema
from schemas.recipe import holds

ROOT = Path(__file__).parents[2]

GOOD = """\
name: banking77-intent
task: sequence-classification
base: {model: base}
data:
  train: {path: rows.csv, columns: {label: category}}
  test: {holdout: 0.1}
candidates:
  - {method: full}
  - {method: lora, rank: 16, train: {learning_rate: 2e-3}}
select: {maximize: accuracy, subject_to: {adapter_mib: "<= 10"}}
register: {name: banking77-intent}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "rows.csv").write_text("text,category\nhello,greeting\n")
    (tmp_path / "recipe.yaml").write_text(GOOD)
    return tmp_path


def problems(folder: Path, text: str, overrides: list[str] | None = None) -> list[str]:
    (folder / "recipe.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(folder / "recipe.yaml", overrides)
    return [str(problem).replace(str(folder) + "/", "") for problem in caught.value.problems]


def test_good_recipe(folder: Path) -> None:
    recipe = load_recipe(folder / "recipe.yaml")
    assert [candidate.label for candidate in recipe.candidates] == ["full", "lora-r16"]
    # 2e-3 is a string to YAML 1.1; a learning rate that stays a string would be refused.
    assert recipe.candidates[1].train.learning_rate == 0.002
    merged = recipe.train.for_candidate(recipe.candidates[1].train)
    assert merged.learning_rate == 0.002
    assert merged.epochs == recipe.train.epochs


def test_every_error_comes_at_once_with_place_and_nearest_key(folder: Path) -> None:
    text = (
        GOOD.replace("task: seq", "task: sek")
        .replace("rank: 16", "rnk: 16, alpha: -3")
        .replace("method: full", "method: ful")
        .replace("maximize: accuracy", "maximize: acuracy")
        .replace("register:", "regster:")
    )
    found = problems(folder, text)
    assert len(found) == 5
    by_line = dict(zip((2, 8, 9, 9, 11), found, strict=True))
    assert "did you mean `sequence-classification`" in by_line[2]
    assert "recipe.yaml:8 candidates[0]: unknown method 'ful'" in by_line[8]
    assert any("candidates[1].rnk" in line and "`rank`" in line for line in found)
    assert any("candidates[1].alpha" in line and "greater than 0" in line for line in found)
    assert "did you mean `register`" in by_line[11]


def test_unknown_figures_name_the_nearest(folder: Path) -> None:
    text = GOOD.replace("maximize: accuracy", "maximize: acuracy").replace(
        "adapter_mib:", "adaptor_mib:"
    )
    found = problems(folder, text)
    assert len(found) == 2
    assert "select.maximize" in found[0] + found[1]
    assert "`accuracy`" in found[0] + found[1]
    assert "`adapter_mib`" in found[0] + found[1]


def test_words_about_texts_are_refused_where_rows_are_images(folder: Path) -> None:
    """Each at its place: a max_length that does nothing would be taken for one that does."""
    text = GOOD.replace("task: sequence-", "task: image-")
    (folder / "recipe.yaml").write_text(text)
    load_recipe(folder / "recipe.yaml")
    set_ = ["data.max_length=64", "data.template=plain", "evaluate.prompt_tokens=[16, 64]"]
    found = problems(folder, text, set_)
    assert len(found) == 3
    assert all("image-classification reads images" in problem for problem in found)
    assert sum("data.max_length: found 64" in problem for problem in found) == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("rows.csv", "nowhere.csv"), "data.train.path: no such file: 'nowhere.csv'"),
        (("model: base", "model: ./nowhere"), "no such directory"),
        (("model: base", "model: org/name"), "without a pinned commit"),
        (("model: base", "model: org/name, revision: main"), "without a pinned commit"),
        (("holdout: 0.1", "holdout: 0.9"), "less than 0.5"),
        (('"<= 10"', '"= 10"'), "is no bound"),
        (("name: banking77-intent\nt", "name: a/b\nt"), "name"),
        (("method: full", "method: lora"), "share the name lora-r16"),
        (("{maximize: accuracy,", "{"), "exactly one of"),
        (("task: seq", "task: x\ntask: seq"), "stands twice"),
        (("base: {model", "base: [model"), "not YAML"),
        (("name: banking77-intent\nt", "name: bank\x00ing\nt"), "recipe.yaml:1: not YAML: the c"),
        (("base: {model: base}", "base: {model: 'b\x07'}"), "recipe.yaml:3: not YAML: the c"),
        (("task: sequence-classification", "task: [causal-lm]"), "found ['causal-lm']"),
        (("name: banking77-intent\nt", "? {a: b}\nt"), "recipe.yaml:1: not YAML: found unhashable"),
        (("holdout: 0.1", "holdout: 2020-13-41"), "recipe.yaml:6: not YAML: '2020-13-41' cannot"),
        (("holdout: 0.1", "holdout: !!bool x"), "recipe.yaml:6: not YAML: 'x' cannot"),
        (("model: base", f"model: {'x' * 5000}"), "base.model: no such directory: 'xxx"),
        (("rows.csv", "x" * 5000), "data.train.path: no such file: 'xxx"),
        (("model: base", f"model: {'[' * 3000}{']' * 3000}"), "nested too deeply"),
        (("holdout: 0.1", "holdout: .nan"), "finite number"),
        (("method: full", "method: full, train: {epochs: .inf}"), "finite number"),
        (("learning_rate: 2e-3", "learning_rate: .inf"), "train.learning_rate: found inf"),
        (("select:", "evaluate: {batch_sizes: [0, -1]}\nselect:"), "batch_sizes[1]: found -1"),
        (("select:", "evaluate: {prompt_tokens: [64, 0]}\nselect:"), "prompt_tokens[1]: found 0"),
        (('"<= 10"', "10"), "select.subject_to.adapter_mib: found 10\n    fix: is no bound; write"),
        (('"<= 10"', "0.85"), 'write e.g. ">= 0.85" or "<= 0.85"'),
        (('"<= 10"', "[10]"), 'write e.g. ">= 0.9" or "<= 0.9"'),
    ],
)
def test_each_mistake(folder: Path, change: tuple[str, str], expected: str) -> None:
    assert change[0] in GOOD
    text = GOOD.replace(*change)
    if expected == "share the name lora-r16":
        text = text.replace("{method: lora}", "{method: lora, rank: 16}")
    assert any(expected in problem for problem in problems(folder, text))


def test_overrides(folder: Path) -> None:
    recipe = load_recipe(
        folder / "recipe.yaml", ["train.epochs=1", "candidates.1.rank=4", "data.max_length=64"]
    )
    assert recipe.train.epochs == 1
    assert recipe.data.max_length == 64
    assert isinstance(recipe.candidates[1], Lora)
    assert recipe.candidates[1].rank == 4


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("epochs", "not of the form key=value"),
        ("candidates.7.rank=4", "items 0 to 1"),
        ("name.x=4", "not a section"),
        ("train.epoch=1", "did you mean `epochs`"),
        ("train.epochs=2020-13-41", "is not YAML"),
        pytest.param(f"train.epochs={'[' * 3000}", "is not YAML", id="nested"),
    ],
)
def test_bad_overrides(folder: Path, override: str, expected: str) -> None:
    assert expected in "".join(problems(folder, GOOD, [override]))


def test_absent_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_recipe(tmp_path / "binary.yaml")


def test_recipes_are_frozen(folder: Path) -> None:
    recipe = load_recipe(folder / "recipe.yaml")
    with pytest.raises(ValueError, match="frozen"):
        recipe.name = "other"  # type: ignore[misc]


def with_stand_ins(path: Path, directory: Path) -> Path:
    """The recipe beside what it names: the project's own files, and stand-ins for the user's.

    What a recipe reads from data/ and models/ is not shipped (recipes/*.yaml say so). All else
    must be there.
    """
    copy = directory / path.name
    copy.write_bytes(path.read_bytes())
    tree = yaml.safe_load(path.read_text())
    sources = [part["path"] for part in tree["data"].values() if isinstance(part, dict)]
    for name in (tree["base"]["model"], *sources):
        room = Path(name).parts[0]
        if room == "data":
            (directory / room).mkdir(exist_ok=True)
            (directory / name).touch()
        elif room == "models":
            (directory / name).mkdir(parents=True)
        elif not (directory / room).exists():
            (directory / room).symlink_to(path.parent / room)
    return copy


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_validate(path: Path, tmp_path: Path) -> None:
    """Each starts with the command that runs it and names the JSON Schema for editors."""
    lines = path.read_text().splitlines()
    assert lines[0] == f"# peftflow run recipes/{path.name}"
    assert lines[1] == "# yaml-language-server: $schema=../schemas/recipe.schema.json"
    recipe = load_recipe(with_stand_ins(path, tmp_path))
    assert recipe.candidates


def test_json_schema_is_the_generated_one() -> None:
    committed = json.loads((ROOT / "schemas/recipe.schema.json").read_text())
    assert committed == recipe_json_schema(), "run `peftflow schema > schemas/recipe.schema.json`"
    assert yaml.safe_load(GOOD).keys() <= committed["properties"].keys()


@pytest.mark.parametrize(
    ("bound", "value", "kept"),
    [
        (">= 0.9", 0.9, True),
        ("> 0.9", 0.9, False),
        ("<= 1e1", 10.0, True),
        ("< 10", 10.0, False),
        (">= -1", float("nan"), False),
    ],
)
def test_bounds(bound: str, value: float, kept: bool) -> None:
    assert holds(bound, value) is kept


@pytest.mark.parametrize("method", ["zero_shot", "few_shot"])
def test_a_schedule_for_what_trains_nothing_is_refused(folder: Path, method: str) -> None:
    text = GOOD.replace("method: full", f"method: {method}, train: {{epochs: 2}}")
    [found] = problems(folder, text)
    assert f"{method} trains nothing: remove `train`" in found
    assert "candidates[0]" in found
