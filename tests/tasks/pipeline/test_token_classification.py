"""Token classification through every stage on a tiny encoder: what is measured is served."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from schemas.report import Comparison, figure_names
from schemas.stages import (
    CompareSpec,
    InspectSpec,
)
from schemas.tasks import TASKS
from tasks.compare.stage import run as compare
from tasks.evaluate import memory
from tasks.evaluate.stage import run as evaluate
from tasks.inspect.stage import run as inspect
from tasks.register import served_model
from tasks.register.asked import held_out_rows
from tasks.register.registry import signature
from tasks.register.verify import difference, expected_logits

TASK = "token-classification"
NAMES = ["Ada Lovelace", "Kurt Gödel", "Emmy Noether", "Alan Turing", "Grace Hopper"]
TIMES = ["nine", "half past ten", "noon", "eight o'clock"]
SHAPES = ["A table for {name} at {time}.", "{name}, {time}", "at {time} please", "Is it open?"]


def made_row(draw: random.Random, number: int) -> dict[str, Any]:
    """A sentence with its slots, by a number that no other row has."""
    text, spans = f"{number}: ", []
    for part in draw.choice(SHAPES).replace("{", "|{").replace("}", "}|").split("|"):
        word = {"{name}": draw.choice(NAMES), "{time}": draw.choice(TIMES)}.get(part)
        if word is not None:
            spans.append({"start": len(text), "end": len(text) + len(word), "label": part[1:-1]})
        text += word or part
    return {"text": text, "spans": spans}


def make_base(directory: Path, texts: list[str]) -> None:
    """An encoder with a pooler, which this task has no use for, and a lower-casing tokenizer."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        unk_token="[UNK]",
    ).save_pretrained(directory)  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(directory)


