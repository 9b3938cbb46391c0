"""The whole stage on tiny models, as a process and as a function."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from schemas.candidates import Full
from schemas.errors import StageError
from schemas.report import CriteriaReport, Interval, figure_names
from schemas.stages import Call
from tasks.core.bootstrap import load_statistics
from tasks.core.store import Store, read_manifest
from tasks.core.tokens import TokenRows
from tasks.evaluate import probes
from tasks.evaluate.accuracy import chosen_by_hash, require_finite
from tasks.evaluate.measure import warn_if_base
from tasks.evaluate.stage import run
from tasks.evaluate.subject import read_subject
from tasks.report.figures import SPEED

CRITERIA = {"storage", "memory", "computation", "accuracy", "inference_overhead", "swapping"}


def read(out: Path) -> tuple[CriteriaReport, list[dict[str, Any]]]:
    report = CriteriaReport.model_validate_json((out / "criteria.json").read_bytes())
    lines = (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return report, [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def candidate(causal_lora, tmp_path_factory) -> tuple[CriteriaReport, list[dict], dict]:
    out = tmp_path_factory.mktemp("candidate")
    facts = run(causal_lora.spec, causal_lora.paths, out)
    return *read(out), facts


@pytest.fixture
def no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What memory is, other tests measure; its two processes would double the time of one."""
    monkeypatch.setattr(probes.Probe, "peak_mib", lambda probe: 1.0)
    monkeypatch.setattr(probes, "_spawn", lambda spec, paths: subprocess.Popen(["true"]))


def test_base_through_the_command_line(causal, tmp_path) -> None:
    """`python -m tasks.evaluate`: an entry, whose report says that the base is its own measure."""
    call = Call(
        stage="evaluate",
        stage_version=1,
        format="report",
        spec=causal.spec.model_dump(mode="json"),
        paths={name: str(path) for name, path in causal.paths.items()},
    )
    (tmp_path / "call.json").write_text(call.model_dump_json())
    command = [sys.executable, "-m", "tasks.evaluate", str(tmp_path / "call.json")]
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [*command, "--store", str(tmp_path / "store")], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (entry,) = Store(tmp_path / "store").entries()
    report, predictions = read(entry.path)
    assert (report.subject, report.method, report.storage.shipped_bytes) == ("base", "base", 0)
    assert report.accuracy.retention_change == Interval(value=0, low=0, high=0)
    assert report.memory.generate_peak_mib == report.memory.base_generate_peak_mib
    assert report.computation.backward_flops_per_token is None
    assert report.swapping is None
    assert [row.prefill_ratio.value for row in report.inference_overhead] == [1.0] * 4
    assert [line["row"] for line in predictions] == list(range(1, 15))
    assert entry.facts["figures"] == report.figures()


def test_candidate_has_every_figure_that_a_bound_can_name(candidate, causal) -> None:
    report, _, facts = candidate
    assert set(report.how) == CRITERIA
    evaluate = causal.spec.evaluate
    names = figure_names("causal-lm", evaluate.batch_sizes, evaluate.prompt_lengths)
    # Those of Turbo heads are the finished model's.
    turbo = {name for name in names if SPEED.fullmatch(name) or name == "turbo_parameters"}
    assert len(turbo) == 1 + 4 * len(evaluate.batch_sizes)
    assert sorted(facts["figures"]) == sorted(set(names) - turbo)
    assert facts["method"] == "lora"
    assert (
        facts["intervals"]["loss"][0] <= facts["figures"]["loss"] <= facts["intervals"]["loss"][1]
    )
    # As the train entry's manifest says.
    assert facts["figures"]["train_peak_mib"] == 12.5
    assert facts["figures"]["train_rest_mib"] == -0.5
    assert 0 < report.computation.flops_ratio_to_full < 1


