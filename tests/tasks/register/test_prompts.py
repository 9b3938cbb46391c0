"""Versions that are a base behind examples: they choose as was evaluated, and travel alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from schemas.candidates import FewShot, ZeroShot
from schemas.recipe import Train
from schemas.stages import Call, TrainSpec
from tasks.core.shots import Shots, is_prompt
from tasks.core.store import Store
from tasks.core.tokens import TokenRows
from tasks.register.package import make_package
from tasks.register.served_examples import Examples
from tasks.train.prompt import make_prompt

BOS = 1
#: What the train rows of the versions below say.
TRAIN = [
    ("where is my parcel?", "track"),
    ("where is order 12?", "track"),
    ("give me my money", "refund"),
    ("are there red lamps?", "stock"),
    ("hello", "greet"),
]


def drawn_rows(count: int, seed: int) -> TokenRows:
    """Rows of few tokens, so that many are alike and some are equals."""
    draw = np.random.default_rng(seed)
    rows = [[BOS, *draw.integers(2, 9, draw.integers(0, 7)).tolist()] for _ in range(count)]
    return TokenRows(
        input_ids=np.array([token for row in rows for token in (*row, 90)], dtype=np.int32),
        offsets=np.cumsum([0, *(len(row) + 1 for row in rows)], dtype=np.int64),
        source_rows=np.arange(count, dtype=np.int64),
        answer_start=np.array([len(row) for row in rows], dtype=np.int64),
    )


@pytest.mark.parametrize("choose", ["similarity", "seed"])
@pytest.mark.parametrize("bos", [BOS, None])
def test_a_version_asks_as_was_evaluated(tmp_path: Path, choose: str, bos: int | None) -> None:
    """Both sides of the one rule, over prompts with many ties and too little room."""
    pool = drawn_rows(60, seed=0) if choose == "similarity" else drawn_rows(4, seed=0)
    shots = Shots(pool, 4, choose, bos)
    shots.save(tmp_path)
    served = Examples(tmp_path)
    asked = drawn_rows(50, seed=1)
    for index in range(len(asked)):
        prompt = asked.row(index)[:-1]
        for room in (None, 30, 12, 0):
            expected = shots.ask(prompt, room)
            assert served.ask(prompt.tolist(), room) == expected.tokens.tolist()
        assert served.nearest(prompt.tolist()) == shots.nearest(prompt)


def prompt_world(causal: Any, candidate: Any) -> Any:
    """The causal world whose finished entry is a prompt over train rows, as prepare leaves them."""
    prepared = causal.paths["prepared"]
    tokenizer = AutoTokenizer.from_pretrained(causal.paths["base"])
    parts = []
    for question, answer in TRAIN:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        said = tokenizer(answer, add_special_tokens=False)["input_ids"]
        parts.append((prompt, [*said, tokenizer.eos_token_id]))
    rows = TokenRows(
        input_ids=np.array([token for pair in parts for part in pair for token in part], "i4"),
        offsets=np.cumsum([0, *(len(one) + len(two) for one, two in parts)], dtype=np.int64),
        source_rows=np.arange(len(parts), dtype=np.int64),
        answer_start=np.array([len(one) for one, _ in parts], dtype=np.int64),
    )
    spec = TrainSpec(task="causal-lm", candidate=candidate, train=Train(), dtype="float32")
    call = Call(
        stage="train",
        stage_version=1,
        format="prompt",
        spec=spec.model_dump(mode="json"),
        paths={},
        inputs={"prepared": prepared.name},
    )
    paths = {"base": causal.paths["base"], "prepared": prepared}
    entry = Store(causal.home / "store").make(call, lambda out: make_prompt(spec, rows, paths, out))
    return type(causal)(causal.home, causal.spec, causal.paths | {"finished": entry.path})


@pytest.fixture
def few_shot(causal: Any) -> Any:
    return prompt_world(causal, FewShot(method="few_shot", examples=2))


def text_of(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """A conversation of questions and answers; the last answer is left out where it is empty."""
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
        if content
    ]


def test_a_version_answers_behind_the_rows_that_are_nearest(few_shot: Any) -> None:
    """Loaded back by a process of its own, which is asked in plain words.

    The quickstart's template writes nothing between turns, so examples are the turns before.
    """
    entry = few_shot.register()
    assert entry.facts["max_logit_difference"] == 0.0
    assert entry.facts["prompts_asked_alike"] == "3/3"
    [stored] = (few_shot.home / "mlflow" / "artifacts").glob("*/models/*/artifacts")
    package = stored / "artifacts" / "package"
    assert is_prompt(package / "model")
    assert not list(package.rglob("model.safetensors"))
    needs = (stored / "requirements.txt").read_text()
    assert "peft" not in needs

    import mlflow

    mlflow.set_tracking_uri(few_shot.tracking)
    loaded = mlflow.pyfunc.load_model(entry.facts["model_uri"])
    served = loaded.unwrap_python_model()
    question = "where is the parcel?"
    turns = [TRAIN[1], TRAIN[0], (question, "")]
    tokenizer = AutoTokenizer.from_pretrained(few_shot.paths["base"])
    text = tokenizer.apply_chat_template(text_of(turns), tokenize=False, add_generation_prompt=True)
    by_hand = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert served.ask(question, 12) == by_hand

    model = AutoModelForCausalLM.from_pretrained(few_shot.paths["base"], dtype=torch.float32)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
    written = model.generate(torch.tensor([by_hand]), pad_token_id=0, **settings)
    expected = tokenizer.decode(written[0, len(by_hand) :], skip_special_tokens=True)
    assert loaded.predict([question])["completion"].tolist() == [expected]


def test_too_long_a_question_goes_alone(few_shot: Any, tmp_path: Path) -> None:
    """Where answer and question leave no room in 512 positions, nothing stands before it."""
    package = make_package(few_shot.spec, few_shot.paths, tmp_path / "package")
    examples = Examples(package.directory / "model")
    question = [BOS, *[5] * 499]
    assert examples.ask(question, 512 - 12) == question


@pytest.mark.parametrize(
    ("candidate", "told"),
    [
        (ZeroShot(method="zero_shot"), False),
        (FewShot(method="few_shot", choose="seed", examples=1), True),
    ],
)
def test_the_card_says_what_travels(
    causal: Any, tmp_path: Path, candidate: Any, told: bool
) -> None:
    world = prompt_world(causal, candidate)
    package = make_package(world.spec, world.paths, tmp_path / "package")
    assert "weights: none; the base as it is" in package.card
    assert "measured on: hashes are checked" in package.card
    assert "Trained on rows" not in package.card
    assert ("Train rows travel with it" in package.card) == told
    serving = json.loads((package.directory / "serving.json").read_text())
    assert serving["base"]["model"] == "quickstart/base"
    assert (package.directory / "tokenizer" / "tokenizer.json").exists()
