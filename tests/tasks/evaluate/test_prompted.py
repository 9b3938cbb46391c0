"""Subjects that are the base behind a prompt: zero-shot is the base, few-shot is shown rows."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from schemas.candidates import FewShot, ZeroShot
from schemas.recipe import Train
from schemas.report import CriteriaReport
from schemas.stages import Call, TrainSpec
from tasks.core.shots import EXAMPLES, PROMPT
from tasks.core.store import Store
from tasks.core.tokens import TokenRows
from tasks.evaluate import latency, probes, storage
from tasks.evaluate.prompted import Prompted
from tasks.evaluate.scoring import answer_losses
from tasks.evaluate.stage import run
from tasks.evaluate.subject import read_subject
from tasks.train.prompt import make_prompt

#: Of the world in conftest.py: its special tokens, its positions, and the longest answer.
BOS, EOS, CONTEXT, NEW = 1, 2, 96, 12


@pytest.fixture(autouse=True)
def no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What memory is, other tests measure; its two processes would double the time of one."""
    monkeypatch.setattr(probes.Probe, "peak_mib", lambda probe: 1.0)
    monkeypatch.setattr(probes, "_spawn", lambda spec, paths: subprocess.Popen(["true"]))


def subject_of(world: Any, store: Path, candidate: Any, seed: int = 0) -> Any:
    """The world with an entry of the train stage's own making as its subject."""
    rows = train_rows(world)
    spec = TrainSpec(task="causal-lm", candidate=candidate, train=Train(seed=seed), dtype="float32")
    call = Call(
        stage="train",
        stage_version=1,
        format="prompt",
        spec=spec.model_dump(mode="json"),
        paths={},
    )
    entry = Store(store).make(call, lambda out: make_prompt(spec, rows, world.paths, out))
    return world.of("candidate", entry.path)


