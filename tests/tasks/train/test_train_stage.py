"""The whole stage on small real models: what it leaves, what it refuses, what it says aloud."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from schemas.errors import DivergedError, StageError, UserError
from schemas.report import CurvePoint
from schemas.stages import TrainSpec
from schemas.tasks import TASKS, is_encoder_decoder, is_labelled, reads_images
from tasks.core.adapters import TUNER
from tasks.core.entities import IGNORED
from tasks.core.models import load_base, load_trained
from tasks.core.tokens import TokenRows
from tasks.evaluate.batches import run_on
from tasks.methods.table import METHODS
from tasks.train import memory, placement, stage
from tasks.train.stage import run

LABELS = ["low", "middle", "high"]
CONFIG = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
T5 = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 3,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
IMAGES = {"image_size": 16, "patch_size": 4}
IMAGE_TOKENS = 17


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def write_rows(folder: Path, task: str, count: int = 120) -> None:
    """Causal: rows count upwards. Classification: the label is the third of its first token, or
    every token's own; the first token of a row has none."""
    (folder / "tokens").mkdir(parents=True)
    if reads_images(task):
        write_images(folder, count)
        return
    draw = np.random.default_rng(0)
    lengths = draw.integers(6, 20, count)
    starts = draw.integers(3, 70, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([a + np.arange(n) for a, n in zip(starts, lengths, strict=True)])
    mask = np.ones(len(ids), dtype=np.uint8)
    mask[offsets[:-1]] = 0
    answers = not is_labelled(task)
    token_labels = (ids * 3 // CONFIG["vocab_size"]).astype(np.int32)
    token_labels[offsets[:-1]] = IGNORED
    TokenRows(
        input_ids=ids.astype(np.int32),
        offsets=offsets,
        source_rows=np.arange(count) + 1,
        loss_mask=mask if answers else None,
        answer_start=np.full(count, 1 + 2 * is_encoder_decoder(task)) if answers else None,
        labels=starts * 3 // 70 if task == "sequence-classification" else None,
        token_labels=token_labels if task == "token-classification" else None,
    ).save(folder / "tokens" / "train.safetensors")
    if not answers:
        (folder / "labels.json").write_text(json.dumps(LABELS))


def write_images(folder: Path, count: int) -> None:
    """Noise, of which one channel is lighter: the label's."""
    labels = np.arange(count) % 3
    pixels = np.random.default_rng(0).integers(0, 100, (count, 3, 16, 16), dtype=np.uint8)
    pixels[np.arange(count), labels] += 100
    TokenRows(
        input_ids=np.zeros(count * IMAGE_TOKENS, np.int32),
        offsets=np.arange(count + 1) * IMAGE_TOKENS,
        source_rows=np.arange(count) + 1,
        labels=labels,
        values=np.tile(np.linspace(-1, 1, 256, dtype=np.float32), (3, 1)),
        pixels=pixels,
    ).save(folder / "tokens" / "train.safetensors")
    (folder / "labels.json").write_text(json.dumps(LABELS))


def some_row(task: str) -> dict[str, torch.Tensor]:
    """A row that is none of training's, as a base of that task reads it."""
    if reads_images(task):
        return {"pixel_values": torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)}
    ids = torch.arange(5, 13)[None]
    if is_encoder_decoder(task):  # the decoder goes on from some of the tokens
        return {"input_ids": ids, "decoder_input_ids": torch.cat([ids[:, :1] * 0, ids[:, 3:]], 1)}
    return {"input_ids": ids}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    root = tmp_path_factory.mktemp("stage")
    torch.manual_seed(0)
    bases = {
        "causal-lm": LlamaForCausalLM(LlamaConfig(**CONFIG, tie_word_embeddings=True)),
        "seq2seq": T5ForConditionalGeneration(T5Config(**T5)),
        "sequence-classification": BertForSequenceClassification(BertConfig(**CONFIG)),
        "token-classification": BertForTokenClassification(BertConfig(**CONFIG)),
        "image-classification": ViTForImageClassification(ViTConfig(**CONFIG, **IMAGES)),
    }
    for task, model in bases.items():
        model.save_pretrained(root / task / "base")
        (root / task / "base" / "tokenizer_config.json").write_text("{}")
        write_rows(root / task / "prepared", task)
    return {
        task: {"base": root / task / "base", "prepared": root / task / "prepared"} for task in bases
    }


def make_spec(task: str, candidate: dict[str, object], dtype: str = "float32", **train: object):
    settings = {"max_steps": 30, "batch_tokens": 400, "learning_rate": 5e-3, **train}
    return TrainSpec.model_validate(
        {"task": task, "candidate": candidate, "train": settings, "dtype": dtype}
    )


FULL = {"method": "full"}
LORA = {"method": "lora", "rank": 4}
OTHERS = [
    {"method": "adalora", "rank": 3, "initial_rank": 6},
    {"method": "ia3"},
    {"method": "layer_norm"},
    {"method": "last_layers", "layers": 1},
    {"method": "bitfit"},
    {"method": "lora", "rank": 4, "rslora": True, "dora": True, "b_rate": 4},
    {"method": "bottleneck", "placement": "double_sequential", "reduction_factor": 4},
    {"method": "prompt_tuning"},
    {"method": "p_tuning", "encoder": "lstm", "hidden_size": 8},
    {"method": "prefix_tuning"},
]
#: Each with the tasks that it can be used for.
USES = [
    pytest.param(other, task, id=f"{other['method']}-{task}")
    for other in OTHERS
    for task in METHODS[other["method"]].tasks
]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("candidate", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_methods_learn_every_task_and_reload(tmp_path, places, task, candidate, dtype):
    steps = 60 if candidate == LORA else 30
    rate = 1e-2 if candidate == LORA else 5e-3
    spec = make_spec(task, candidate, dtype, learning_rate=rate, max_steps=steps)
    facts = run(spec, places[task], tmp_path)
    # A random frozen base gives low-rank updates little to work with.
    share = 0.97 if candidate == LORA else 0.9
    assert facts["final_loss"] < share * facts["first_loss"]
    assert facts["steps"] == steps
    curve = [
        CurvePoint.model_validate(p) for p in json.loads((tmp_path / "curve.json").read_text())
    ]
    assert [point.step for point in curve] == list(range(1, steps + 1))
    assert curve[-1].tokens == facts["tokens"]
    assert facts["format"] == ("transformers" if candidate == FULL else "peft-adapter")

    labels = LABELS if is_labelled(task) else None
    base = load_base(places[task]["base"], task, labels, dtype)
    tuned = load_trained(places[task]["base"], tmp_path / "model", task, labels, dtype)
    row = some_row(task)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        assert not torch.allclose(tuned(**row).logits, base(**row).logits, atol=0.05)
        if task == "causal-lm" and candidate == FULL:
            # Rows count upwards, and the tuned model does.
            ids = row["input_ids"]
            guesses = tuned(input_ids=ids).logits[0, 1:-1].argmax(-1)
            assert (guesses == ids[0, 2:]).float().mean() >= 0.5


@pytest.mark.parametrize(("candidate", "task"), USES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_other_adapter_acts_and_reloads(tmp_path, places, task, candidate, dtype):
    """The loss falls, and a fresh base with the adapter differs from the base alone."""
    rate = 0.1 if task == "causal-lm" else 0.03
    spec = make_spec(task, candidate, dtype, learning_rate=rate, max_steps=60)
    if not is_labelled(task) and candidate["method"] == "bitfit":
        with pytest.raises(UserError, match="has no bias"):
            run(spec, places[task], tmp_path)
        return
    facts = run(spec, places[task], tmp_path)
    # A random frozen base gives so few weights little to work with, and virtual tokens in front
    # of it hardly more than a bias.
    share = 0.999 if candidate["method"] in ("prompt_tuning", "p_tuning") else 0.99
    assert facts["final_loss"] < share * facts["first_loss"]
    assert (tmp_path / "model" / TUNER).exists() == (
        candidate["method"] in ("bitfit", "bottleneck")
    )
    labels = LABELS if is_labelled(task) else None
    base = load_base(places[task]["base"], task, labels, dtype)
    tuned = load_trained(places[task]["base"], tmp_path / "model", task, labels, dtype)
    row = some_row(task)
    with torch.no_grad():
        assert not torch.allclose(run_on(tuned, row).logits, base(**row).logits, atol=0.05)


def test_no_branch_of_a_base_is_dropped_in_training():
    """BEiT drops whole branches of a row at random, by a module that is no dropout of torch's."""
    config = BeitConfig(**CONFIG, **IMAGES, drop_path_rate=0.9)
    model = BeitForImageClassification(config)
    row = some_row("image-classification")
    with torch.no_grad():
        expected = model.eval()(**row).logits
        assert not torch.equal(model.train()(**row).logits, expected)
        placement.without_base_dropout(model)
        assert torch.equal(model(**row).logits, expected)


def test_an_adapter_of_a_kind_that_peft_lacks_brings_its_tuner(tmp_path, places):
    """In a process where only what lies in its directory can make it known to PEFT."""
    task = "causal-lm"
    spec = make_spec(task, {"method": "bottleneck"}, max_steps=3)
    run(spec, places[task], tmp_path)
    tuned = load_trained(places[task]["base"], tmp_path / "model", task, None, "float32")
    ids = torch.arange(5, 13)[None]
    expected = tuned(input_ids=ids).logits.detach()
    script = f"""
import sys, torch
from pathlib import Path
from tasks.core.models import load_trained
tuned = load_trained(Path({str(places[task]["base"])!r}), Path({str(tmp_path / "model")!r}),
                     {task!r}, None, "float32")
assert not any(name.startswith("tasks.methods") for name in sys.modules)
torch.save(tuned(input_ids=torch.arange(5, 13)[None]).logits.detach(), sys.argv[1])
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "logits.pt")], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_an_adapter_names_no_place_and_is_float32(tmp_path, places):
    run(make_spec("causal-lm", LORA, "bfloat16", max_steps=3), places["causal-lm"], tmp_path)
    config = (tmp_path / "model" / "adapter_config.json").read_text()
    assert str(places["causal-lm"]["base"]) not in config
    assert "/" not in json.loads(config)["base_model_name_or_path"]
    weights = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_a_whole_model_is_in_its_dtype_with_its_tokenizer(tmp_path, places):
    run(make_spec("causal-lm", FULL, "bfloat16", max_steps=3), places["causal-lm"], tmp_path)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert (tmp_path / "model" / "tokenizer_config.json").exists()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "peftflow" not in json.dumps(config)


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path, places, task):
    def train(name: str, seed: int) -> bytes:
        run(make_spec(task, LORA, max_steps=4, seed=seed), places[task], tmp_path / name)
        return (tmp_path / name / "model" / "adapter_model.safetensors").read_bytes()

    assert train("a", 0) == train("b", 0)
    assert train("c", 1) != train("d", 0)


@pytest.mark.parametrize("task", TASKS)
def test_micro_batches_bound_memory_and_not_the_result(tmp_path, places, task):
    """float32, 4 steps: what is left is the rounding of sums in another order."""
    curves = []
    for budget in (32, 4096):
        out = tmp_path / str(budget)
        spec = make_spec(task, LORA, max_steps=4, micro_batch_tokens=budget)
        run(spec, places[task], out)
        curves.append([point["loss"] for point in json.loads((out / "curve.json").read_text())])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_nothing_runs_backward_below_the_lowest_trained_layer(places, monkeypatch):
    """Only the last layer's q_proj learns: what comes before it has no graph."""
    model = load_base(places["causal-lm"]["base"], "causal-lm", None, "float32")
    model.requires_grad_(False)
    model.model.layers[2].self_attn.q_proj.weight.requires_grad_(True)
    seen: dict[str, bool] = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda module, inputs, output, index=index: seen.update(
                {str(index): output.requires_grad}
            )
        )
    model(input_ids=torch.arange(8)[None])
    assert seen == {"0": False, "1": False, "2": True}


def test_gradient_checkpointing_gives_the_same_and_keeps_less(tmp_path, places):
    losses, kept = [], []
    measured = memory.saved_bytes

    def measure(*args: object) -> int:
        kept.append(measured(*args))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "saved_bytes", measure)
        for checkpointing in (False, True):
            spec = make_spec("causal-lm", LORA, max_steps=4, gradient_checkpointing=checkpointing)
            losses.append(
                run(spec, places["causal-lm"], tmp_path / str(checkpointing))["final_loss"]
            )
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert kept[1] < 0.6 * kept[0]


def test_a_run_that_does_not_fit_says_so_before_its_first_step(tmp_path, places, monkeypatch):
    monkeypatch.setattr(stage, "available_mib", lambda device: 0.5)
    monkeypatch.setattr(stage, "train", lambda *_: pytest.fail("it started"))
    with pytest.raises(UserError, match=r"needs about[\s\S]*micro_batch_tokens"):
        run(make_spec("causal-lm", LORA), places["causal-lm"], tmp_path)


def test_the_memory_estimate_is_near_what_autograd_keeps(places):
    """The estimate for a long batch, from a short one, against counting the long one itself."""
    spec = make_spec("causal-lm", LORA, micro_batch_tokens=512)
    rows, _ = stage.read_rows(spec, places["causal-lm"]["prepared"])
    model = load_base(places["causal-lm"]["base"], "causal-lm", None, "float32")
    model = stage.method_for("lora", "causal-lm").build(model, spec.candidate, "causal-lm")
    job = stage.prepare_job(spec, rows, None, model, 0)
    cpu = torch.device("cpu")
    estimate = memory.needed_mib(model, stage.trained(model), job, cpu)
    batch = job.batch(np.arange(30))
    counted = memory.saved_bytes(model, batch, torch.float32) / batch.input_ids_BL.numel() * 400
    fixed = 3 * memory.BLOCK_BYTES + 3 * 4 * sum(w.numel() for w in stage.trained(model).values())
    # The estimate adds attention's square as if every row were the longest: it may only be above.
    rest = estimate - fixed / 2**20 - memory.KERNEL_MIB
    assert counted / 2**20 <= rest <= 2 * counted / 2**20


def test_a_loss_that_is_no_number_stops_with_the_step(tmp_path, places):
    spec = make_spec("causal-lm", FULL, learning_rate=1e20, warmup_ratio=0.0)
    with pytest.raises(StageError, match="at step"):
        run(spec, places["causal-lm"], tmp_path)
    assert not (tmp_path / "model").exists()


def test_a_method_that_changes_nothing_is_an_error(tmp_path, places, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    with pytest.raises(StageError, match="no trained weight moved"):
        run(make_spec("causal-lm", LORA, max_steps=3), places["causal-lm"], tmp_path)


def test_an_adapter_that_does_not_act_is_an_error_though_its_head_learns(tmp_path, places):
    """A rate of 0 for what is no head: the head alone moves."""
    method = dataclasses.replace(
        stage.method_for("lora", "sequence-classification"),
        rate_of=lambda candidate, name: float(stage.SAVED in name),
    )
    with (
        patch.object(stage, "method_for", lambda *_: method),
        pytest.raises(DivergedError, match="no trained weight"),
    ):
        run(
            make_spec("sequence-classification", LORA, max_steps=3),
            places["sequence-classification"],
            tmp_path,
        )


@pytest.mark.parametrize("steps", [6, 15])
def test_a_loss_that_did_not_fall_is_said_aloud(tmp_path, places, capfd, steps):
    run(
        make_spec("causal-lm", LORA, max_steps=steps, learning_rate=1e-12, batch_tokens=60),
        places["causal-lm"],
        tmp_path,
    )
    captured = capfd.readouterr().err
    assert "the loss did not fall" in captured


def test_no_rows_and_rows_with_nothing_to_learn_are_refused(tmp_path, places):
    (tmp_path / "tokens").mkdir()
    empty = TokenRows(
        input_ids=np.zeros(0, dtype=np.int32),
        offsets=np.zeros(1, dtype=np.int64),
        source_rows=np.zeros(0, dtype=np.int64),
        loss_mask=np.zeros(0, dtype=np.uint8),
    )
    empty.save(tmp_path / "tokens" / "train.safetensors")
    paths = {**places["causal-lm"], "prepared": tmp_path}
    with pytest.raises(UserError, match="no rows to train on"):
        run(make_spec("causal-lm", LORA), paths, tmp_path / "out")
    rows = TokenRows.load(places["causal-lm"]["prepared"] / "tokens" / "train.safetensors")
    rows.loss_mask[:] = 0
    rows.save(tmp_path / "tokens" / "train.safetensors")
    with pytest.raises(UserError, match=r"no token to learn \(120 such rows\)"):
        run(make_spec("causal-lm", LORA), paths, tmp_path / "out")


def test_a_pickled_base_is_refused(tmp_path, places):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    paths = {**places["causal-lm"], "base": tmp_path}
    with pytest.raises(UserError, match="pickled checkpoint"):
        run(make_spec("causal-lm", LORA), paths, tmp_path / "out")


def test_a_base_that_looks_back_over_a_window_keeps_its_own_attention(places):
    model = load_base(places["causal-lm"]["base"], "causal-lm", None, "float32")
    model.config.sliding_window = 8
    cpu = torch.device("cpu")
    assert not placement.use_fast_attention(model, cpu, 20, "causal-lm")
    assert placement.use_fast_attention(model, cpu, 8, "causal-lm")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("candidate", [FULL, LORA], ids=["full", "lora"])
def test_on_a_gpu_packed_rows_learn_as_on_the_cpu(tmp_path, places, candidate, monkeypatch):
    losses = []
    for device in ("cuda", "cpu"):
        monkeypatch.setenv("PEFTFLOW_DEVICE", device)
        spec = make_spec("causal-lm", candidate, max_steps=10)
        losses.append(run(spec, places["causal-lm"], tmp_path / device)["final_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
