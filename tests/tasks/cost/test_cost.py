"""A plan is the training step itself without its numbers: held against the step with them."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
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

from schemas.candidates import (
    AdaLora,
    BitFit,
    Bottleneck,
    FewShot,
    Full,
    Ia3,
    LastLayers,
    LayerNorm,
    Lora,
    Peft,
    PrefixTuning,
    PromptTuning,
    PTuning,
    QLora,
    ZeroShot,
)
from schemas.errors import UserError
from schemas.recipe import Base, Train
from schemas.stages import Call, CostSpec
from schemas.tasks import is_labelled, is_packable, reads_images
from schemas.together import Together
from tasks.core.models import load_base
from tasks.core.quantised import quantised_layers
from tasks.cost import dry, memory
from tasks.cost.blocks import stack_of, stacks_of
from tasks.cost.four_bits import scales
from tasks.cost.rows import FullRow, full_rows
from tasks.cost.shapes import candidate_on_meta
from tasks.cost.stage import run
from tasks.methods import soft
from tasks.methods.method import trained
from tasks.methods.table import METHODS, method_for, methods_of
from tasks.train import pairs, placement
from tasks.train.batching import Batch, Layout
from tasks.train.loss import backbone, loss_sum
from tasks.train.output import save_model
from tasks.train.unpad import unpad

ROOT = Path(__file__).parents[3]
SIZES = {
    "vocab_size": 97,
    # The narrowest that bitsandbytes quantises.
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
CONFIGS = {
    "causal-lm": LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True),
    "seq2seq": T5Config(
        vocab_size=97,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=3,
        num_heads=4,
        decoder_start_token_id=0,
    ),
    "sequence-classification": BertConfig(**SIZES),
    "token-classification": BertConfig(**SIZES),
    "image-classification": ViTConfig(**SIZES, image_size=16, patch_size=4),
}
CLASSES = {
    "causal-lm": LlamaForCausalLM,
    "seq2seq": T5ForConditionalGeneration,
    "sequence-classification": BertForSequenceClassification,
    "token-classification": BertForTokenClassification,
    "image-classification": ViTForImageClassification,
}
#: The longest row of each task.
FULL_ROWS = dict.fromkeys(CONFIGS, FullRow(64))
FULL_ROWS |= {"image-classification": FullRow(17, (3, 16, 16))}
CANDIDATES = {
    "full": Full(method="full"),
    "lora": Lora(method="lora", rank=4),
    "dora": Lora(method="lora", rank=4, dora=True),
    "pissa": Lora(method="lora", rank=4, init="pissa"),
    "qlora": QLora(method="qlora", rank=4),
    "adalora": AdaLora(method="adalora", rank=2, initial_rank=4),
    "ia3": Ia3(method="ia3"),
    "layer_norm": LayerNorm(method="layer_norm"),
    "last_layers": LastLayers(method="last_layers", layers=2),
    "bitfit": BitFit(method="bitfit"),
    "bottleneck": Bottleneck(method="bottleneck", reduction_factor=4),
    "prompt_tuning": PromptTuning(method="prompt_tuning", virtual_tokens=5),
    "p_tuning": PTuning(method="p_tuning", virtual_tokens=5, hidden_size=24),
    "p_tuning-lstm": PTuning(method="p_tuning", virtual_tokens=5, encoder="lstm"),
    "prefix_tuning": PrefixTuning(method="prefix_tuning", virtual_tokens=5, projection=True),
    "together": Together(
        method="together",
        of=[
            BitFit(method="bitfit"),
            Lora(method="lora", rank=4),
            Bottleneck(method="bottleneck", reduction_factor=4),
        ],
    ),
    "with a prefix": Together(
        method="together",
        of=[
            Lora(method="lora", rank=4),
            PrefixTuning(method="prefix_tuning", virtual_tokens=5, projection=True),
        ],
    ),
    # Its tuner keeps indices beside weights and buffers.
    "fourierft": Peft(
        method="peft",
        peft={"peft_type": "FOURIERFT", "n_frequency": 50, "target_modules": "all-linear"},
    ),
}
PROMPTS = {
    "zero_shot": ZeroShot(method="zero_shot"),
    "few_shot": FewShot(method="few_shot", examples=3),
}
#: GPT-3 with q and v apart. Brown et al. 2020, arXiv:2005.14165; LoRA's claim: arXiv:2106.09685.
GPT3 = {
    "model_type": "opt",
    "hidden_size": 12288,
    "word_embed_proj_dim": 12288,
    "num_hidden_layers": 96,
    "num_attention_heads": 96,
    "ffn_dim": 49152,
    "vocab_size": 50257,
    "max_position_embeddings": 2048,
}


def batch_of(task: str) -> Batch:
    rows = full_rows(192, FULL_ROWS[task], task)
    index = torch.arange(len(rows)).numpy()
    return pairs.batch_of(rows, index, task, Layout(192, packed=is_packable(task)))


def placed(model: torch.nn.Module, task: str, train: Train, device: str) -> torch.nn.Module:
    placement.place(model, train, torch.device(device))
    placement.use_fast_attention(model, torch.device("cpu"), 64, task)
    if is_labelled(task) and not reads_images(task) and not soft.is_cache(model):
        unpad(backbone(model))
    return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    for task, config in CONFIGS.items():
        CLASSES[task](copy.deepcopy(config)).save_pretrained(root / task)
        (root / task / "tokenizer_config.json").write_text("{}")
    return {task: root / task for task in CONFIGS}


def real(bases: dict[str, Path], task: str, name: str, dtype: str = "float32") -> torch.nn.Module:
    """The candidate as the train stage builds it."""
    candidate = CANDIDATES[name]
    method = method_for(candidate.method, task)
    base = load_base(
        bases[task],
        task,
        ["a", "b"] if is_labelled(task) else None,
        "float32" if method.trained_base else dtype,
        quantisation=method.quantises(candidate),
    )
    return method.build(base, candidate, task)


def on_meta(task: str, name: str, dtype: str = "float32") -> torch.nn.Module:
    return candidate_on_meta(copy.deepcopy(CONFIGS[task]), task, CANDIDATES[name], dtype)


#: Name, task, checkpointing: every method with each kind of attention, and where layers that are
#: computed again may keep something else, that too.
PASSES = [
    *((name, "causal-lm", again) for name in CANDIDATES for again in (False, True)),
    *((name, "sequence-classification", False) for name in CANDIDATES),
    *((name, "sequence-classification", True) for name in ("full", "lora", "prompt_tuning")),
    ("lora", "token-classification", False),
    *((name, "seq2seq", again) for name in ("full", "lora") for again in (False, True)),
    *((name, "seq2seq", False) for name in ("adalora", "ia3", "bottleneck", "last_layers")),
    *((name, "seq2seq", False) for name in ("p_tuning", "prefix_tuning", "with a prefix")),
    *(("prompt_tuning", "seq2seq", again) for again in (False, True)),
    ("full", "image-classification", False),
    ("lora", "image-classification", True),
    ("bottleneck", "image-classification", False),
]


def test_every_method_is_here():
    given = {candidate.method for candidate in [*CANDIDATES.values(), *PROMPTS.values()]}
    assert given == set(METHODS)


@pytest.mark.parametrize(("name", "task", "checkpointing"), PASSES)
def test_a_dry_run_is_the_run_without_its_numbers(bases, name, task, checkpointing):
    """The same ledger over the real model: bytes kept, peaks and FLOPs, to the last one."""
    train = Train(gradient_checkpointing=checkpointing)
    model = placed(on_meta(task, name), task, train, "meta")
    dry.without_numbers(model)
    guessed = dry._pass(model, batch_of(task), "float32")
    built = placed(real(bases, task, name), task, train, "cpu")
    measured = dry._pass(built, batch_of(task), "float32")
    assert guessed.forward_flops == measured.forward_flops > 0
    assert guessed.backward_flops == measured.backward_flops > 0
    if name == "p_tuning-lstm":
        # oneDNN's LSTM keeps a workspace of which shapes say nothing: over 5 tokens, once a pass.
        assert guessed.kept < measured.kept
        return
    # Some kernels hand out a scalar more or less without numbers: under 1 % of a tiny model.
    assert guessed.kept == pytest.approx(measured.kept, rel=0.01)
    assert guessed.peak == pytest.approx(measured.peak, rel=0.01)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        (name, task)
        for name, candidate in CANDIDATES.items()
        for task in CONFIGS
        if all(task in method.tasks for method in methods_of(candidate))
        # A T5 has no bias.
        if task != "seq2seq" or all(part.method != "bitfit" for part in candidate.parts)
    ],
)
def test_weights_and_what_ships_are_those_of_the_real_model(bases, tmp_path, task, name):
    """Trained weights to the last one, and every tensor's bytes: of 4 bits with their scales."""
    candidate, method = CANDIDATES[name], method_for(CANDIDATES[name].method, task)
    spec = spec_of(candidate, task=task)
    found = run(spec, {"base": bases[task]}, tmp_path)["candidates"][candidate.label]
    model = real(bases, task, name, "bfloat16")
    assert found["trainable_parameters"] == sum(w.numel() for w in trained(model).values())
    held = sum(w.numel() * w.element_size() for w in model.parameters())
    for layer in quantised_layers(model).values():
        state = layer.weight.quant_state.as_dict()
        # Its 0-dimensional offset is given as a number: 4 bytes.
        held += sum(x.nbytes for x in state.values() if isinstance(x, torch.Tensor)) + 4
    assert found["training_mib"]["weights"] * 2**20 == held
    course = method.course(model, candidate, 100)
    if name == "adalora":
        # Which layers keep how many ranks is not known before: as if each kept the mean.
        assert found["shipped_mib"] < found["trainable_parameters"] * 4 / 2**20
        return
    save_model(model, tmp_path / "model", bases[task], "bfloat16", *methods_of(candidate))
    course.export(tmp_path / "model")
    files = (tmp_path / "model").rglob("*.safetensors")
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    assert found["shipped_mib"] * 2**20 == sum(x.nbytes for x in tensors)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bits_are_those_that_bitsandbytes_loads(bases, quant_type, double):
    candidate = QLora(method="qlora", rank=4, quant_type=quant_type, double_quantisation=double)
    quantisation = METHODS["qlora"].quantises(candidate)
    loaded = load_base(bases["causal-lm"], "causal-lm", None, "bfloat16", quantisation=quantisation)
    config = copy.deepcopy(CONFIGS["causal-lm"])
    guessed = dict(candidate_on_meta(config, "causal-lm", candidate, "bfloat16").named_modules())
    layers = quantised_layers(loaded)
    assert len(layers) == 7 * SIZES["num_hidden_layers"]
    for name, layer in layers.items():
        own = guessed[f"base_model.model.{name}.base_layer"].weight
        assert own.shape == layer.weight.shape
        # Of the same kinds, shapes and dtypes, tensor by tensor.
        assert [(x.shape, x.dtype) for x in scales(own)] == [
            (x.shape, x.dtype) for x in scales(layer.weight)
        ]
    # By hand, of a [128, 64] weight: two to a byte; a scale for each of 128 blocks.
    up = loaded.model.layers[0].mlp.up_proj.weight
    beside = 128 + 4 + 4 + 4 * 256 if double else 4 * 128
    assert memory.weight_bytes([up]) == 128 * 64 // 2 + 4 * 16 + beside


