"""FLOPs against formulas, and what a training step is measured on."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from schemas.candidates import Full, Lora
from tasks.core.tokens import TokenRows
from tasks.evaluate import computation
from tasks.evaluate.computation import backward_flops, forward_flops, micro_batch
from tasks.evaluate.subject import read_subject
from tasks.methods.table import method_for

WIDTH, HIDDEN, CLASSES, RANK = 8, 16, 3, 4


class TwoLayers(nn.Module):
    """A classifier of two linear layers at every token, then the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(pad_token_id=0)
        self.first = nn.Linear(WIDTH, HIDDEN)
        self.second = nn.Linear(HIDDEN, CLASSES)

    def forward(self, input_ids, attention_mask):
        hot = torch.nn.functional.one_hot(input_ids, WIDTH).float()
        return SimpleNamespace(logits=self.second(self.first(hot)).mean(dim=1))


@pytest.fixture
def rows() -> TokenRows:
    """Twenty rows of 4 to 6 tokens, most of them 5."""
    lengths = [5] * 14 + [4] * 3 + [6] * 3
    return TokenRows(
        input_ids=np.arange(sum(lengths), dtype=np.int32) % WIDTH,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        source_rows=np.arange(1, 21),
        labels=np.arange(20) % CLASSES,
    )


def test_linear_layers_cost_what_the_formula_says(rows: TokenRows) -> None:
    model = TwoLayers()
    batch = micro_batch(rows, "sequence-classification", 50)
    forward = 2 * (WIDTH * HIDDEN + HIDDEN * CLASSES)
    assert forward_flops(model, batch) == forward
    # Both weights' gradients, and the second layer's gradient of its input; the first layer's
    # input is data and has none.
    assert backward_flops(model, batch) == forward + 2 * HIDDEN * CLASSES
    model.first.requires_grad_(False)
    assert backward_flops(model, batch) == 2 * HIDDEN * CLASSES  # nothing below the lowest trained


def llama_flops(config, length: int, kept: int) -> tuple[float, float, float]:
    """A token's forward FLOPs of (projections of a layer, attention of a layer, head)."""
    width, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * config.head_dim
    projections = 2 * (width * width * 2 + width * keys * 2 + width * inner * 3)
    attention = 2 * 2 * length * width
    head = 2 * width * config.vocab_size * kept / length
    return projections, attention, head


def test_llama_costs_what_the_formula_says(causal) -> None:
    subject = read_subject(causal.spec, causal.paths)
    rows = causal.test_rows
    batch = micro_batch(rows, "causal-lm", 256)
    length = batch.inputs["input_ids"].shape[1]
    kept = length - int(batch.learned_BT.any(dim=0).nonzero()[0]) + 1
    model = subject.load_base()
    config, layers = model.config, model.config.num_hidden_layers
    projections, attention, head = llama_flops(config, length, kept)
    products = layers * (projections + attention) + head
    assert forward_flops(model, batch) == pytest.approx(products, rel=1e-12)

    full = method_for("full", "causal-lm").build(
        subject.load_base(), Full(method="full"), "causal-lm"
    )
    assert backward_flops(full, batch) == pytest.approx(2 * products, rel=1e-12)

    lora = method_for("lora", "causal-lm").build(
        subject.load_base(), Lora(method="lora", rank=RANK), "causal-lm"
    )
    width, inner = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * config.head_dim
    # in + out of q, k, v, o, gate, up, down.
    shapes = [(width, width), (width, keys), (width, keys), (width, width)]
    shapes += [(width, inner), (width, inner), (inner, width)]
    added = layers * sum(2 * RANK * (i + o) for i, o in shapes)
    assert forward_flops(lora, batch) == pytest.approx(products + added, rel=1e-12)
    # No gradient of a frozen weight: each projection once, attention twice, the head once. A and
    # B are trained, so the added part costs twice. In the first layer, q, k and v read the frozen
    # embedding: neither W nor A passes a gradient on.
    spared = sum(2 * i * o + 2 * RANK * i for i, o in shapes[:3])
    expected = layers * (projections + 2 * attention) + head + 2 * added - spared
    assert backward_flops(lora, batch) == pytest.approx(expected, rel=1e-12)


def test_micro_batch_has_no_padding_and_keeps_the_answers(causal, rows: TokenRows) -> None:
    batch = micro_batch(rows, "sequence-classification", 50)
    assert batch.inputs["input_ids"].shape == (10, 5)
    assert batch.inputs["attention_mask"].all()
    assert batch.labels_N.tolist() == [index % CLASSES for index in range(10)]
    labels = np.arange(len(rows.input_ids), dtype=np.int32)
    marked = micro_batch(replace(rows, token_labels=labels), "token-classification", 50)
    assert torch.equal(marked.inputs["input_ids"], batch.inputs["input_ids"])
    # Every token's own label, row by row: here its place among all tokens.
    places = marked.labels_N.numpy()
    assert np.array_equal(rows.input_ids[places], batch.inputs["input_ids"].flatten().numpy())
    batch = micro_batch(causal.test_rows, "causal-lm", 256)
    assert batch.inputs["attention_mask"].all()
    assert not batch.learned_BT[:, 0].any()
    assert batch.learned_BT[:, -1].all(), "every row still ends with its answer"


def test_a_step_of_rate_zero_learns_nothing(causal_lora) -> None:
    subject = read_subject(causal_lora.spec, causal_lora.paths)
    trainee = computation.Trainee(subject, Lora(method="lora", rank=RANK))
    before = {name: weight.clone() for name, weight in trainee.model.named_parameters()}
    trainee.step(micro_batch(causal_lora.test_rows, "causal-lm", 256))
    for name, weight in trainee.model.named_parameters():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flops_do_not_depend_on_the_dtype(classes_lora, dtype: str) -> None:
    """A frozen base in bfloat16 under a head and adapters in float32, as they are trained."""
    spec = classes_lora.spec.model_copy(update={"dtype": dtype})
    subject = read_subject(spec, classes_lora.paths)
    batch = micro_batch(classes_lora.test_rows, "sequence-classification", 64)
    own, full = computation.step_costs(subject, batch, parameters=1)
    reference = read_subject(classes_lora.spec, classes_lora.paths)
    expected = computation.step_costs(reference, batch, parameters=1)
    assert [own.flops, full.flops] == [cost.flops for cost in expected]


def test_full_tuning_that_has_no_room_is_left_out_aloud(monkeypatch, capsys) -> None:
    monkeypatch.setattr(computation, "free_bytes", lambda: 100 << 20)
    assert computation.full_fits(1 << 20)
    assert not computation.full_fits(8 << 20)
    assert "full fine-tuning of this base needs about 256 MiB" in capsys.readouterr().err


def test_curve_medians_leave_out_the_first_step(tmp_path) -> None:
    points = [(100, 9.0), (300, 0.5), (500, 0.5), (800, 1.0)]
    curve = [
        f'{{"step": {step}, "epoch": 1, "loss": 1, "learning_rate": 1, "grad_norm": 1,'
        f' "tokens": {tokens}, "step_time_s": {seconds}}}'
        for step, (tokens, seconds) in enumerate(points, start=1)
    ]
    (tmp_path / "curve.json").write_text(f"[{', '.join(curve)}]")
    # Steps of 200, 200 and 300 tokens: 400, 400 and 300 tokens a second.
    assert computation.curve_medians(tmp_path) == (0.5, 400.0)
