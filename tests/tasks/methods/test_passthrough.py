"""PEFT's other tuners, from their own configurations: counted, trained, reloaded, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from peft.config import PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import ValidationError
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from schemas.candidates import Peft
from schemas.errors import UserError
from schemas.recipe import Train
from tasks.methods.fused import fuse_lora
from tasks.methods.method import head_parameters, trained
from tasks.methods.passthrough import METHOD, REFUSED, config_class
from tasks.train.loop import make_optimizer
from tasks.train.placement import without_base_dropout

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
TYPES = {
    "LOHA": {"r": 4, "target_modules": "all-linear"},
    "LOKR": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "OFT": {"r": 0, "oft_block_size": 4, "target_modules": "all-linear"},
    "VERA": {"r": 8, "target_modules": ["q_proj", "o_proj"]},
    "IA3": {},
    # Counted on a CPU, as on meta it has no values to look at; its indices are no buffers.
    "BOFT": {"boft_block_size": 4, "target_modules": ["q_proj", "v_proj"]},
    "FOURIERFT": {"n_frequency": 60, "target_modules": "all-linear"},
}


def candidate(kind: str, **fields: object) -> Peft:
    return Peft.model_validate({"method": "peft", "peft": {"peft_type": kind, **fields}})


def problems(one: Peft, model: nn.Module | None = None) -> list[tuple[str, str, str]]:
    """What a build says against a candidate: places, findings, fixes."""
    with pytest.raises(UserError) as caught:
        METHOD.build(model or LlamaForCausalLM(LLAMA), one, "causal-lm")
    return [(one.place, one.found, one.fix) for one in caught.value.problems]


@pytest.mark.parametrize("kind", TYPES)
def test_it_trains_what_shapes_say_learns_and_reloads_to_the_same_logits(tmp_path, kind):
    torch.manual_seed(0)
    one, base = candidate(kind, **TYPES[kind]), LlamaForCausalLM(LLAMA).eval()
    untouched = copy.deepcopy(base)
    expected = METHOD.trainable_parameters(base, one, "causal-lm")
    with torch.device("meta"):
        shapes = METHOD.build(LlamaForCausalLM(LLAMA), one, "causal-lm")
    assert {weight.device.type for weight in shapes.parameters()} == {"meta"}
    assert sum(weight.numel() for weight in trained(shapes).values()) == expected > 0

    model = METHOD.build(base, one, "causal-lm").train()
    weights = trained(model)
    assert sum(weight.numel() for weight in weights.values()) == expected
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    ids = torch.randint(0, 64, (4, 9))
    optimizer = make_optimizer(weights, Train(learning_rate=1e-2), decays=METHOD.decays)
    losses = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert not any(torch.equal(before[name], weight) for name, weight in weights.items())

    model.eval().save_pretrained(tmp_path)
    torch.manual_seed(1)
    with torch.no_grad():
        learned, plain = model(input_ids=ids).logits, untouched(input_ids=ids).logits
        again = PeftModel.from_pretrained(untouched, tmp_path).eval()(input_ids=ids).logits
    # The same products in the same order; other random numbers at loading change nothing.
    assert torch.equal(again, learned)
    assert not torch.allclose(again, plain, atol=1e-3)


def test_counts_by_hand():
    """LoHa has two pairs of rank r, (r, in) and (out, r) each; IA3 k and v's outputs of 16, and
    what the feed-forward's last layer reads, 48; for classification the head comes on top."""
    loha = candidate("LOHA", r=3, target_modules=["q_proj"])
    base = LlamaForCausalLM(LLAMA)
    assert METHOD.trainable_parameters(base, loha, "causal-lm") == 2 * 2 * 3 * (32 + 32)
    assert METHOD.trainable_parameters(base, candidate("IA3"), "causal-lm") == 2 * (16 + 16 + 48)
    bert, task = BertForSequenceClassification(BERT), "sequence-classification"
    loha = candidate("LOHA", r=3, target_modules=["query"])
    head = head_parameters(bert, task)
    # Pooler and classifier of five labels.
    assert head == 32 * 32 + 32 + 5 * 32 + 5
    assert METHOD.trainable_parameters(bert, loha, task) == 2 * 2 * 3 * (32 + 32) + head


def test_the_heads_are_no_targets():
    bert = BertForSequenceClassification(BERT)
    for targets in ("all-linear", ["dense"]):
        one = candidate("LOKR", r=4, target_modules=targets)
        names = trained(METHOD.build(copy.deepcopy(bert), one, "sequence-classification"))
        assert any(".output.dense.lokr_" in name for name in names)
        assert not any(
            "lokr_" in name and ("pooler" in name or "classif" in name) for name in names
        )


def test_layers_to_transform_are_those_alone():
    """PEFT reads them with names that end a layer's, and not with full names."""
    one = candidate("LOHA", r=4, target_modules=["q_proj"], layers_to_transform=[1])
    names = trained(METHOD.build(LlamaForCausalLM(LLAMA), one, "causal-lm"))
    assert {name.split(".layers.")[1][0] for name in names} == {"1"}
    one = candidate("LOHA", target_modules="all-linear", layers_to_transform=[1])
    [(place, found, fix)] = problems(one)
    assert place.endswith(".peft.target_modules")
    assert "layers_to_transform" in found
    assert "name the layers" in fix