def test_adaloras_penalty_is_in_a_step_and_its_averages_are_kept(bases):
    """With the penalty of the real model; what is kept, after a step of its allocator."""
    task, candidate = "causal-lm", CANDIDATES["adalora"]
    guessed, built = on_meta(task, "adalora"), real(bases, task, "adalora")
    dry.without_numbers(guessed)
    courses = [METHODS["adalora"].course(model, candidate, 100) for model in (guessed, built)]
    assert dry._penalty(guessed, courses[0]) == dry._penalty(built, courses[1])
    # A of [4, in] with itself: one product forward, two backward, each 2 * 4 * 4 * in; B alike.
    factors = [w.numel() for n, w in built.named_parameters() if ".lora_A" in n or ".lora_B" in n]
    flops, peak = dry._penalty(built, courses[1])
    assert flops == 3 * 2 * 4 * sum(factors)
    # Every gradient of the step is there meanwhile.
    assert peak > sum(4 * weight.numel() for weight in trained(built).values())
    for weight in trained(built).values():
        weight.grad = torch.ones_like(weight)
    courses[1].after_step(1)
    allocator = courses[1].allocator
    held = [allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc]
    kept = sum(x.nbytes for part in held for x in part.values())
    assert [course.kept() for course in courses] == [kept, kept]


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_trains_nothing_and_is_served_with_its_examples(bases, tmp_path, name):
    both = spec_of(PROMPTS["zero_shot"], PROMPTS[name])
    found = run(both, {"base": bases["causal-lm"]}, tmp_path)["candidates"]
    plain, own = found["zero_shot"], found[PROMPTS[name].label]
    assert (own["trainable_parameters"], own["training_mib"], own["shipped_mib"]) == (0, None, None)
    # Keys and values of 3 layers, 2 heads of 16, in bfloat16, for 8 rows of three examples.
    examples = 2 * 3 * 2 * 16 * 2 * 8 * (3 * 64 if name == "few_shot" else 0)
    assert (own["inference_mib"] - plain["inference_mib"]) * 2**20 == examples


