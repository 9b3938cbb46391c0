"""What a process holds beside its tensors: products that oneDNN keeps, and holes in the heap."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from schemas.candidates import Lora
from schemas.recipe import Train
from tasks.core.plan import Plan
from tasks.core.tokens import TokenRows
from tasks.cost import dry, memory
from tasks.cost.dry import Compiled, DryRun, Pass
from tasks.cost.ledger import Ledger
from tasks.cost.rows import FullRow, Load, full_rows, load_of
from tasks.cost.shapes import candidate_on_meta
from tasks.methods.table import METHODS
from tasks.train import heap, pairs, placement
from tasks.train.batching import Layout, micro_batches
from tasks.train.loss import loss_sum

TASK = "causal-lm"
LORA = Lora(method="lora", rank=4)
PACKED = Layout(192, packed=True)
MIB = 2**20


def config(blocks: int = 3) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


def batch():
    rows = full_rows(192, FullRow(64), TASK)
    return pairs.batch_of(rows, np.arange(len(rows)), TASK, PACKED)


def compiled(dtype: str, blocks: int = 3) -> Compiled:
    model = candidate_on_meta(copy.deepcopy(config(blocks)), TASK, LORA, dtype)
    placement.place(model, Train(), torch.device("meta"))
    placement.use_fast_attention(model, torch.device("cpu"), 64, TASK)
    dry.without_numbers(model)
    found = Compiled()
    dry.whole_pass(model, batch(), dtype, compiled=found)
    return found


def test_products_of_hollow_weights_are_those_of_real_ones():
    torch.manual_seed(0)
    model = METHODS["lora"].build(LlamaForCausalLM(config()).to(torch.bfloat16), LORA, TASK)
    placement.place(model, Train(), torch.device("cpu"))
    placement.use_fast_attention(model, torch.device("cpu"), 64, TASK)
    ledger = Ledger([*model.parameters()])
    with ledger:
        # As a dry run begins too: fused layers learn who shares an input.
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            loss_sum(model, batch(), torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_sum(model, batch(), torch.bfloat16)
        forward = set(ledger.products)
        loss.backward()
    hollow = compiled("bfloat16")
    assert hollow.forward == forward
    assert hollow.both == ledger.products
    assert len(forward) < len(ledger.products)


def test_more_blocks_of_a_kind_compile_no_more_and_float32_compiles_none():
    assert compiled("bfloat16", 6).both == compiled("bfloat16", 3).both
    assert not compiled("float32").both


def test_a_product_is_its_operation_its_shapes_and_how_they_lie():
    a = torch.zeros(8, 8, dtype=torch.bfloat16)
    ledger = Ledger([a])
    with ledger:
        for _ in range(2):
            a @ a
        assert len(ledger.products) == 1
        a @ a.t()
        a[:4] @ a
        a + a
    assert len(ledger.products) == 3


def test_shapes_that_a_run_has_met_with_the_largest_share_at_each(tmp_path):
    rows = saved(np.random.default_rng(0).integers(8, 60, 200), tmp_path)
    train, layout = Train(batch_tokens=500, max_steps=6), Layout(450, packed=True)
    met = load_of(tmp_path, TASK, train, layout, FullRow(64)).met
    plan = Plan(rows.lengths, train.batch_tokens, train.seed)
    parts = [p for step in plan.epoch(0)[:6] for p in micro_batches(step, rows.lengths, layout)]
    # The tensors of a packed batch are filled up to a multiple of 64 tokens.
    widths = [pairs.batch_of(rows, p, TASK, layout).input_ids_BL.shape[1] for p in parts]
    assert met is not None
    assert max(met) == len(set(widths)) > 1
    assert max(met.values()) == 1.0


def saved(lengths: np.ndarray, prepared: Path) -> TokenRows:
    count, ends = len(lengths), np.cumsum([0, *lengths])
    rows = TokenRows(
        input_ids=np.zeros(ends[-1], dtype=np.int32),
        offsets=ends,
        source_rows=np.arange(count),
        loss_mask=np.ones(ends[-1], dtype=np.uint8),
        answer_start=np.zeros(count, dtype=np.int64),
        labels=np.zeros(count, dtype=np.int64),
    )
    (prepared / "tokens").mkdir()
    rows.save(prepared / "tokens" / "train.safetensors")
    return rows


def test_the_largest_micro_batch_is_found_wherever_it_comes(tmp_path):
    """Of a run of hundreds of steps the first 64 had a seventh less (banking77)."""
    lengths = np.full(4000, 8)
    train, layout = Train(batch_tokens=100), Layout(4000, packed=False)
    plan = Plan(lengths, train.batch_tokens, train.seed)
    late = plan.epoch(0)[250]
    lengths[late[0]] = 60
    rows = saved(lengths, tmp_path)
    load = load_of(tmp_path, "sequence-classification", train, layout, FullRow(64))
    largest = rows.lengths[load.micro_batch]
    assert largest.max() == 60
    assert len(largest) > 1


def of(met: dict[int, float] | None, both: int = 20, peak: float = 100.0) -> DryRun:
    """A dry run of `both` products, none of two matrices, that has `peak` MiB."""
    cube = ((1, 1, 1), (1, 1, 1))
    made = Compiled(set(), {(str(n), (cube,)) for n in range(both)})
    load = Load(None, None, None, None, None, met)  # type: ignore[arg-type]
    return DryRun(Pass(0, 0, 0, peak * MIB, 0, 0), 1, load, compiled=made)


@pytest.mark.parametrize(
    ("met", "both", "products"),
    [
        ({1: 1.0}, 20, 20),
        ({1: 1.0, 2: 0.1}, 20, 20),  # the largest came first: what comes later is far smaller
        ({1: 0.5, 2: 1.0}, 20, 40),
        ({1: 1.0, 2: 1.0}, 100, int(heap.PRODUCTS)),  # no more are kept
        (None, 20, int(heap.PRODUCTS)),  # rows of unknown lengths
        (None, 0, 0),  # float32
    ],
)
def test_the_peak_has_those_that_are_compiled_when_it_comes(met, both, products):
    assert memory.products_mib(of(met, both)) == pytest.approx(memory.PRODUCT_MIB * products)


def test_a_pass_that_is_almost_the_largest_counts_with_what_was_compiled_by_then():
    # 1 MiB less of tensors, 12 MiB more of products.
    found = memory.products_mib(of({1: 1.0, 2: 0.99}))
    assert found == pytest.approx(memory.PRODUCT_MIB * 40 - 1.0)


def test_probes_bring_the_products_of_two_matrices_of_their_own():
    square, cube = ((2, 2), (2, 1)), ((2, 2, 2), (4, 2, 1))
    # A bias comes before its two matrices.
    forward = {("addmm", (((2,), (1,)), square, square)), ("bmm", (cube, cube))}
    made = Compiled(forward, forward | {("mm", (square, square))})
    assert made.after(0) == dry.PROBES
    assert made.after(2) == dry.PROBES + 6


def test_holes_come_with_checkpointing_and_end_where_nothing_was_measured():
    model = torch.nn.Linear(1, 1)
    model.requires_grad_(False)
    for peak in (100.0, 10 * memory.HOLES_UP_TO_MIB):
        run = of({1: 1.0}, 0, peak)
        plain = memory.training(model, run, "float32", False)["rest"]
        again = memory.training(model, run, "float32", True)["rest"]
        base, less = memory.PROCESS_MIB["float32"]
        assert plain == base
        held = min(peak, memory.HOLES_UP_TO_MIB)
        # The two weights of the layer are 8 bytes.
        assert again == pytest.approx(less + memory.HOLES * held, abs=1e-4)