def test_what_is_forgotten_is_the_loss_that_switching_the_adapter_on_adds(
    candidate, causal_lora
) -> None:
    """By hand: token by token over the general text, with the adapter and without it."""
    report, _, facts = candidate
    found = report.accuracy
    model = read_subject(causal_lora.spec, causal_lora.paths).load()
    texts = TokenRows.load(causal_lora.paths["prepared"] / "tokens" / "retention.safetensors")
    assert len(texts) > 1

    def nats(index: int) -> float:
        ids = torch.from_numpy(texts.row(index).astype("int64"))
        log_p = model(ids[None]).logits[0, :-1].log_softmax(-1)
        return -sum(log_p[place, token].item() for place, token in enumerate(ids[1:]))

    with torch.inference_mode():
        after = [nats(index) for index in range(len(texts))]
        with model.disable_adapter():
            before = [nats(index) for index in range(len(texts))]
    tokens = sum(len(texts.row(index)) - 1 for index in range(len(texts)))
    # Rows are batched there and alone here: other sums in float32, of some 7 digits.
    assert found.retention_loss == pytest.approx(sum(after) / tokens, rel=1e-5)
    assert found.retention_loss_base == pytest.approx(sum(before) / tokens, rel=1e-5)
    change = found.retention_change
    assert change.value == pytest.approx((sum(after) - sum(before)) / tokens, rel=1e-3, abs=1e-6)
    assert change.value != 0
    each = [
        (one - other) / (len(texts.row(index)) - 1)
        for index, (one, other) in enumerate(zip(after, before, strict=True))
    ]
    assert min(each) - 1e-6 <= change.low <= change.value <= change.high <= max(each) + 1e-6
    assert facts["intervals"]["retention_change"] == [change.low, change.high]


def test_a_further_seed_is_scored_with_what_it_forgot(candidate, causal_lora, tmp_path) -> None:
    report, _, facts = candidate
    spec = causal_lora.spec.model_copy(update={"accuracy_only": True})
    scored = run(spec, causal_lora.paths, tmp_path)
    four = {*report.accuracy.metrics, "retention_change"}
    assert scored["figures"] == {name: facts["figures"][name] for name in four}
    assert scored["intervals"] == {name: facts["intervals"][name] for name in four}
    assert set(load_statistics(tmp_path / "statistics.safetensors")) == four


def test_predictions_add_up_to_the_metrics(candidate) -> None:
    report, predictions, _ = candidate
    metrics = report.accuracy.metrics
    tokens = sum(line["answer_tokens"] for line in predictions)
    loss = sum(line["loss"] * line["answer_tokens"] for line in predictions) / tokens
    assert metrics["loss"].value == pytest.approx(loss)
    right = sum(line["right"] for line in predictions) / len(predictions)
    assert metrics["exact_match"].value == pytest.approx(right)
    shown = {(example.expected, example.got) for example in report.examples}
    assert shown <= {(line["expected"], line["got"]) for line in predictions}


def test_merged_and_finished_is_the_same_model(causal_lora, candidate, tmp_path, no_probes) -> None:
    """A merge entry gives the adapter's metrics, and the training figures of its train entry."""
    store = causal_lora.paths["subject"].parent.parent
    trained = read_manifest(causal_lora.paths["subject"])
    call = Call(
        stage="merge",
        stage_version=1,
        format="transformers",
        spec={},
        paths={},
        inputs={"trained": trained.key},
    )

    def merge(out: Path) -> dict[str, Any]:
        subject = read_subject(causal_lora.spec, causal_lora.paths)
        subject.load_merged().save_pretrained(out / "model")
        return {}

    world = causal_lora.of("finished", Store(store).make(call, merge).path)
    run(world.spec, world.paths, tmp_path)
    report, predictions = read(tmp_path)
    adapter, adapter_predictions, _ = candidate
    assert report.method == "lora"
    assert report.memory.train_peak_mib == adapter.memory.train_peak_mib
    assert report.storage.shipped_bytes > adapter.storage.shipped_bytes
    assert all(row.merged for row in report.inference_overhead)
    # W + s B A rounded to float32 once, against two products: the seventh digit.
    assert report.accuracy.metrics["loss"].value == pytest.approx(
        adapter.accuracy.metrics["loss"].value, rel=1e-5
    )
    assert [line["got"] for line in predictions] == [line["got"] for line in adapter_predictions]