def test_what_training_would_refuse_is_refused(bases, tmp_path):
    prefix = spec_of(
        CANDIDATES["prefix_tuning"],
        task="sequence-classification",
        train={"gradient_checkpointing": True},
    )
    with pytest.raises(UserError, match=r"train\.gradient_checkpointing"):
        run(prefix, {"base": bases["sequence-classification"]}, tmp_path)
    long = spec_of(CANDIDATES["prompt_tuning"]).model_copy(update={"max_length": 2048})
    with pytest.raises(UserError, match=r"data\.max_length"):
        run(long, {"base": bases["causal-lm"]}, tmp_path)


@pytest.mark.parametrize("task", CONFIGS)
@pytest.mark.parametrize("name", ["full", "ia3"])
def test_flops_are_those_of_torch(bases, task, name):
    """torch's counter over a real step. (It misses products in place, which fused LoRA has.)"""
    model, batch = placed(real(bases, task, name), task, Train(), "cpu"), batch_of(task)
    guessed = dry._pass(model, batch, "float32")
    with FlopCounterMode(display=False) as counter:
        loss = loss_sum(model, batch, torch.float32)
        forward = counter.get_total_flops()
        loss.backward()
    assert guessed.forward_flops == pytest.approx(forward, rel=0.02)
    assert guessed.backward_flops == pytest.approx(counter.get_total_flops() - forward, rel=0.02)