def read(world: Any, out: Path) -> tuple[CriteriaReport, list[dict[str, Any]]]:
    out.mkdir()
    run(world.spec, world.paths, out)
    report = CriteriaReport.model_validate_json((out / "criteria.json").read_bytes())
    lines = (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return report, [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def letters(causal, tmp_path_factory) -> Any:
    """The causal world, asked with a letter again and again; train has one row for each letter.

    So the row of the same letter is the nearest, and all others are equals: of one length, with
    nothing in common but the first token and the question mark.
    """
    place = tmp_path_factory.mktemp("letters")
    shutil.copytree(causal.paths["prepared"], place / "prepared")
    tokenizer = AutoTokenizer.from_pretrained(causal.paths["base"])

    def rows(prompts: list[str]) -> TokenRows:
        asked = [[BOS, *tokenizer(prompt)["input_ids"]] for prompt in prompts]
        said = [[*tokenizer(json.dumps({"n": n}))["input_ids"], EOS] for n in range(len(prompts))]
        lengths = [len(one) + len(other) for one, other in zip(asked, said, strict=True)]
        pairs = list(zip(asked, said, strict=True))
        return TokenRows(
            input_ids=np.array([token for pair in pairs for part in pair for token in part], "i4"),
            offsets=np.cumsum([0, *lengths], dtype=np.int64),
            source_rows=np.arange(len(prompts), dtype=np.int64) + 1,
            loss_mask=np.array(
                [bit for one, other in pairs for bit in [0] * len(one) + [1] * len(other)], "u1"
            ),
            answer_start=np.array([len(one) for one in asked], dtype=np.int64),
        )

    alphabet = "abcdefghijklmn"
    test = [letter * (1 + 4 * n) + "?" for n, letter in enumerate(alphabet)]
    rows([letter * 5 + "?" for letter in alphabet]).save(
        place / "prepared/tokens/train.safetensors"
    )
    rows(test).save(place / "prepared/tokens/test.safetensors")
    lines = [
        json.dumps({"row": n + 1, "prompt": prompt, "answer": json.dumps({"n": n})})
        for n, prompt in enumerate(test)
    ]
    (place / "prepared" / "test_rows.jsonl").write_text("\n".join(lines) + "\n")
    return replace(causal, paths=causal.paths | {"prepared": place / "prepared"})


def train_rows(world: Any) -> TokenRows:
    return TokenRows.load(world.paths["prepared"] / "tokens" / "train.safetensors")


def by_hand(world: Any, index: int, wanted: int) -> tuple[list[int], list[int], list[int]]:
    """Test row `index` behind as many of `wanted` examples as fit: its prompt, its answer, and
    the examples."""
    train, test = train_rows(world), world.test_rows
    row, start = test.row(index).tolist(), test.answer_start[index]
    others = [other for other in range(len(train)) if other != index]
    for count in range(wanted, -1, -1):
        chosen = [index, *others][:count][::-1]
        first, *later = [*(train.row(one).tolist() for one in chosen), row[:start]]
        prompt = first + [token for part in later for token in part[1:]]
        if len(prompt) + NEW <= CONTEXT:
            break
    return prompt, row[start:], chosen


def test_zero_shot_is_the_base(causal, tmp_path, capsys) -> None:
    base, base_lines = read(causal, tmp_path / "base")
    world = subject_of(causal, tmp_path / "store", ZeroShot(method="zero_shot"))
    zero, lines = read(world, tmp_path / "zero")
    assert (zero.method, zero.subject) == ("zero_shot", "candidate")
    assert zero.accuracy == base.accuracy
    assert zero.storage == base.storage
    assert zero.computation == base.computation
    assert zero.memory.train_peak_mib is None
    assert zero.how == base.how
    assert lines == base_lines
    assert "logits are the base's" not in capsys.readouterr().err  # as they should be


@pytest.mark.parametrize("count", [1, 3])
def test_few_shot_is_the_base_behind_rows(letters, tmp_path, count) -> None:
    """Losses and answers are those of the base on prompts that are built here."""
    world = subject_of(letters, tmp_path / "store", FewShot(method="few_shot", examples=count))
    report, lines = read(world, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(letters.paths["base"])
    model = LlamaForCausalLM.from_pretrained(letters.paths["base"], dtype=torch.float32).eval()
    for index, line in enumerate(lines):
        prompt, answer, chosen = by_hand(letters, index, count)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
        # Padding moves a rounding of float32.
        assert line["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert line["answer_tokens"] == len(answer)
        assert line["examples"] == [one + 1 for one in chosen]
        written = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )[0, len(prompt) :]
        assert line["got"] == tokenizer.decode(written, skip_special_tokens=True)
    base, _ = read(letters, tmp_path / "base")
    assert report.accuracy.metrics["loss"] != base.accuracy.metrics["loss"]
    assert report.accuracy.retention_loss == base.accuracy.retention_loss
    assert report.accuracy.retention_change.value == 0
    assert "retention without them, so that it is the base's" in report.how["accuracy"]
    none = ("backward_flops_per_token", "step_time_s", "train_tokens_per_s", "flops_ratio_to_full")
    assert [getattr(report.computation, name) for name in none] == [None] * 4
    assert report.computation.forward_flops_per_token == base.computation.forward_flops_per_token
    assert report.storage.trainable_parameters == 0
    files = [world.paths["subject"] / "model" / name for name in (PROMPT, EXAMPLES)]
    assert storage.shipped_files(read_subject(world.spec, world.paths)) == files
    assert report.storage.shipped_bytes == sum(file.stat().st_size for file in files)


def prompted(world: Any) -> Prompted:
    subject = read_subject(world.spec, world.paths)
    config = LlamaForCausalLM.from_pretrained(world.paths["base"]).config
    return Prompted(subject.shots(), config, NEW)


def test_rows_keep_their_answers_and_the_context_its_bounds(letters, tmp_path, capsys) -> None:
    """Five examples fit before the shortest prompts alone; that they do not is said, once."""
    rows = letters.test_rows
    world = subject_of(letters, tmp_path, FewShot(method="few_shot", examples=5))
    capsys.readouterr()
    shown = prompted(world).rows(rows)
    told = capsys.readouterr().err
    counts = []
    for index in range(len(rows)):
        prompt, answer, chosen = by_hand(letters, index, 5)
        counts.append(len(chosen))
        assert shown.row(index).tolist() == prompt + answer
        assert shown.answer_start[index] == len(prompt)
        # Nothing but the answer is learned, whatever stands before it.
        assert shown.mask(index).tolist() == [0] * len(prompt) + [1] * len(answer)
    assert shown.lengths.max() <= CONTEXT
    fewer = [count for count in counts if count < 5]
    assert 0 < len(fewer) < len(rows)
    assert told.count("warning:") == 1
    assert f"before {len(fewer)} of {len(rows)} test rows" in told
    assert f"the smallest count is {min(fewer)}" in told


def test_a_drawn_set_stands_before_every_row(letters, tmp_path) -> None:
    candidate = FewShot(method="few_shot", examples=1, choose="seed")
    one, other = (
        prompted(subject_of(letters, tmp_path, candidate, seed)).rows(letters.test_rows)
        for seed in (0, 1)
    )
    first = {tuple(one.row(index)[: len(train_rows(letters).row(0))]) for index in range(4)}
    assert len(first) == 1
    assert one.input_ids.tolist() != other.input_ids.tolist()


def test_losses_are_of_answers_alone(letters, tmp_path) -> None:
    """As many tokens are scored with examples as without."""
    world = subject_of(letters, tmp_path, FewShot(method="few_shot", examples=2))
    model = LlamaForCausalLM.from_pretrained(letters.paths["base"]).eval()
    _, alone_N = answer_losses(model, letters.test_rows, "alone")
    _, shown_N = answer_losses(model, prompted(world).rows(letters.test_rows), "shown")
    assert alone_N.tolist() == shown_N.tolist()


def test_a_score_is_that_of_the_whole_measurement(letters, tmp_path) -> None:
    """As a further seed is scored: with its examples in front, and nothing else measured."""
    world = subject_of(letters, tmp_path / "store", FewShot(method="few_shot", examples=2))
    report, _ = read(world, tmp_path / "all")
    (tmp_path / "score").mkdir()
    spec = world.spec.model_copy(update={"accuracy_only": True})
    facts = run(spec, world.paths, tmp_path / "score")
    assert facts["method"] == "few_shot"
    assert facts["figures"] == {
        name: interval.value for name, interval in report.accuracy.intervals().items()
    }
    for name in ("predictions.jsonl", "statistics.safetensors"):
        assert (tmp_path / "score" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()
    assert not (tmp_path / "score" / "criteria.json").exists()


def test_overhead_is_that_of_a_longer_prompt(letters, tmp_path, monkeypatch, capsys) -> None:
    """At each prompt length; one to which the context has no examples to add is left out."""
    world = subject_of(letters, tmp_path / "store", FewShot(method="few_shot", examples=2))
    more = prompted(world).more_tokens(letters.test_rows)
    asked = letters.spec.evaluate.prompt_lengths[0]
    starts = letters.test_rows.answer_start.tolist()
    added = [len(by_hand(letters, index, 2)[0]) - start for index, start in enumerate(starts)]
    assert more == int(np.median(added)) > 0
    full = CONTEXT - latency.DECODE_TOKENS - more
    wanted = [asked, full, full + 1]
    evaluate = world.spec.evaluate.model_copy(update={"prompt_tokens": wanted})
    world = replace(world, spec=world.spec.model_copy(update={"evaluate": evaluate}))
    lengths: list[int] = []
    real = latency.time_once

    def recorded(model, batch, task, sink):
        lengths.append(batch["input_ids"].shape[1])
        real(model, batch, task, sink)

    monkeypatch.setattr(latency, "time_once", recorded)
    capsys.readouterr()
    report, _ = read(world, tmp_path / "out")
    assert set(lengths) == {asked, asked + more, full, full + more}
    assert lengths.count(asked) == lengths.count(asked + more)
    assert f"{full + 1} prompt tokens do not fit" in capsys.readouterr().err
    assert {row.prompt_tokens for row in report.inference_overhead} == {asked, full}
    assert f"{more} tokens longer" in report.how["inference_overhead"]
    assert {row.merged for row in report.inference_overhead} == {False}
