"""Seq2seq through every stage on tiny encoder-decoders: what is measured is served."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from schemas.errors import UserError
from schemas.report import figure_names
from schemas.stages import (
    InspectSpec,
)
from tasks.core.models import load_trained
from tasks.evaluate import generate as generating
from tasks.evaluate import memory, scoring
from tasks.inspect.stage import run as inspect
from tasks.register.asked import held_out_rows
from tasks.register.registry import signature
from tasks.register.verify import difference, expected_logits

TASK = "seq2seq"
COLOURS, THINGS, OTHERS = ["red", "blue", "grey"], ["cup", "lamp", "desk"], ["a", "the", "my", "or"]
WORDS = [*COLOURS, *THINGS, *OTHERS, "broken"]
NEW_TOKENS = 8
SIZES = {
    "t5": T5Config(
        d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1, feed_forward_proj="gated-gelu", vocab_size=32,
    ),
    "bart": BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=32,
        max_position_embeddings=48, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        decoder_start_token_id=1,
    ),
}  # fmt: skip


def make_base(directory: Path, kind: str) -> None:
    """Words as tokens, and an end behind every text. BART's settings ask for beams and more,
    which nothing that is evaluated here has."""
    known = ["<pad>", "</s>", "<s>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(SIZES[kind])
    model.save_pretrained(directory)
    if kind == "bart":
        GenerationConfig(
            num_beams=2, forced_bos_token_id=2, min_length=5, no_repeat_ngram_size=2,
            eos_token_id=1, pad_token_id=0, decoder_start_token_id=1,
        ).save_pretrained(directory)  # fmt: skip


def make_rows(root: Path) -> None:
    """The task: say which thing of which colour is named among other words, and whether it is
    broken."""
    draw, rows = random.Random(0), {}
    while len(rows) < 200:
        answer = [draw.choice(COLOURS), draw.choice(THINGS)] + ["broken"] * draw.randint(0, 1)
        words = [*answer, *draw.choices(OTHERS, k=draw.randint(1, 6))]
        draw.shuffle(words)
        rows[" ".join(words)] = " ".join(answer)
    lines = [json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows.items()]
    places = {"train": lines[:150], "test": lines[150:190], "retention": lines[190:]}
    for name, part in places.items():
        (root / f"{name}.jsonl").write_text("".join(part))


@pytest.fixture(scope="module")
def pipelines(stages: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = {}
    for kind in SIZES:
        root = tmp_path_factory.mktemp(kind)
        make_base(root / "base", kind)
        make_rows(root)
        measures = {"batch_sizes": [1, 3], "prompt_tokens": [8, 4], "max_new_tokens": NEW_TOKENS}
        train = {"max_steps": 150, "batch_tokens": 300}
        made[kind] = stages(root, TASK, {"max_length": 12}, train, measures, NEW_TOKENS)
    return made


LORA = {"method": "lora", "rank": 8, "alpha": 16, "target_modules": "all-linear"}
LOHA = {"peft_type": "LOHA", "r": 4, "target_modules": "all-linear"}
CANDIDATES = {
    "full": ({"method": "full"}, 5e-3),
    "lora": (LORA, 2e-2),
    "prompt_tuning": ({"method": "prompt_tuning", "virtual_tokens": 5}, 0.1, 30),
    "p_tuning": ({"method": "p_tuning", "virtual_tokens": 5}, 1e-2, 30),
    "prefix_tuning": ({"method": "prefix_tuning", "virtual_tokens": 5}, 0.1, 30),
    "peft": ({"method": "peft", "peft": LOHA}, 1e-2, 30),
    "zero_shot": ({"method": "zero_shot"}, 1e-2),
}
MERGED = ("full", "lora")


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("name", CANDIDATES)
def test_what_is_served_is_what_was_measured(
    pipelines: dict[str, Any], tmp_path: Path, no_probes: None, kind: str, name: str
) -> None:
    pipeline = pipelines[kind]
    finished = pipeline.trained(*CANDIDATES[name])
    if name in MERGED:
        finished = pipeline.merged(finished)
    measured = pipeline.evaluated("finished", finished)
    report, predictions = pipeline.report_of(measured)
    if name == "full":  # a random frozen base gives a low-rank update little to work with
        assert report.accuracy.metrics["exact_match"].value > 0.5
    assert report.figures().keys() <= set(figure_names(TASK, [1, 3], [8, 4]))
    assert report.accuracy.retention_change is not None
    assert all(row.token_p50_ms is not None for row in report.inference_overhead)

    model = pipeline.served(finished, measured, tmp_path)
    answers = model.predict(None, pd.DataFrame({0: pipeline.test_texts}))
    assert list(answers) == [column.name for column in signature(TASK, 1).outputs]
    assert answers["completion"].tolist() == [line["got"] for line in predictions]

    asked = held_out_rows(pipeline.prepared, 8)
    expected = expected_logits(asked, {**pipeline.paths, "finished": finished}, model.serving)
    for row, one in zip(asked, expected, strict=True):
        end = len(row.prompt)
        assert model.ask(row.text, NEW_TOKENS) == row.prompt
        [served] = model.logits([row.tokens[:end]], [row.tokens[end:]])
        assert len(served) == len(row.tokens) - end
        assert difference(one, served) == 0


@pytest.mark.parametrize("kind", SIZES)
def test_an_adapter_served_beside_its_base_says_what_its_merge_says(
    pipelines: dict[str, Any], tmp_path: Path, no_probes: None, kind: str
) -> None:
    pipeline = pipelines[kind]
    trained = pipeline.trained(*CANDIDATES["lora"])
    adapter = pipeline.evaluated("candidate", trained)
    report, predictions = pipeline.report_of(adapter)
    wanted = set(figure_names(TASK, [1, 3], [8, 4])) - {"field_f1"}
    assert set(report.figures()) == wanted
    _, merged = pipeline.report_of(pipeline.evaluated("finished", pipeline.merged(trained)))
    assert [line["got"] for line in merged] == [line["got"] for line in predictions]
    # The same weights, added up in another order: float32 roundings.
    losses = [[line["loss"] for line in lines] for lines in (merged, predictions)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    served = pipeline.served(trained, adapter, tmp_path)
    assert served.complete(pipeline.test_texts, NEW_TOKENS) == [line["got"] for line in predictions]


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("rows", [1, 5, 128])
def test_batched_answers_are_transformers_own_one_by_one(
    pipelines: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: str, rows: int
) -> None:
    pipeline = pipelines[kind]
    entry = pipeline.trained(*CANDIDATES["full"])
    model: Any = load_trained(pipeline.base, entry / "model", TASK, None, "float32")
    test = pipeline.test_rows
    prompts = [test.row(index)[:end] for index, end in enumerate(test.answer_start.tolist())]
    monkeypatch.setattr(generating, "GENERATE_ROWS", rows)
    # Without its own stop a row goes on to the limit, and leaves the batch at one of these.
    for stops in (frozenset(), frozenset({1}), frozenset({4, 6})):
        settings = GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=sorted(stops) or None,
            pad_token_id=0, decoder_start_token_id=model.config.decoder_start_token_id,
        )  # fmt: skip
        model.generation_config = settings
        answers = generating.generate(model, prompts, stops, NEW_TOKENS)
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.from_numpy(prompt[None].astype(np.int64))
            own = model.generate(ids, generation_config=settings)[0, 1:].tolist()
            end = next((at for at, token in enumerate(own) if token in stops), len(own))
            assert answer.tokens == own[:end]
    assert len({len(answer.tokens) for answer in answers}) > 2, "rows end at different steps"


@pytest.mark.parametrize("kind", SIZES)
def test_losses_of_a_batch_are_those_of_each_row(pipelines: dict[str, Any], kind: str) -> None:
    pipeline, rows = pipelines[kind], pipelines[kind].test_rows
    model = AutoModelForSeq2SeqLM.from_pretrained(pipeline.base).eval()
    loss_N, tokens_N = scoring.answer_losses(model, rows, "loss")
    for index, end in enumerate(rows.answer_start.tolist()):
        ids = torch.from_numpy(rows.row(index)[None].astype(np.int64))
        with torch.no_grad():
            own = model(input_ids=ids[:, :end], labels=ids[:, end:]).loss
        assert tokens_N[index] == ids.shape[1] - end
        assert loss_N[index] == pytest.approx(float(own) * tokens_N[index], rel=1e-5)


def test_memory_is_measured_for_the_task(pipelines: dict[str, Any]) -> None:
    """In this process: the toy that settles it is loaded, and the base writes for its encoder."""
    pipeline = pipelines["t5"]
    # The weights are 200 KB: what else is counted is noise, and nothing of torch.
    assert 0 <= memory.peak_of_call(pipeline.spec("base"), pipeline.paths) < 64


@pytest.mark.parametrize(
    ("config", "task", "words"),
    [
        (SIZES["t5"], "causal-lm", "a t5 model.*none for causal-lm.*this one is for seq2seq"),
        (SIZES["bart"], "causal-lm", "a bart model.*none for causal-lm.*this one is for seq2seq"),
        (LlamaConfig(), TASK, "a llama model.*such as T5 or BART; this one is for causal-lm"),
    ],
)
def test_a_base_of_the_other_kind_is_refused_with_the_fix(
    tmp_path: Path, config: Any, task: str, words: str
) -> None:
    config.save_pretrained(tmp_path)
    spec = InspectSpec.model_validate({"task": task, "candidates": [LORA]})
    with pytest.raises(UserError, match=f"(?s){words}"):
        inspect(spec, {"base": tmp_path}, tmp_path)


def test_examples_before_a_prompt_are_refused(pipelines: dict[str, Any], tmp_path: Path) -> None:
    spec = InspectSpec.model_validate({"task": TASK, "candidates": [{"method": "few_shot"}]})
    with pytest.raises(UserError, match="few_shot cannot be used for seq2seq"):
        inspect(spec, {"base": pipelines["t5"].base}, tmp_path)
