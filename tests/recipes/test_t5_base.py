"""The seq2seq quickstart's own files: its base loads, copies and ends, its rows can be remade, and
its candidates train on them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from schemas.recipe import Recipe
from schemas.stages import PrepareSpec, TrainSpec
from tasks.prepare.stage import run as prepare
from tasks.train.stage import run as train

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart-seq2seq.yaml"
QUICKSTART = RECIPE.parent / "quickstart"
BASE = QUICKSTART / "t5-base"
MAX_BASE_BYTES = 8_000_000


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return Recipe.model_validate(yaml.safe_load(RECIPE.read_text()))


@pytest.fixture(scope="module")
def prepared(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("rows")
    sources = {"train": recipe.data.train, "test": recipe.data.test}
    sources["retention"] = recipe.data.retention
    paths = {name: RECIPE.parent / source.path for name, source in sources.items()}
    prepare(PrepareSpec(task=recipe.task, data=recipe.data), {**paths, "base": BASE}, out)
    return {"base": BASE, "prepared": out}


def test_the_base_is_small_and_fills_in_what_was_cut_out() -> None:
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= MAX_BASE_BYTES
    model = AutoModelForSeq2SeqLM.from_pretrained(BASE, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(BASE)
    lines = (QUICKSTART / "t5-retention.jsonl").read_text(encoding="utf-8").splitlines()
    losses = []
    for line in lines[:20]:
        row = json.loads(line)
        ids, labels = (tokenizer(row[name], return_tensors="pt") for name in row)
        with torch.no_grad():
            losses.append(float(model(**ids, labels=labels.input_ids).loss))
    # Guessing is ln(2080) = 7.6; held-out text had 1.23 when the base was made.
    assert sum(losses) / len(losses) < 2


def test_the_script_has_the_bases_shape_and_writes_the_same_retention_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(QUICKSTART))
    script: Any = importlib.import_module("make_t5_base")
    tokenizer = script.tokenizer_with_sentinels(QUICKSTART / "base")
    shipped = AutoModelForSeq2SeqLM.from_pretrained(BASE)
    shapes = {name: weight.shape for name, weight in script.new_model(tokenizer).named_parameters()}
    assert shapes == {name: weight.shape for name, weight in shipped.named_parameters()}
    script.write_retention(tmp_path / "rows.jsonl", tokenizer, 0)
    rows = (tmp_path / "rows.jsonl").read_bytes()
    assert rows == (QUICKSTART / "t5-retention.jsonl").read_bytes()


@pytest.mark.parametrize("number", range(3))
def test_each_candidate_learns_from_the_first_steps_on(
    recipe: Recipe, prepared: dict[str, Path], tmp_path: Path, number: int
) -> None:
    candidate = recipe.candidates[number]
    schedule = recipe.train.for_candidate(candidate.train)
    spec = TrainSpec(
        task=recipe.task,
        candidate=candidate,
        train=schedule.model_copy(update={"max_steps": 12}),
        dtype="bfloat16",
    )
    facts = train(spec, prepared, tmp_path)
    assert facts["final_loss"] < 0.8 * facts["first_loss"]