def test_full_tuning_is_its_own_measure(classes, trained, tmp_path, no_probes) -> None:
    entry = trained(classes, tmp_path / "store", Full(method="full"))
    world = classes.of("candidate", entry)
    run(world.spec, world.paths, tmp_path)
    report, predictions = read(tmp_path)
    assert report.computation.flops_ratio_to_full == 1
    assert report.computation.step_time_ratio_to_full == 1
    assert not any(row.merged for row in report.inference_overhead)
    assert set(report.accuracy.metrics) == {"accuracy", "macro_f1", "loss"}
    assert report.accuracy.retention_change is None
    assert "not measured" in report.how["accuracy"]
    right = [line["expected"] == line["got"] for line in predictions]
    assert right == [line["right"] for line in predictions]
    assert report.accuracy.metrics["accuracy"].value == pytest.approx(sum(right) / len(right))


def test_memory_is_the_weights_and_little_more(causal, tmp_path) -> None:
    """21 MiB of weights: the peak holds them, and nothing of Python, torch or the tokenizer.

    Above the weights come cache, activations and the loader's buffers, about 1 MiB here. 8 MiB
    are far below the 400 MiB that a process with torch in it has resident.
    """
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        tie_word_embeddings=True,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    weights_mib = sum(weight.numel() for weight in model.parameters()) * 4 / 2**20
    del model
    started = probes.start(causal.spec, causal.paths | {"base": tmp_path / "base"})
    used = probes.read(started, {})
    assert weights_mib <= used.generate_peak_mib <= weights_mib + 8


def test_an_adapter_that_is_not_applied_is_told(causal_lora, capsys) -> None:
    subject = read_subject(causal_lora.spec, causal_lora.paths)
    base, model = subject.load_base(), subject.load()
    warn_if_base(model, base, causal_lora.paths["prepared"])
    assert "not applied" not in capsys.readouterr().err
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.zero_()
    warn_if_base(model, base, causal_lora.paths["prepared"])
    assert "logits are the base's, bit for bit" in capsys.readouterr().err


def test_a_failed_probe_is_an_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "raise SystemExit('no room')"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with pytest.raises(StageError, match="memory measurement failed:\nno room"):
        probes.read({"base": probes.Probe(process)}, {})


def test_a_merged_model_without_its_train_entry_says_so(causal_lora, tmp_path, capsys) -> None:
    call = Call(
        stage="merge",
        stage_version=1,
        format="transformers",
        spec={},
        paths={},
        inputs={"trained": "0" * 40},
    )
    world = causal_lora.of("finished", Store(tmp_path).make(call, lambda out: {}).path)
    assert read_subject(world.spec, world.paths).method == "unknown"
    assert "training figures are left out" in capsys.readouterr().err


def test_rows_are_chosen_by_content_not_by_place(causal) -> None:
    rows = causal.test_rows
    chosen = chosen_by_hash(rows, 5)
    assert len(chosen) == 5
    assert sorted(chosen) == list(chosen)
    texts = {rows.row(index).tobytes() for index in chosen}
    smaller = {rows.row(index).tobytes() for index in chosen_by_hash(rows, 3)}
    assert smaller < texts
    assert chosen_by_hash(rows, None).tolist() == list(range(len(rows)))


def test_a_loss_that_is_no_number_is_an_error() -> None:
    with pytest.raises(StageError, match="first of test row 8"):
        require_finite(torch.tensor([1.0, float("nan")]).numpy(), [{"row": 7}, {"row": 8}])
