"""Bottleneck adapters from and to AdapterHub's format, against what its own package computed.

tests/reference/adapterhub.py made the models, the adapters and the outputs, in an environment
with `adapters` 1.3.0, and ran adapters of ours there: `ours_in_theirs` of provenance.json.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from schemas.errors import UserError
from tasks.methods.adapterhub.__main__ import main
from tasks.methods.adapterhub.config import their_config
from tasks.methods.adapterhub.convert import from_adapterhub, to_adapterhub
from tasks.methods.adapterhub.names import MODELS
from tasks.methods.tuners.bottleneck import BLOCKS, BottleneckConfig

ROOT = Path(__file__).parents[3]
_spec = importlib.util.spec_from_file_location(
    "reference_adapterhub", ROOT / "tests/reference/adapterhub.py"
)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)
HERE = reference.HERE

CASES = [(model, name) for model in reference.MODELS for name in reference.configurations(model)]
each_case = pytest.mark.parametrize(("model", "name"), CASES)
#: Outputs are 1 to 4 in size, so one rounding is up to 2.4e-7. Measured: 0 where the operations
#: are the same, 7e-7 for seq_bn and par_bn, which add the residual in another order. A processor
#: that sums products in another order rounds every one of them differently, through two blocks.
ROUNDING = {"atol": 1e-5, "rtol": 1e-5}


def expected(model: str, name: str) -> dict[str, torch.Tensor]:
    tensors = load_file(HERE / model / "outputs.safetensors")
    return {key: tensors[f"{name}.{key}"] for key in ("logits", "hidden")}


def changed(source: Path, target: Path, **fields) -> Path:
    """A copy of an AdapterHub adapter with other fields in its `config`."""
    shutil.copytree(source, target)
    path = target / "adapter_config.json"
    facts = json.loads(path.read_text())
    facts["config"] |= fields
    path.write_text(json.dumps(facts))
    return target


def test_the_reference_is_of_the_package_and_whole() -> None:
    provenance = json.loads((HERE / "provenance.json").read_text())
    assert provenance["made"]["versions"]["adapters"] == "1.3.0"
    assert set(reference.MODELS) == set(MODELS)
    there = provenance["ours_in_theirs"]["largest_difference"]
    assert {(model, name) for model in there for name in there[model]} == set(CASES)
    assert max(value for model in there.values() for value in model.values()) < ROUNDING["atol"]


@each_case
def test_their_adapter_computes_here_what_it_did_there(tmp_path, model, name):
    from_adapterhub(HERE / model / name, tmp_path)
    tuned = PeftModel.from_pretrained(reference.base_of(model), tmp_path).eval()
    assert tuned.peft_config["default"].placement == reference.PLACEMENTS[name]
    found, base = reference.outputs(tuned), expected(model, "base")
    for key, tensor in expected(model, name).items():
        torch.testing.assert_close(found[key], tensor, **ROUNDING)
        # And the adapter does something, 5,000 times what is let pass above.
        assert (tensor - base[key]).abs().max() > 0.05
    with tuned.disable_adapter():
        for key, tensor in reference.outputs(tuned).items():
            torch.testing.assert_close(tensor, base[key], **ROUNDING)


@each_case
def test_there_and_back_is_the_same_adapter(tmp_path, model, name):
    source = HERE / model / name
    from_adapterhub(source, tmp_path / "ours")
    to_adapterhub(tmp_path / "ours", tmp_path / "theirs", model, name)
    for file in ("adapter.safetensors", "model_head.safetensors"):
        assert (tmp_path / "theirs" / file).exists() == (source / file).exists()
        if (source / file).exists():
            before, after = load_file(source / file), load_file(tmp_path / "theirs" / file)
            assert list(before) == list(after)
            assert all(torch.equal(before[key], after[key]) for key in before)
    before, after = (
        json.loads((place / "adapter_config.json").read_text())
        for place in (source, tmp_path / "theirs")
    )
    # How it would start is the one thing that ours does not keep.
    assert before["config"] | {"init_weights": "mam_adapter"} == after["config"]
    assert {key: before[key] for key in ("name", "model_type", "hidden_size", "version")} == {
        key: after[key] for key in ("name", "model_type", "hidden_size", "version")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_and_back_is_the_same_adapter(tmp_path, dtype):
    config = BottleneckConfig(
        placement="parallel",
        reduction_factor=3,
        activation="leaky_relu",
        scaling=4,
        task_type="SEQ_CLS",
        modules_to_save=["classifier", "pooler"],
    )
    model = get_peft_model(reference.base_of("bert"), config)
    reference.shake((w for w in model.parameters() if w.requires_grad), seed=5)
    model.to(dtype).save_pretrained(tmp_path / "ours")
    to_adapterhub(tmp_path / "ours", tmp_path / "theirs", "bert", "news")
    from_adapterhub(tmp_path / "theirs", tmp_path / "again")
    before, after = (
        load_file(tmp_path / place / "adapter_model.safetensors") for place in ("ours", "again")
    )
    assert set(before) == set(after)
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    again = BottleneckConfig.from_pretrained(tmp_path / "again")
    for field in ("placement", "reduction_factor", "activation", "scaling", "task_type"):
        assert getattr(again, field) == getattr(config, field)
    assert sorted(again.modules_to_save) == ["classifier", "pooler"]
    # Their loader takes no whole number for a scaling.
    there = json.loads((tmp_path / "theirs/adapter_config.json").read_text())["config"]
    assert isinstance(there["scaling"], float)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"original_ln_before": True}, r"original_ln_before: True: after attention ours reads"),
        (
            {"original_ln_before": True, "mh_adapter": False, "residual_before_ln": False},
            "residual_before_ln: False: ours adds to what the norm reads",
        ),
        ({"original_ln_after": False}, "original_ln_after: False.*\n.*True converts"),
        ({"residual_before_ln": "post_add"}, "residual_before_ln: 'post_add'"),
        ({"ln_before": True}, "ln_before: True: ours has no norm"),
        ({"ln_after": True}, "ln_after: True: ours has no norm"),
        ({"output_adapter": False}, "output_adapter: False"),
        ({"is_parallel": True}, "mh_adapter: True: ours is never beside the attention"),
        ({"inv_adapter": "nice"}, "inv_adapter: 'nice'.*\n.*None converts"),
        ({"phm_layer": True}, "phm_layer: True: ours has plain linear layers"),
        ({"use_gating": True}, "use_gating: True"),
        ({"cross_adapter": True}, "cross_adapter: True"),
        ({"leave_out": [0]}, r"leave_out: \[0\]: ours has an adapter in every block"),
        ({"scaling": "learned"}, "scaling: 'learned'.*\n.*a number converts"),
        ({"reduction_factor": {"default": 4}}, "reduction_factor: {'default': 4}.*\n.*whole"),
        ({"reduction_factor": 2.5}, "reduction_factor: 2.5"),
        ({"reduction_factor": 0.5}, "reduction_factor: 0.5"),
        ({"non_linearity": "rellu"}, "non_linearity: 'rellu'.*\n.*choose from .*relu"),
        ({"non_linearity": "prelu"}, "non_linearity: 'prelu'.*\n.*choose one without"),
        ({"architecture": "lora"}, "config: 'lora'"),
        ({"novelty": 1}, "novelty: 1: not a field"),
        ({"reduction_factor": 2}, r"has the shape \(2, 8\)\n.*\(4, 8\), by reduction_factor 2"),
        # Every field at once.
        ({"ln_before": True, "use_gating": True}, "ln_before(.|\n)*use_gating"),
    ],
)
def test_what_has_no_counterpart_is_named(tmp_path, fields, message):
    source = changed(HERE / "bert/double_seq_bn", tmp_path / "theirs", **fields)
    with pytest.raises(UserError, match=message):
        from_adapterhub(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_what_acts_in_training_alone_is_no_obstacle(tmp_path):
    source = changed(
        HERE / "bert/seq_bn",
        tmp_path / "theirs",
        dropout=0.1,
        stochastic_depth=0.1,
        init_weights="houlsby",
        leave_out=None,
        reduction_factor=4.0,
        non_linearity="LeakyReLU",
    )
    from_adapterhub(source, tmp_path / "ours")
    config = BottleneckConfig.from_pretrained(tmp_path / "ours")
    assert (config.reduction_factor, config.activation) == (4, "leaky_relu")


def test_what_reads_the_residual_in_a_pre_norm_block_is_refused_both_ways(tmp_path):
    source = changed(HERE / "llama/seq_bn_output", tmp_path / "seq_bn", original_ln_before=True)
    with pytest.raises(UserError, match=r"llama.*pre-norm.*residual.*\n.*False converts"):
        from_adapterhub(source, tmp_path / "ours")
    message = "llama.*pre-norm.*reads the residual(.|\n)*BERT's like"
    source = changed(HERE / "llama/seq_bn_output", tmp_path / "theirs", is_parallel=True)
    with pytest.raises(UserError, match=message):
        from_adapterhub(source, tmp_path / "ours")
    config = BottleneckConfig(placement="parallel", reduction_factor=4)
    get_peft_model(reference.base_of("llama"), config).save_pretrained(tmp_path / "parallel")
    with pytest.raises(UserError, match=message):
        to_adapterhub(tmp_path / "parallel", tmp_path / "out", "llama")


def test_pickles_are_refused(tmp_path):
    from_adapterhub(HERE / "bert/with_head", tmp_path / "ours")
    shutil.copytree(HERE / "bert/with_head", tmp_path / "head")
    (tmp_path / "head/model_head.safetensors").rename(tmp_path / "head/pytorch_model_head.bin")
    shutil.copytree(HERE / "bert/seq_bn", tmp_path / "theirs")
    (tmp_path / "theirs/adapter.safetensors").rename(tmp_path / "theirs/pytorch_adapter.bin")
    ours = tmp_path / "ours"
    (ours / "adapter_model.safetensors").rename(ours / "adapter_model.bin")
    message = "pickled weights.*refused\n.*use_safetensors=True"
    for source in ("theirs", "head"):
        with pytest.raises(UserError, match=message):
            from_adapterhub(tmp_path / source, tmp_path / "out")
    with pytest.raises(UserError, match=message):
        to_adapterhub(ours, tmp_path / "out", "bert")


def test_other_heads_are_refused(tmp_path):
    shutil.copytree(HERE / "bert/with_head", tmp_path / "flexible")
    path = tmp_path / "flexible/head_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": {"layers": 2}}))
    with pytest.raises(UserError, match=r"flexible head.*\n.*with_head=False"):
        from_adapterhub(tmp_path / "flexible", tmp_path / "out")
    shutil.copytree(HERE / "bert/with_head", tmp_path / "lm")
    save_file({"lm_head.weight": torch.zeros(4, 8)}, tmp_path / "lm/model_head.safetensors")
    with pytest.raises(UserError, match=r"lm_head.weight: no part .*\n.*with_head=False"):
        from_adapterhub(tmp_path / "lm", tmp_path / "out")


def test_half_an_adapter_is_refused(tmp_path):
    shutil.copytree(HERE / "bert/double_seq_bn", tmp_path / "theirs")
    path = tmp_path / "theirs/adapter.safetensors"
    whole = load_file(path)

    def refused(keep, message):
        save_file({key: tensor for key, tensor in whole.items() if keep(key)}, path)
        with pytest.raises(UserError, match=message):
            from_adapterhub(tmp_path / "theirs", tmp_path / "out")

    refused(lambda key: "layer.0" not in key, "not every block has its adapters")
    refused(lambda key: "attention" not in key, "not every block has its adapters")
    refused(lambda key: "1.output" not in key or "up.bias" not in key, "has no adapter_up.bias")
    path.write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be read"):
        from_adapterhub(tmp_path / "theirs", tmp_path / "out")


def test_other_models_names_and_places_are_refused(tmp_path):
    from_adapterhub(HERE / "bert/seq_bn_output", tmp_path / "ours")
    with pytest.raises(UserError, match=r"an adapter in bert.encoder.layer.0.output.dense"):
        to_adapterhub(tmp_path / "ours", tmp_path / "out", "llama")
    with pytest.raises(UserError, match=r"'deberta'.*\n.*choose from bert, roberta"):
        to_adapterhub(tmp_path / "ours", tmp_path / "out", "deberta")
    with pytest.raises(UserError, match=r"'a.b'.*\n.*letters"):
        to_adapterhub(tmp_path / "ours", tmp_path / "out", "bert", "a.b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(UserError, match="holds files already"):
        to_adapterhub(tmp_path / "ours", tmp_path / "full", "bert")
    config = tmp_path / "ours/adapter_config.json"
    facts = json.loads(config.read_text())
    for fields, message in (
        ({"feed_forward_modules": ["layer.1.output.dense"]}, r"feed_forward_modules: \['layer.1"),
        ({"activation": "hardswish"}, "hardswish: not in transformers 4.57"),
        ({"peft_type": "LORA"}, "peft_type 'LORA'"),
    ):
        config.write_text(json.dumps(facts | fields))
        with pytest.raises(UserError, match=message):
            to_adapterhub(tmp_path / "ours", tmp_path / "out", "bert")


def test_a_config_names_every_field_of_theirs() -> None:
    """Else their loader would fill in the defaults of another version."""
    theirs = json.loads((HERE / "bert/seq_bn/adapter_config.json").read_text())["config"]
    assert set(their_config(BottleneckConfig())) == set(theirs)
    assert set(MODELS) <= set(BLOCKS)


def test_the_command_line(tmp_path, monkeypatch, capsys):
    def run(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["adapterhub", *map(str, arguments)])
        main()

    source, ours, theirs = HERE / "gpt2/double_seq_bn", tmp_path / "ours", tmp_path / "theirs"
    run("--from", source, ours)
    run("--to", ours, theirs, "--model-type", "gpt2", "--name", "double_seq_bn")
    before, after = (load_file(place / "adapter.safetensors") for place in (source, theirs))
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())
    for arguments, message in (
        (("--from", source, ours), "holds files already\n    fix: name a new directory"),
        (("--to", ours, tmp_path / "more"), "--to needs --model-type"),
    ):
        with pytest.raises(SystemExit) as caught:
            run(*arguments)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
