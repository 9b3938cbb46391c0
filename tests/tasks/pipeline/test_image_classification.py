"""Image classification through every stage on a tiny DeiT: what is measured is served."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.types import DataType
from PIL import Image
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DeiTConfig,
    DeiTForImageClassification,
)

from schemas.errors import UserError
from schemas.report import DataReport, figure_names
from schemas.stages import (
    CostSpec,
    InspectSpec,
)
from tasks.cost.stage import run as cost
from tasks.evaluate import memory
from tasks.inspect.stage import run as inspect
from tasks.register import served_model
from tasks.register.asked import held_out_rows
from tasks.register.registry import signature
from tasks.register.verify import difference, expected_logits
from tasks.report import data_view, lengths

TASK = "image-classification"
COLOURS = ["red", "green", "blue"]
PROCESSOR = {
    "image_processor_type": "DeiTImageProcessor",
    "size": {"height": 16, "width": 16},
    "do_center_crop": False,
    "resample": 3,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
LORA = {"method": "lora", "rank": 4, "target_modules": "all-linear"}
CANDIDATES = {
    "lora": (LORA, 2e-2),
    # Not merged: served beside its base, with the tuner that PEFT lacks.
    "bottleneck": ({"method": "bottleneck", "reduction_factor": 4}, 2e-2),
}


def picture(number: int) -> bytes:
    """Noise in which one channel is lighter: that of its label."""
    noise = np.random.default_rng(number).integers(0, 100, (20, 24, 3), dtype=np.uint8)
    noise[:, :, number % 3] += 100
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def make_base(directory: Path) -> None:
    torch.manual_seed(0)
    config = DeiTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    DeiTForImageClassification(config).save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))


@pytest.fixture(scope="module")
def pipeline(stages: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("images")
    make_base(root / "base")
    for name, numbers in (("train", range(60)), ("test", range(60, 80))):
        lines = []
        for number in numbers:
            (root / f"{number}.png").write_bytes(picture(number))
            lines.append({"image": f"{number}.png", "label": COLOURS[number % 3]})
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    train = {"max_steps": 25, "batch_tokens": 300}
    return stages(root, TASK, {}, train, {"batch_sizes": [1, 3]})


@pytest.mark.parametrize("name", CANDIDATES)
def test_what_is_served_is_what_was_measured(
    pipeline: Any, tmp_path: Path, no_probes: None, name: str
) -> None:
    trained = pipeline.trained(*CANDIDATES[name])
    finished = trained if name == "bottleneck" else pipeline.merged(trained)
    measured = pipeline.evaluated("finished", finished)
    report, predictions = pipeline.report_of(measured)
    assert report.accuracy.metrics["accuracy"].value > 0.9
    assert report.figures().keys() <= set(figure_names(TASK, [1, 3], [64]))
    assert "prefill_ratio_b3" + ("" if name == "bottleneck" else "_merged") in report.figures()
    assert report.accuracy.retention_loss is None
    assert "not measured" in report.how["accuracy"]

    package = pipeline.packed(finished, measured, tmp_path)
    assert any(line.startswith("pillow==") for line in package.requirements)
    assert all(isinstance(row, bytes) for row in package.example)
    assert "predict([open(" in package.card
    model = served_model.ServedModel()
    model.load_context(SimpleNamespace(artifacts={"package": str(package.directory)}))
    asked = held_out_rows(pipeline.prepared, 20)
    answers = model.predict(None, pd.DataFrame({0: [row.text for row in asked]}))
    made = signature(TASK, 1)
    assert made.inputs.input_types() == [DataType.binary]
    assert list(answers) == [column.name for column in made.outputs]
    assert answers["label"].tolist() == [line["got"] for line in predictions]
    # Batches of another size: sums in another order, a few float32 roundings.
    wanted = [line["probability"] for line in predictions]
    assert answers["score"].tolist() == pytest.approx(wanted, abs=1e-5)
    # As JSON carries an image.
    text = [base64.b64encode(row.text).decode() for row in asked]
    assert model.predict(None, pd.DataFrame({0: text})).equals(answers)

    paths = {**pipeline.paths, "finished": finished}
    expected = expected_logits(asked, paths, model.serving)
    for row, one in zip(asked, expected, strict=True):
        assert np.array_equal(model.encode(row.text), row.tokens)
        assert difference(one, model.logits([row.tokens])[0]) == 0


def test_an_adapter_and_its_merge_answer_alike(pipeline: Any, no_probes: None) -> None:
    trained = pipeline.trained(*CANDIDATES["lora"])
    report, predictions = pipeline.report_of(pipeline.evaluated("candidate", trained))
    _, merged = pipeline.report_of(pipeline.evaluated("finished", pipeline.merged(trained)))
    assert [line["got"] for line in predictions] == [line["got"] for line in merged]
    assert report.swapping is not None
    assert report.swapping.equal
    # The examples of the page are the images as the base reads them.
    for example in report.examples:
        assert example.image is not None
        kind, _, data = example.image.partition(",")
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (16, 16)


def test_memory_is_measured_for_the_task(pipeline: Any) -> None:
    """In this process: the toy that settles it is loaded, and the base classifies its images."""
    assert 0 <= memory.peak_of_call(pipeline.spec("base"), pipeline.paths) < 64


def test_a_plan_counts_the_tokens_that_the_base_makes(pipeline: Any, tmp_path: Path) -> None:
    """Before the rows are prepared and after; what it expects of memory is the run's own."""
    trained = pipeline.trained(*CANDIDATES["lora"])
    facts = json.loads((trained / "manifest.json").read_bytes())["facts"]
    train = {"max_steps": 25, "batch_tokens": 300}
    spec = CostSpec.model_validate(
        {
            "task": TASK,
            "shape": None,
            "candidates": [LORA, {"method": "full"}],
            "train": train,
            "evaluate": {},
            "max_length": 512,
            "dtype": "float32",
        }
    )
    before = cost(spec, {"base": pipeline.base}, tmp_path)["candidates"]["lora-r4"]
    after = cost(spec, pipeline.paths, tmp_path)["candidates"]["lora-r4"]
    assert before["tokens"] is None
    # Of the plan, steps of the mean size.
    assert after["tokens"] == pytest.approx(facts["tokens"], rel=0.01)
    assert after["trainable_parameters"] == facts["trainable_parameters"]
    assert after["steps"] == facts["steps"]
    total = after["forward_flops_per_token"] + after["backward_flops_per_token"]
    assert total == pytest.approx(facts["train_flops_per_token"], rel=1e-6)