def test_a_tuners_own_dropout_stays_and_the_bases_goes():
    one = candidate("VERA", r=4, target_modules=["query"], vera_dropout=0.25)
    model = METHOD.build(BertForSequenceClassification(BERT), one, "sequence-classification")
    without_base_dropout(model)
    found = {name: part.p for name, part in model.named_modules() if isinstance(part, nn.Dropout)}
    own = {name for name in found if ".vera_dropout." in name}
    assert own
    assert all(rate == (0.25 if name in own else 0) for name, rate in found.items())


def test_a_layer_whose_bias_learns_keeps_pefts_path():
    """The fused one has no gradient for it."""
    for bias, fused in (("none", 4), ("lora_only", 0)):
        one = candidate("LORA", r=4, target_modules=["q_proj", "v_proj"], bias=bias)
        model = METHOD.build(LlamaForCausalLM(LLAMA), one, "causal-lm")
        assert fuse_lora(model) == fused
    ids = torch.randint(0, 64, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(weight.grad is not None for weight in trained(model).values())


def test_an_unknown_type_or_field_names_the_nearest():
    [(place, found, fix)] = problems(candidate("LOHAA"))
    assert place == "candidates[method=peft].peft.peft_type"
    assert "no type LOHAA" in found
    assert "did you mean LOHA?" in fix
    assert "VERA" in fix
    # In any case of letters, and one of ours that PEFT was told of is none of PEFT's.
    assert "did you mean LOKR?" in problems(candidate("lokr"))[0][2]
    assert "no type BOTTLENECK" in problems(candidate("BOTTLENECK"))[0][1]

    several = candidate("LOHA", rank_droput=0.1, r="8", target_modules=["q_prj"], alpha=8.5)
    found_at = {place.rsplit(".", 1)[-1]: (found, fix) for place, found, fix in problems(several)}
    assert set(found_at) == {"rank_droput", "r", "alpha"}
    assert "did you mean rank_dropout?" in found_at["rank_droput"][1]
    assert "module_dropout" in found_at["rank_droput"][1]
    assert "task_type" not in found_at["rank_droput"][1]
    assert found_at["r"] == ("found '8'", "input should be a valid integer")


def test_targets_that_match_nothing_are_all_named():
    one = candidate("LOHA", r=4, target_modules=["q_prj", "v_proj", "lm_head"])
    [first, second] = problems(one)
    assert first[0].endswith(".peft.target_modules")
    assert first[1].startswith("q_prj matches no module")
    assert "did you mean q_proj?" in first[2]
    assert second[1].startswith("lm_head")
    assert "an empty list" in problems(candidate("LOHA", target_modules=[]))[0][1]


def test_a_base_without_targets_of_its_own_gets_its_layers_named():
    base = GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=64,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global"], 2]],
        )
    )
    [(place, found, fix)] = problems(candidate("LN_TUNING"), base)
    assert place.endswith(".peft.target_modules")
    assert "PEFT has none for LN_TUNING on a gpt_neo base" in found
    assert "all-linear" in fix
    assert "ln_1" in fix


def test_what_peft_raises_where_it_builds_is_the_users_to_read():
    [(place, found, _)] = problems(candidate("LOHA", r=0, target_modules=["q_proj"]))
    assert place == "candidates[method=peft].peft"
    assert "PEFT cannot build LOHA" in found
    assert "`r` should be a positive integer" in found


def test_types_that_need_more_than_the_loss_are_refused_with_what_to_use():
    fixes = {"PREFIX_TUNING": "prefix_tuning", "P_TUNING": "p_tuning", "CPT": "prompt_tuning"}
    for kind, method in (fixes | {"ADALORA": "adalora"}).items():
        [(place, _, fix)] = problems(candidate(kind))
        assert place.endswith(".peft_type")
        assert fix == f"use method: {method}"
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        name = str(getattr(kind, "value", kind))
        if name in REFUSED or issubclass(config, PromptLearningConfig):
            with pytest.raises(UserError):
                config_class(name)
    assert set(REFUSED) <= {getattr(kind, "value", kind) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}


def test_a_type_made_from_the_bases_weights_cannot_be_counted():
    one = candidate("SHIRA", r=4, target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"peft_type: SHIRA makes its weights from the base's"):
        METHOD.trainable_parameters(LlamaForCausalLM(LLAMA), one, "causal-lm")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"peft_type": "LOHA", "task_type": "CAUSAL_LM"}, "remove `task_type`: it follows from"),
        ({"peft_type": "LOHA", "modules_to_save": ["lm_head"]}, "`modules_to_save`: the task's"),
        ({"r": 8}, "name the tuner with `peft_type`"),
        ({"peft_type": "../LOHA"}, "name the tuner"),
        ({"peft_type": "LOHA", "alpha": float("inf")}, "finite"),
    ],
)
def test_a_recipe_is_refused_what_is_not_its_to_say(fields, said):
    with pytest.raises(ValidationError, match=said):
        Peft.model_validate({"method": "peft", "peft": fields})
    assert candidate("LOHA", r=4).label == "loha"
