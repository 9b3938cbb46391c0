"""A version as PEFT's adapter and as a whole model: each gives the version's logits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig
from transformers.models.bert import BertForSequenceClassification

from schemas.errors import UserError
from tasks.core.quantised import FILE
from tasks.export.formats import export
from tasks.export.version import Version, checked_base
from tasks.methods.tuners import bitfit

LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(0, 97, (2, 7), generator=torch.Generator().manual_seed(3))
    found: torch.Tensor = model.eval()(input_ids=tokens).logits.float()
    return found


def test_an_adapter_is_what_peft_loads(made: Any, tmp_path: Path) -> None:
    world, out = made("adapter", rank=None), tmp_path / "out"
    assert export(world.version, "peft", out) == []
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = logits(base)
    # The same tensors through the same code: the same bits.
    assert torch.equal(logits(PeftModel.from_pretrained(base, out)), logits(world.model))
    assert not torch.allclose(before, logits(world.model), atol=0.01)
    # And the base is found by its name alone.
    assert torch.equal(
        logits(AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32)),
        logits(world.model),
    )
    # As its README says it.
    code = (out / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    said: dict[str, Any] = {}
    exec(code, said)
    assert torch.equal(logits(said["model"]), logits(world.model))


def test_a_base_of_the_hub_is_named_by_its_id(made: Any, tmp_path: Path) -> None:
    package = made("adapter").version.package
    serving = json.loads((package / "serving.json").read_text())
    serving["base"] |= {"model": "someone/small", "revision": "c0ffee"}
    (package / "serving.json").write_text(json.dumps(serving))
    export(Version.open("small/1", package, tmp_path / "base"), "peft", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/small"
    assert config["revision"] == "c0ffee"


def test_a_tuner_that_peft_lacks_travels(made: Any, llama: Any, tmp_path: Path) -> None:
    tuned = {"model": llama(attention_bias=True), "peft": bitfit.BitFitConfig()}
    world, out = made("adapter", **tuned, rank=None), tmp_path / "out"
    (world.version.model / "tuner.py").write_text(Path(bitfit.__file__).read_text())
    [said] = export(world.version, "peft", out)
    assert "run tuner.py" in said
    script = """
import runpy, sys, torch
sys.modules["tasks"] = None  # nothing of ours
runpy.run_path(sys.argv[1] + "/tuner.py", run_name="tuner")
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokens = torch.randint(0, 97, (2, 7), generator=torch.Generator().manual_seed(3))
torch.save(model(input_ids=tokens).logits.detach(), sys.argv[2])
"""
    found = tmp_path / "logits.pt"
    command = [sys.executable, "-c", script, str(out), str(found)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(found), logits(world.model))


def test_a_whole_version_leaves_as_it_is(made: Any, tmp_path: Path) -> None:
    world, out = made("whole", rank=None), tmp_path / "out"
    assert export(world.version, "merged", out) == []
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(world.model))
    for path in world.version.model.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "peft",
    [
        LoraConfig(**LORA),
        LoraConfig(**LORA, use_dora=True),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    ],
    ids=["lora", "dora", "ia3"],
)
def test_an_adapter_is_folded(peft: Any, made: Any, tmp_path: Path) -> None:
    world, out = made("adapter", peft=peft, rank=None), tmp_path / "out"
    assert export(world.version, "merged", out) == []
    found = AutoModelForCausalLM.from_pretrained(out)
    # W + B A rounded once, instead of W x + B A x: the order of float32 sums.
    torch.testing.assert_close(logits(found), logits(world.model), rtol=1e-4, atol=1e-5)
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    }


def test_a_classifier_is_folded_with_its_labels(
    package: Any, saved_base: Any, learn: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = BertConfig(vocab_size=97, num_hidden_layers=1, num_labels=3, **sizes)
    base = saved_base(BertForSequenceClassification(config))
    place = package(base, task="sequence-classification", labels=["card_lost", "top_up", "refund"])
    lora = LoraConfig(
        r=4, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS"
    )
    loaded = AutoModelForSequenceClassification.from_pretrained(base)
    model = learn(get_peft_model(loaded, lora))
    model.save_pretrained(place / "model")
    export(Version.open("intents/1", place, base), "merged", tmp_path / "out")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-5)
    assert found.config.id2label == {0: "card_lost", 1: "top_up", 2: "refund"}


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_what_learned_beside_four_bits_says_so(form: Any, made: Any, tmp_path: Path) -> None:
    world = made("adapter", rank=None)
    how = {"quant_type": "nf4", "double_quantisation": True, "unquantised": ["lm_head"]}
    (world.version.model / FILE).write_text(json.dumps(how))
    [said] = export(world.version, form, tmp_path / "out")
    assert "beside a base in 4 bits (nf4, double quantisation)" in said
    assert said in (tmp_path / "out" / "README.md").read_text()


def test_a_soft_prompt_leaves_as_an_adapter_alone(made: Any, tmp_path: Path) -> None:
    soft = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    world = made("adapter", peft=soft, rank=None)
    with pytest.raises(UserError, match=r"cannot be merged.*\n.*--format peft") as refused:
        export(world.version, "merged", tmp_path / "out")
    assert "finish" not in str(refused.value), "the fix of a recipe is not one here"
    export(world.version, "peft", tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    found = PeftModel.from_pretrained(base, tmp_path / "out")
    assert torch.equal(logits(found), logits(world.model))


@pytest.mark.parametrize(
    ("kind", "form", "message"),
    [
        ("whole", "peft", "is a whole model, without an adapter.*\n.*--format merged"),
        ("prompt", "peft", "has no adapter: it is its base, models/small, as it is"),
        ("prompt", "merged", "has no adapter: it is its base, models/small, as it is"),
    ],
)
def test_what_a_version_has_not_is_refused(
    kind: str, form: Any, message: str, made: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        export(made(kind).version, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["merged", "peft", "lorax"])
def test_adapters_that_learned_together_are_refused(form: Any, made: Any, tmp_path: Path) -> None:
    world = made("adapter")
    together = world.version.model / "1-lora"
    together.mkdir()
    for path in list(world.version.model.glob("adapter_*")):
        path.rename(together / path.name)
    (world.version.model / "2-ia3").mkdir()
    config = (together / "adapter_config.json").read_text()
    (world.version.model / "2-ia3" / "adapter_config.json").write_text(config)
    with pytest.raises(UserError, match=r"2 adapters that learned together \(1-lora, 2-ia3\)"):
        export(world.version, form, tmp_path / "out")


def test_another_base_is_refused(made: Any, tmp_path: Path) -> None:
    world = made("adapter")
    described = world.version.serving["base"]
    with pytest.raises(UserError, match="the version's base is not there"):
        checked_base(described, tmp_path / "gone")
    (tmp_path / "base" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json: is not the file .*\n.*PEFTFLOW_BASE"):
        checked_base(described, tmp_path / "base")