def test_a_plan_needs_no_more_than_a_shape(tmp_path: Path) -> None:
    """Of a kind with several classes, of which a bare shape names none."""
    shape = {"model_type": "deit", "image_size": 32, "patch_size": 8, "hidden_size": 64}
    spec = CostSpec.model_validate(
        {
            "task": TASK,
            "shape": shape | {"num_hidden_layers": 2, "num_attention_heads": 2},
            "candidates": [LORA],
            "train": {},
            "evaluate": {},
            "max_length": 512,
            "dtype": "bfloat16",
        }
    )
    assert cost(spec, {}, tmp_path)["candidates"]["lora-r4"]["training_mib"]["total"] > 0


def test_the_page_says_what_becomes_of_an_image(pipeline: Any) -> None:
    text = (pipeline.prepared / "data_report.json").read_text()
    data = DataReport.model_validate_json(text)
    # DeiT puts two tokens in front of its 16 patches. Lengths that are all alike make no plot.
    assert data_view.row_words(data) == "The base makes 18 tokens of every image"
    assert lengths.length_plots(data) == []


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning", "few_shot"])
def test_what_needs_text_is_refused(pipeline: Any, tmp_path: Path, method: str) -> None:
    spec = InspectSpec.model_validate({"task": TASK, "candidates": [{"method": method}]})
    with pytest.raises(UserError, match=rf"{method} cannot be used for {TASK}"):
        inspect(spec, {"base": pipeline.base}, tmp_path)


def test_a_base_that_reads_something_else_is_refused(pipeline: Any, tmp_path: Path) -> None:
    """Both ways, each with what would do."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tmp_path / "text"
    BertForSequenceClassification(BertConfig(vocab_size=9, **sizes)).save_pretrained(text)
    candidates = [{"method": "full"}]
    images = InspectSpec.model_validate({"task": TASK, "candidates": candidates})
    with pytest.raises(UserError, match=r"bert model[\s\S]*such as ViT or DeiT"):
        inspect(images, {"base": text}, tmp_path)
    texts = InspectSpec.model_validate(
        {"task": "sequence-classification", "candidates": candidates}
    )
    with pytest.raises(UserError, match=r"deit model[\s\S]*this one is for image-classification"):
        inspect(texts, {"base": pipeline.base}, tmp_path)