@pytest.mark.parametrize("trained_blocks", [6, 2])
def test_a_few_blocks_tell_what_all_of_them_cost(trained_blocks):
    """Also where the last two blocks alone learn: two runs of blocks that are alike."""
    config = copy.deepcopy(CONFIGS["causal-lm"])
    config.num_hidden_layers, config.layer_types = 6, None
    model = candidate_on_meta(config, "causal-lm", CANDIDATES["full"], "float32")
    model.requires_grad_(False)
    for block in model.model.layers[-trained_blocks:]:
        block.requires_grad_(True)
    placed(model, "causal-lm", Train(), "meta")
    dry.without_numbers(model)
    stack = stack_of(model)
    assert stack is not None
    assert stack.runs == ([6] if trained_blocks == 6 else [4, 2])
    batch = batch_of("causal-lm")
    total = dry.whole_pass(model, batch, "float32")
    whole = dry._pass(model, batch, "float32")
    assert total.forward_flops == pytest.approx(whole.forward_flops)
    assert total.backward_flops == pytest.approx(whole.backward_flops)
    assert total.kept == pytest.approx(whole.kept)
    # The halves of a backward pass meet in the middle of a block.
    assert total.peak == pytest.approx(whole.peak, rel=0.02)


def test_a_few_blocks_of_both_stacks_tell_what_all_of_them_cost():
    """An encoder of six blocks and a decoder of five; the first of each, with T5's position bias,
    is unlike the others."""
    config = T5Config(**{**CONFIGS["seq2seq"].to_dict(), "num_layers": 6, "num_decoder_layers": 5})
    model = candidate_on_meta(config, "seq2seq", CANDIDATES["lora"], "float32")
    placed(model, "seq2seq", Train(), "meta")
    dry.without_numbers(model)
    assert [stack.runs for stack in stacks_of(model)] == [[1, 5], [1, 4]]
    batch = batch_of("seq2seq")
    total = dry.whole_pass(model, batch, "float32")
    whole = dry._pass(model, batch, "float32")
    assert total.forward_flops == pytest.approx(whole.forward_flops)
    assert total.backward_flops == pytest.approx(whole.backward_flops)
    assert total.kept == pytest.approx(whole.kept)
    # Two stacks, whose backward passes do not meet where their halves do.
    assert total.peak == pytest.approx(whole.peak, rel=0.05)


