"""Each method trains exactly what it says, starts at the base, and refuses what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
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
from schemas.recipe import Train
from schemas.together import Together
from tasks.core.models import head_modules
from tasks.evaluate.subject import folded
from tasks.methods import ia3
from tasks.methods.method import trained
from tasks.methods.table import METHODS, method_for
from tasks.train.loop import make_optimizer

LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    attention_bias=True,
)
BERT = BertConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    num_labels=5,
)
ROBERTA = RobertaConfig(**BERT.to_diff_dict())
DISTILBERT = DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
VIT = ViTConfig(
    image_size=16,
    patch_size=4,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    num_labels=5,
)
BASES = {
    "causal-lm": lambda: LlamaForCausalLM(LLAMA),
    "sequence-classification": lambda: BertForSequenceClassification(BERT),
    "token-classification": lambda: BertForTokenClassification(BERT),
    "image-classification": lambda: ViTForImageClassification(VIT),
}
CANDIDATES = {
    "full": Full(method="full"),
    "zero_shot": ZeroShot(method="zero_shot"),
    "few_shot": FewShot(method="few_shot"),
    "lora": Lora(method="lora", rank=4),
    "qlora": QLora(method="qlora", rank=4),
    "adalora": AdaLora(method="adalora", rank=2, initial_rank=4),
    "ia3": Ia3(method="ia3"),
    "layer_norm": LayerNorm(method="layer_norm"),
    "last_layers": LastLayers(method="last_layers", layers=1),
    "bitfit": BitFit(method="bitfit"),
    "bottleneck": Bottleneck(method="bottleneck", reduction_factor=4),
    "prompt_tuning": PromptTuning(method="prompt_tuning", virtual_tokens=5),
    "p_tuning": PTuning(method="p_tuning", virtual_tokens=5, hidden_size=24),
    "prefix_tuning": PrefixTuning(method="prefix_tuning", virtual_tokens=5),
    "together": Together(
        method="together",
        of=[Lora(method="lora", rank=4), Bottleneck(method="bottleneck", reduction_factor=4)],
    ),
    "peft": Peft(method="peft", peft={"peft_type": "LOHA", "r": 4, "target_modules": "all-linear"}),
}
#: Virtual tokens are attended to from the first step on: there is no prompt that changes nothing.
SOFT = ("prompt_tuning", "p_tuning", "prefix_tuning")
FROM_THE_BASE = [name for name in CANDIDATES if name not in ("full", *SOFT)]
#: Each method with the tasks that it can be used for.
USES = [(name, task) for name in CANDIDATES for task in BASES if task in METHODS[name].tasks]


def inputs_of(task: str) -> dict[str, torch.Tensor]:
    """Two rows, as a base of that task reads them."""
    if task == "image-classification":
        return {"pixel_values": torch.randn(2, 3, 16, 16)}
    return {"input_ids": torch.randint(0, 64, (2, 9))}


def test_every_method_of_the_recipe_is_in_the_table_and_on_its_page():
    assert set(METHODS) == set(CANDIDATES)
    page = (Path(__file__).parents[3] / "docs" / "methods.md").read_text()
    table, _, rest = page.partition("\n## ")
    for name, method in METHODS.items():
        assert name == method.name
        assert method.merges == CANDIDATES[name].MERGES
        assert method.format == CANDIDATES[name].FORMAT
        [row] = [line for line in table.splitlines() if line.startswith(f"| `{name}` ")]
        _, family, _, merges, papers = (cell.strip() for cell in row.strip("|").split("|"))
        assert family == method.family
        assert (merges == "yes") == method.merges
        assert method.paper in papers or name == "full"
        # What has fields of its own to leave out has a reason for each default.
        if set(type(CANDIDATES[name]).model_fields) - {"method", "name", "train", "peft"}:
            defaults = rest[rest.index("Defaults, and why") : rest.index("## Methods together")]
            assert f"`{name}`" in defaults or name == "together"


@pytest.mark.parametrize(("name", "task"), USES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_trained_is_the_formula_in_float32(name, task, dtype):
    method, candidate = METHODS[name], CANDIDATES[name]
    with torch.device("meta"):
        expected = method.trainable_parameters(BASES[task](), candidate, task)
    base = BASES[task]().to(torch.float32 if method.trained_base else dtype)
    model = method.build(base, candidate, task)
    weights = trained(model)
    assert sum(weight.numel() for weight in weights.values()) == expected
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    if not method.trained_base:
        frozen = [
            weight
            for name, weight in model.named_parameters()
            # AdaLoRA's is a number that PEFT keeps as a weight.
            if not weight.requires_grad and ".ranknum." not in name
        ]
        assert all(weight.dtype == dtype for weight in frozen)


@pytest.mark.parametrize("name", ["zero_shot", "few_shot"])
def test_a_prompt_trains_nothing_and_is_for_generating_alone(name):
    model = METHODS[name].build(BASES["causal-lm"](), CANDIDATES[name], "causal-lm")
    assert trained(model) == {}
    with pytest.raises(UserError, match=f"{name} cannot be used for sequence-classification"):
        method_for(name, "sequence-classification")


def test_lora_counts_by_hand():
    # A layer: q and o 32 to 32, k and v 32 to 16, gate and up 32 to 48, down 48 to 32.
    layer = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)
    counted = METHODS["lora"].trainable_parameters(
        LlamaForCausalLM(LLAMA), CANDIDATES["lora"], "causal-lm"
    )
    assert counted == 2 * 4 * layer


@pytest.mark.parametrize(("name", "task"), [use for use in USES if use[0] in FROM_THE_BASE])
def test_an_adapter_starts_at_the_base_exactly(name, task):
    torch.manual_seed(0)
    base = BASES[task]().eval()
    inputs = inputs_of(task)
    before = base(**inputs).logits.detach()
    after = METHODS[name].build(base, CANDIDATES[name], task).eval()(**inputs).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("make", "heads"),
    [
        (BASES["sequence-classification"], {"bert.pooler", "classifier"}),
        (BASES["token-classification"], {"classifier"}),
        (BASES["image-classification"], {"classifier"}),
        (lambda: RobertaForSequenceClassification(ROBERTA), {"classifier"}),
        (lambda: DistilBertForSequenceClassification(DISTILBERT), {"pre_classifier", "classifier"}),
        (lambda: LlamaForSequenceClassification(LLAMA), {"score"}),
    ],
)
def test_lora_for_classification_trains_the_whole_head(make, heads):
    """All of the layers after the backbone, and no low-rank update in their place."""
    base = make()
    expected = METHODS["lora"].trainable_parameters(
        base, CANDIDATES["lora"], "sequence-classification"
    )
    within = sum(w.numel() for name in heads for w in base.get_submodule(name).parameters())
    assert set(head_modules(base)) == heads
    model = METHODS["lora"].build(base, CANDIDATES["lora"], "sequence-classification")
    whole = {name: weight for name, weight in trained(model).items() if "lora_" not in name}
    assert sum(weight.numel() for weight in whole.values()) == within
    assert all(any(f"{head}." in name for head in heads) for name in whole)
    assert sum(weight.numel() for weight in trained(model).values()) == expected


@pytest.mark.parametrize("task", BASES)
def test_a_saved_adapter_reloads_to_the_same_logits_and_differs_from_the_base(tmp_path, task):
    torch.manual_seed(0)
    model = METHODS["lora"].build(BASES[task]().eval(), CANDIDATES["lora"], task).eval()
    base_state = {
        name.removeprefix("base_model.model.").replace("base_layer.", ""): weight
        for name, weight in model.state_dict().items()
        if "lora_" not in name
    }
    with torch.no_grad():
        for weight in trained(model).values():
            weight.add_(0.05 * torch.randn_like(weight))
    inputs = inputs_of(task)
    tuned = model(**inputs).logits
    model.save_pretrained(tmp_path)
    fresh = BASES[task]().eval()
    fresh.load_state_dict(base_state, strict=False)
    with torch.no_grad():
        plain = fresh(**inputs).logits
        again = PeftModel.from_pretrained(fresh, tmp_path).eval()(**inputs).logits
    # The same products in the same order.
    assert torch.equal(again, tuned)
    assert not torch.allclose(again, plain, atol=1e-3)


def test_targets_by_name_are_only_those():
    candidate = Lora(method="lora", rank=4, target_modules=["q_proj", "v_proj"])
    model = METHODS["lora"].build(BASES["causal-lm"](), candidate, "causal-lm")
    parts = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained(model)}
    assert parts == {"q_proj", "v_proj"}


def test_unmatched_targets_are_all_named_with_the_nearest():
    candidate = Lora(method="lora", target_modules=["q_prj", "v_proj", "wq"])
    with pytest.raises(UserError) as caught:
        METHODS["lora"].build(BASES["causal-lm"](), candidate, "causal-lm")
    assert [problem.found.split()[0] for problem in caught.value.problems] == ["q_prj", "wq"]
    assert "did you mean q_proj?" in caught.value.problems[0].fix
    assert "down_proj" in caught.value.problems[1].fix


@pytest.mark.parametrize("targets", ["all-linear", ["k_proj"]])
def test_a_rank_larger_than_the_matrix_is_refused(targets):
    candidate = Lora(method="lora", rank=17, target_modules=targets)
    with pytest.raises(UserError, match=r"only 16 wide[\s\S]*at most 16"):
        METHODS["lora"].build(BASES["causal-lm"](), candidate, "causal-lm")


def test_a_base_without_linear_layers_is_refused():
    with pytest.raises(UserError, match="no linear layer"):
        METHODS["lora"].trainable_parameters(
            nn.Sequential(nn.Embedding(3, 4)), CANDIDATES["lora"], "causal-lm"
        )


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"choose from .*full.*, lora"):
        method_for("lroa", "causal-lm")


@pytest.mark.parametrize(
    ("make", "outputs", "inputs"),
    [
        (BASES["causal-lm"], {"k_proj", "v_proj"}, {"mlp.down_proj"}),
        (
            lambda: Qwen3ForCausalLM(Qwen3Config(**{**LLAMA.to_diff_dict(), "head_dim": 8})),
            {"k_proj", "v_proj"},
            {"mlp.down_proj"},
        ),
        (BASES["sequence-classification"], {"self.key", "self.value"}, {".output.dense"}),
        (BASES["image-classification"], {"k_proj", "v_proj"}, {"mlp.fc2"}),
        (lambda: DistilBertForSequenceClassification(DISTILBERT), {"k_lin", "v_lin"}, {"ffn.lin2"}),
    ],
)
def test_ia3_scales_keys_values_and_what_the_feed_forward_reads(make, outputs, inputs):
    by_output, by_input = ia3.scaled(make(), CANDIDATES["ia3"])
    assert len(by_output) == 4
    assert len(by_input) == 2
    assert all(any(name.endswith(end) for end in outputs) for name in by_output)
    assert all(any(name.endswith(end) for end in inputs) for name in by_input)
    assert not any("attention.output" in name for name in by_input)


def test_ia3_of_an_unknown_kind_asks_for_the_layers():
    base = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
    )
    with pytest.raises(UserError, match=r"gpt_neox base are is not known[\s\S]*name those"):
        METHODS["ia3"].build(base, CANDIDATES["ia3"], "causal-lm")
    given = Ia3(
        method="ia3",
        target_modules=["query_key_value", "dense_4h_to_h"],
        feedforward_modules=["dense_4h_to_h"],
    )
    model = METHODS["ia3"].build(base, given, "causal-lm")
    assert sum(w.numel() for w in trained(model).values()) == 96 + 48


def test_vectors_that_scale_do_not_decay():
    """One is their neutral value, and a shape of [O, 1] does not make them matrices."""
    weights = trained(METHODS["ia3"].build(BASES["causal-lm"](), CANDIDATES["ia3"], "causal-lm"))
    settings = Train(learning_rate=0.01, weight_decay=0.1)
    optimizer = make_optimizer(weights, settings, decays=METHODS["ia3"].decays)
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    for _ in range(10):
        optimizer.step()
    assert all((weight == 1).all() for weight in weights.values())
    lora = trained(METHODS["lora"].build(BASES["causal-lm"](), CANDIDATES["lora"], "causal-lm"))
    [group] = make_optimizer(lora, settings, decays=METHODS["lora"].decays).param_groups
    assert group["weight_decay"] == 0.1


def test_bitfit_on_a_base_without_biases_names_other_methods():
    base = LlamaForCausalLM(LlamaConfig(**{**LLAMA.to_diff_dict(), "attention_bias": False}))
    with pytest.raises(UserError, match=r"has no bias outside[\s\S]*method: layer_norm"):
        METHODS["bitfit"].build(base, CANDIDATES["bitfit"], "causal-lm")


def test_names_that_a_placement_does_not_read_are_refused():
    with pytest.raises(ValueError, match="double_sequential` alone"):
        Bottleneck(method="bottleneck", attention_modules=["o_proj"])


def test_modules_that_a_bottleneck_cannot_have_are_refused_with_those_there_are():
    """The same words from the formula, on shapes alone, and from the build."""
    candidate = Bottleneck(method="bottleneck", feed_forward_modules=["mpl"])
    for act in (METHODS["bottleneck"].trainable_parameters, METHODS["bottleneck"].build):
        with pytest.raises(UserError, match=r"bottleneck\].*'mpl'[\s\S]*fix: choose from .*mlp"):
            act(BASES["causal-lm"](), candidate, "causal-lm")


@pytest.mark.parametrize(
    "name", [name for name in FROM_THE_BASE if METHODS[name].merges and name != "qlora"]
)
def test_what_is_measured_as_merged_is_the_adapter_with_its_heads(name):
    """On a classifier with a pooler, whose wrapper PEFT's own unloading trips over. Folding adds
    what was added to a product to its weight before: rounding of float32."""
    torch.manual_seed(0)
    task = "sequence-classification"
    model = METHODS[name].build(BASES[task]().eval(), CANDIDATES[name], task).eval()
    with torch.no_grad():
        for weight in trained(model).values():
            weight.add_(0.05 * torch.randn_like(weight))
        ids = torch.randint(0, 64, (2, 9))
        tuned = model(input_ids=ids).logits
        plain = folded(model)
        assert not any("lora" in key or "modules_to_save" in key for key in plain.state_dict())
        torch.testing.assert_close(plain(input_ids=ids).logits, tuned, rtol=0, atol=1e-5)
