"""Exported heads against Turbo heads, through forwards written from each format's description."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from peft import IA3Config, LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from schemas.errors import UserError
from schemas.export import ExportFormat
from tasks.export.formats import FORMS, export

MEDUSA = ["vllm-medusa", "lorax", "tgi"]
KINDS = ["whole", "adapter", "prompt"]
LORA = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def rows() -> torch.Tensor:
    return torch.randint(0, 97, (2, 7), generator=torch.Generator().manual_seed(3))


def parts(model: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """x [14, D], which the lm_head reads, and the lm_head, of a model or of one with an adapter."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    x_BTD = inner.base_model(input_ids=rows()).last_hidden_state
    return x_BTD.flatten(0, 1).float(), inner.get_output_embeddings().float()


def expected(made: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, D] and the heads' logits [K, N, V], from what the version was written from."""
    x_ND, lm_head = parts(made.model)
    return x_ND, lm_head(made.heads.ahead(x_ND))


def as_vllm(out: Path, x_ND: torch.Tensor) -> torch.Tensor:
    """vLLM's Medusa: `num_heads` blocks of `num_hidden_layers`, x + SiLU(W x + b) each, with a bias
    where `medusa_fc_bias`, and one lm_head for all where `original_lm_head`."""
    config, tensors = read(out, "model.safetensors")
    assert config["model_type"] == "medusa"
    assert config["original_lm_head"]
    assert config["medusa_fc_bias"]
    lm_head_VD = tensors.pop("lm_head.weight")
    assert list(lm_head_VD.shape) == [config["vocab_size"], config["hidden_size"]]
    logits = []
    for head in range(config["num_heads"]):
        h_ND = x_ND
        for layer in range(config["num_hidden_layers"]):
            name = f"blocks.{head}.layers.{layer}"
            h_ND = h_ND + F.silu(
                F.linear(h_ND, tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias"))
            )
        logits.append(F.linear(h_ND, lm_head_VD))
    assert not tensors, "tensors that the server would not know"
    return torch.stack(logits)


def as_medusa_v2(out: Path, x_ND: torch.Tensor | None) -> torch.Tensor:
    """LoRAX's and TGI's second version: `medusa_num_heads` linears of one layer, and the lm_head of
    the model that `base_model_name_or_path` names, under the adapter beside, if there is one.

    x_ND: None for that model's own.
    """
    config, tensors = read(out, "medusa_lm_head.safetensors")
    assert float(config["version"]) == 2
    assert config["medusa_num_layers"] == 1
    assert "architectures" not in config
    model = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"]).eval()
    if (out / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(model, out)
    own_ND, lm_head = parts(model)
    x_ND = own_ND if x_ND is None else x_ND
    logits = []
    for head in range(config["medusa_num_heads"]):
        weight, bias = tensors.pop(f"{head}.0.linear.weight"), tensors.pop(f"{head}.0.linear.bias")
        logits.append(lm_head(x_ND + F.silu(F.linear(x_ND, weight, bias))))
    assert not tensors, "tensors that the server would not know"
    return torch.stack(logits)


def read(out: Path, file: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """config.json, and the tensors in float32."""
    tensors = {name: tensor.float() for name, tensor in load_file(out / file).items()}
    return json.loads((out / "config.json").read_text()), tensors


def forward(form: str, out: Path, x_ND: torch.Tensor) -> torch.Tensor:
    return as_vllm(out, x_ND) if form == "vllm-medusa" else as_medusa_v2(out, x_ND)


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    """The length of a difference over that of what it should be."""
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("form", MEDUSA)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_exported_heads_give_the_heads_logits(
    form: Any, kind: str, tied: bool, made: Any, llama: Any, tmp_path: Path
) -> None:
    # Where it is the embedding's too, an adapter on the lm_head would untie them.
    peft = LoraConfig(**LORA) if tied else None
    world = made(kind, model=llama(tie_word_embeddings=tied), peft=peft)
    assert export(world.version, form, tmp_path / "out") == []
    x_ND, logits_KNV = expected(world)
    # The same products in another order, in float32: (W x against B (A x), W + B A summed once).
    assert off(forward(form, tmp_path / "out", x_ND), logits_KNV) < 1e-5
    # And heads that are not the model's own next-token guess.
    assert off(parts(world.model)[1](x_ND).expand_as(logits_KNV), logits_KNV) > 0.1


@pytest.mark.parametrize("form", ["lorax", "tgi"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_that_is_named_is_the_one_that_heads_draft_for(
    form: Any, kind: str, made: Any, tmp_path: Path
) -> None:
    world = made(kind)
    export(world.version, form, tmp_path / "out")
    # Its own hidden states: two layers more of sums in another order.
    assert off(as_medusa_v2(tmp_path / "out", None), expected(world)[1]) < 1e-5


@pytest.mark.parametrize("form", MEDUSA)
def test_tensors_are_in_the_dtype_of_the_served_model(form: Any, made: Any, tmp_path: Path) -> None:
    world = made("prompt", dtype="bfloat16")
    export(world.version, form, tmp_path / "out")
    [file] = (tmp_path / "out").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    x_ND, logits_KNV = expected(world)
    # W, b and (vLLM) the lm_head are each rounded once, by at most 2^-9 of an element.
    assert 1e-5 < off(forward(form, tmp_path / "out", x_ND), logits_KNV) < 3 * 2**-9


@pytest.mark.parametrize("form", MEDUSA)
def test_the_state_is_left_out_aloud(form: Any, made: Any, tmp_path: Path) -> None:
    world = made("whole", state=6)
    [said] = export(world.version, form, tmp_path / "out")
    assert "the state over drafted tokens (width 6) has no place in this format" in said
    assert said in (tmp_path / "out" / "README.md").read_text()
    x_ND, logits_KNV = expected(world)
    assert off(forward(form, tmp_path / "out", x_ND), logits_KNV) < 1e-5


def test_the_readme_says_how_the_export_is_served(made: Any, tmp_path: Path) -> None:
    export(made("whole").version, "vllm-medusa", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"vllm serve {tmp_path / 'out' / 'model'} --dtype float32" in text
    assert '{"method": "medusa", "model": "' + str(tmp_path / "out") in text
    assert '"num_speculative_tokens": 3}' in text
    assert "prompts: through the chat template; an answer ends with token 2 or 7" in text


@pytest.mark.parametrize("form", MEDUSA)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": None}, r"small/1: has no Turbo heads.*\n.*finish: \{turbo:"),
        ({"rank": 0, "state": 4}, "heads have rank 0"),
        ({"task": "sequence-classification", "labels": ["a", "b"]}, "heads draft for causal-lm"),
    ],
)
def test_versions_without_such_heads_are_refused(
    form: Any, changes: dict[str, Any], message: str, made: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        export(made("whole", **changes).version, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_heads_are_refused(made: Any, tmp_path: Path) -> None:
    world = made("whole")
    (world.version.package / "heads" / "turbo_heads.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="cannot be read"):
        export(world.version, "tgi", tmp_path / "out")


def test_heads_of_another_model_are_refused(made: Any, heads_for: Any, tmp_path: Path) -> None:
    world = made("whole")
    heads_for(world.model, vocab_size=98).save(world.version.package / "heads")
    for form in MEDUSA:
        with pytest.raises(UserError, match="heads are for a vocabulary of 98 and a width of 64"):
            export(world.version, form, tmp_path / "out")


def test_an_lm_head_with_a_bias_is_not_for_vllm(made: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    phi = PhiForCausalLM(PhiConfig(vocab_size=97, num_hidden_layers=1, **sizes)).eval()
    phi.lm_head.bias.data.normal_()
    world = made("whole", model=phi)
    with pytest.raises(UserError, match="lm_head has a bias, which vLLM's Medusa has not"):
        export(world.version, "vllm-medusa", tmp_path / "out")
    export(world.version, "tgi", tmp_path / "out")
    assert off(as_medusa_v2(tmp_path / "out", None), expected(world)[1]) < 1e-5


@pytest.mark.parametrize(
    ("peft", "lacking"),
    [
        (LoraConfig(**LORA, use_dora=True), "use_dora=True"),
        (LoraConfig(**LORA, rank_pattern={"q_proj": 2}), "rank_pattern"),
        (LoraConfig(**LORA, bias="lora_only"), "bias='lora_only'"),
        (LoraConfig(**LORA, layers_to_transform=[0]), "layers_to_transform"),
        (
            IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
            "peft_type='IA3'",
        ),
    ],
)
def test_an_adapter_that_lorax_would_misread_is_refused(
    peft: Any, lacking: str, made: Any, tmp_path: Path
) -> None:
    world = made("adapter", peft=peft)
    with pytest.raises(UserError, match=f"LoRAX has plain LoRA alone.*{lacking}"):
        export(world.version, "lorax", tmp_path / "out")


def test_every_format_has_a_form() -> None:
    assert set(get_args(ExportFormat)) == set(FORMS)