def spec_of(*candidates: object, task: str = "causal-lm", train: object = None) -> CostSpec:
    """Rows of 64 tokens, in bfloat16; at most 8 rows at a time are served."""
    return CostSpec.model_validate(
        {
            "task": task,
            "shape": None,
            "candidates": list(candidates),
            "train": train or {},
            "evaluate": {"batch_sizes": [1, 8]},
            "max_length": 64,
            "dtype": "bfloat16",
        }
    )


def gpt3(*candidates: object, dtype: str = "float32") -> CostSpec:
    return CostSpec.model_validate(
        {
            "task": "causal-lm",
            "shape": GPT3,
            "candidates": list(candidates),
            "train": {"micro_batch_tokens": 2048},
            "evaluate": {},
            "max_length": 2048,
            "dtype": dtype,
        }
    )


def test_lora_on_gpt3_trains_ten_thousand_times_less_in_a_third_of_the_memory(tmp_path):
    """Hu et al. 2021, abstract: 10,000 times fewer trainable parameters, 3 times less memory."""
    lora = Lora(method="lora", rank=4, target_modules=["q_proj", "v_proj"])
    found = run(gpt3(Full(method="full"), lora), {}, tmp_path)["candidates"]
    full, small = found["full"], found["lora-r4"]
    # Rank 4 on two square matrices of 12,288 in 96 layers.
    assert small["trainable_parameters"] == 96 * 2 * 4 * 2 * 12288
    ratio = full["trainable_parameters"] / small["trainable_parameters"]
    assert 9_000 < ratio < 10_000
    assert 3.0 < full["training_mib"]["total"] / small["training_mib"]["total"] < 4.0
    # 2 FLOPs a weight, two passes' worth for gradients of both inputs and weights.
    assert full["forward_flops_per_token"] == pytest.approx(2 * 174.6e9, rel=0.03)
    assert full["backward_flops_per_token"] == pytest.approx(4 * 174.6e9, rel=0.03)


def test_every_problem_of_a_shape_and_its_candidates_is_placed(tmp_path):
    wrong = Lora(method="lora", target_modules=["q_prj"])
    with pytest.raises(UserError) as caught:
        run(gpt3(Full(method="full"), wrong), {}, tmp_path)
    assert caught.value.problems[0].place == "candidates[1].target_modules"
    unknown = gpt3(Full(method="full")).model_copy(update={"shape": {"model_type": "lama"}})
    with pytest.raises(UserError, match=r"base\.shape"):
        run(unknown, {}, tmp_path)


def test_a_directory_needs_no_weights_and_its_figures_add_up(tmp_path: Path) -> None:
    CONFIGS["causal-lm"].save_pretrained(tmp_path / "base")
    spec = spec_of(CANDIDATES["lora"])
    found = run(spec, {"base": tmp_path / "base"}, tmp_path)["candidates"]["lora-r4"]
    parts = dict(found["training_mib"])
    assert parts.pop("total") == pytest.approx(sum(parts.values()))
    assert found["steps"] is None
    assert found["shipped_mib"] == found["trainable_parameters"] * 4 / 2**20


@pytest.mark.parametrize("given", [{}, {"model": "a", "shape": {"model_type": "llama"}}])
def test_a_base_is_a_model_or_a_shape(given):
    with pytest.raises(ValueError, match="exactly one of `model` and `shape`"):
        Base(**given)


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_the_stage_by_itself_tells_the_same(bases, tmp_path, name):
    """Without what its process leaves out, too."""
    spec = spec_of(CANDIDATES[name])
    call = Call(
        stage=spec.STAGE,
        stage_version=spec.VERSION,
        format="report",
        spec=spec.model_dump(mode="json"),
        paths={"base": str(bases["causal-lm"])},
    )
    (tmp_path / "call.json").write_text(call.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-m", "tasks.cost", tmp_path / "call.json", "--store", tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PEFTFLOW_EVENTS": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    *_, entry = done.stdout.splitlines()
    alone = json.loads(Path(json.loads(entry)["message"], "plan.json").read_text())
    assert alone == run(spec, {"base": bases["causal-lm"]}, tmp_path)