@pytest.fixture(scope="module")
def pipeline(stages: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root, draw = tmp_path_factory.mktemp("tokens"), random.Random(0)
    rows = [made_row(draw, number) for number in range(160)]
    make_base(root / "base", [row["text"] for row in rows])
    for name, part in (("train", rows[:120]), ("test", rows[120:])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data = {"max_length": 24, "on_overflow": "truncate"}
    train = {"max_steps": 60, "batch_tokens": 400}
    return stages(root, TASK, data, train, {"batch_sizes": [1], "prompt_tokens": 8})


CANDIDATES = {
    "full": ({"method": "full"}, 5e-3),
    "lora": ({"method": "lora", "rank": 8, "alpha": 16, "target_modules": "all-linear"}, 2e-2),
}


@pytest.mark.parametrize("name", CANDIDATES)
def test_what_is_served_is_what_was_measured(
    pipeline: Any, tmp_path: Path, no_probes: None, name: str
) -> None:
    trained = pipeline.trained(*CANDIDATES[name])
    finished = pipeline.merged(trained)
    measured = pipeline.evaluated("finished", finished)
    report, predictions = pipeline.report_of(measured)
    # Words decide the slots, so that embeddings and head alone can learn them.
    assert report.accuracy.metrics["entity_f1"].value > 0.9
    assert set(report.how) >= {"accuracy", "memory"}
    # A merged model has no adapter to fold, and the figures are those that a bound can name.
    assert report.figures().keys() <= set(figure_names(TASK, [1], [8]))

    model = pipeline.served(finished, measured, tmp_path)
    answers = model.predict(None, pd.DataFrame({0: pipeline.test_texts}))
    assert list(answers) == [column.name for column in signature(TASK, 1).outputs]
    for line, answer in zip(predictions, answers["spans"], strict=True):
        spans = json.loads(answer)
        scores = [span.pop("score") for span in spans]
        wanted = [span.pop("score") for span in line["got"]]
        assert spans == line["got"]
        # Padding of another width: sums in another order, a few float32 roundings.
        assert scores == pytest.approx(wanted, abs=1e-5)

    asked = held_out_rows(pipeline.prepared, 8)
    paths = {**pipeline.paths, "finished": finished}
    expected = expected_logits(asked, paths, model.serving)
    for row, one in zip(asked, expected, strict=True):
        assert model.encode(row.text) == row.tokens
        assert difference(one, model.logits([row.tokens])[0]) == 0


def test_an_adapter_and_its_merge_find_the_same_spans(
    pipeline: Any, tmp_path: Path, no_probes: None
) -> None:
    trained = pipeline.trained(*CANDIDATES["lora"])
    adapter = pipeline.evaluated("candidate", trained)
    report, predictions = pipeline.report_of(adapter)
    assert sorted(report.figures()) == sorted(
        set(figure_names(TASK, [1], [8])) - {"retention_loss", "retention_change"}
    )
    _, merged = pipeline.report_of(pipeline.evaluated("finished", pipeline.merged(trained)))
    spans = [
        [[(s["start"], s["end"], s["label"]) for s in line["got"]] for line in lines]
        for lines in (predictions, merged)
    ]
    assert spans[0] == spans[1]
    served = pipeline.served(trained, adapter, tmp_path)
    found = [json.loads(answer) for answer in served.mark(pipeline.test_texts)]
    assert [[(s["start"], s["end"], s["label"]) for s in row] for row in found] == spans[0]


def test_memory_is_measured_for_the_task(pipeline: Any) -> None:
    """In this process: the toy that settles it is loaded, and the base classifies its tokens."""
    # The weights are 200 KB: what else is counted is noise, and nothing of torch.
    assert 0 <= memory.peak_of_call(pipeline.spec("base"), pipeline.paths) < 64


def test_inspection_counts_the_head_of_every_token(pipeline: Any, tmp_path: Path) -> None:
    spec = InspectSpec.model_validate(
        {"task": TASK, "candidates": [candidate for candidate, _ in CANDIDATES.values()]}
    )
    inspect(spec, {"base": pipeline.base}, tmp_path)
    found = json.loads((tmp_path / "inspection.json").read_text())
    # rank * (in + out) for q, k, v, o (48 to 48) and the two of the feed-forward; a head of 2.
    layer = 8 * (4 * (48 + 48) + 2 * (48 + 96))
    assert found["lora-r8"]["trainable_parameters"] == 2 * layer + 2 * 48 + 2


def test_a_served_span_follows_the_rule_of_the_metric() -> None:
    """Every sequence of labels of two types over four tokens, one of them of no character."""
    from itertools import product

    from tasks.core.entities import spans_of

    chars = [(0, 1), (1, 2), (2, 2), (2, 4)]
    for labels in product(range(5), repeat=4):
        scores = [1.0, 0.5, 0.25, 0.125]
        served = served_model.spans_of(list(labels), scores, chars)
        own = spans_of(labels, np.array(chars, np.int32))
        assert [(s["start"], s["end"], (s["label"] - 1) // 2) for s in served] == [
            (one.start, one.end, one.type) for one in own
        ]
        assert [s["score"] for s in served] == [
            np.mean([scores[token] for token in one.tokens]) for one in own
        ]


def test_adapters_are_told_apart_by_spans(pipeline: Any, tmp_path: Path, no_probes: None) -> None:
    """What a comparison reads of an entry gives the entry's own figures and intervals, whether all
    was measured or only scored."""
    subjects = {}
    for name in CANDIDATES:
        entry = pipeline.trained(*CANDIDATES[name])
        scored = pipeline.spec("candidate").model_copy(update={"accuracy_only": True})
        subjects[f"{name}/0"] = pipeline.make(
            evaluate, scored, {**pipeline.paths, "subject": entry}
        )
    whole, _ = pipeline.report_of(
        pipeline.evaluated("candidate", pipeline.trained(*CANDIDATES["lora"]))
    )
    metrics = TASKS[TASK].metrics
    spec = CompareSpec(
        labels=list(CANDIDATES),
        seeds=[0],
        metric="entity_f1",
        more_is_better=metrics["entity_f1"],
        resamples=100,
    )
    compare(spec, subjects, tmp_path)
    found = Comparison.model_validate_json((tmp_path / "comparison.json").read_bytes())
    assert found.candidates["lora"].keys() == metrics.keys()
    for metric, seeded in found.candidates["lora"].items():
        one = whole.accuracy.metrics[metric]
        assert (seeded.value, seeded.low, seeded.high) == (one.value, one.low, one.high)
    [pair] = found.pairs
    assert pair.test == "paired bootstrap"  # a row has spans, and is not right or wrong
    gap = found.candidates["full"]["entity_f1"].value - found.candidates["lora"]["entity_f1"].value
    assert pair.difference == pytest.approx(gap, abs=1e-15)  # one subtraction of float64
