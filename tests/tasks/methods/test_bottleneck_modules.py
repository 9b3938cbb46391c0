"""Which modules bottleneck adapters take, what they refuse, and the tuner's file by itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.methods.tuners import bottleneck
from tasks.methods.tuners.bottleneck import BottleneckConfig, target_widths


def llama() -> nn.Module:
    """The same weights at every call, 32 wide, 48 in the middle."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config).eval()


def config_of(placement: str, **more) -> BottleneckConfig:
    return BottleneckConfig(placement=placement, reduction_factor=8, **more)


@torch.no_grad()
def shake(model: nn.Module) -> nn.Module:
    """Move every trained weight, so that nothing is zero by its start."""
    draw = torch.Generator().manual_seed(2)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.add_(0.3 * torch.randn(weight.shape, generator=draw))
    return model


def test_an_override_chooses_the_modules():
    config = config_of(
        "double_sequential",
        attention_modules=["layers.0.self_attn.o_proj"],
        feed_forward_modules="layers.1.mlp",
    )
    model = get_peft_model(llama(), config)
    assert model.targeted_module_names == ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp"]


def test_an_override_reaches_models_that_have_no_map(tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend, self.feed = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = x + self.attend(x)
            return x + self.feed(x)

    def block() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Block(), Block())

    x = torch.randn(3, 8)
    config = config_of("double_sequential", attention_modules="attend", feed_forward_modules="feed")
    model = shake(get_peft_model(block(), config))
    assert len(model.targeted_module_names) == 4
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(block(), tmp_path)(x), model(x))
    with pytest.raises(
        ValueError, match=r"no module map.*llama.*set feed_forward_modules.*\*\.feed"
    ):
        get_peft_model(block(), config_of("sequential"))


def test_an_ending_that_matches_nothing_lists_the_candidates():
    config = config_of("sequential", feed_forward_modules=["mlp", "mpl"])
    model = get_peft_model(llama(), config_of("sequential"))
    with pytest.raises(ValueError, match=r"'mpl'; choose from .*layers\.\*\.mlp") as caught:
        model.add_adapter("second", config)
    candidates = str(caught.value).split("choose from ")[1].split(", ")
    # Each of them is an ending that would do, and a whole block is not one.
    for candidate in candidates:
        assert target_widths(llama(), config_of("sequential", feed_forward_modules=[candidate]))
    assert "layers.*" not in candidates
    assert "model" not in candidates


def test_a_parallel_adapter_needs_a_module_as_wide_in_as_out():
    config = config_of("parallel", feed_forward_modules=["mlp.down_proj"])
    with pytest.raises(ValueError, match="reads 48 features and writes 32"):
        get_peft_model(llama(), config)


def test_an_adapter_around_a_norm_needs_one():
    with pytest.raises(ValueError, match=r"llama, which has no norm over .*another placement"):
        get_peft_model(llama(), config_of("sequential_normed"))
    config = config_of("sequential_normed", feed_forward_modules=["mlp"])
    with pytest.raises(ValueError, match="mlp is no norm"):
        get_peft_model(llama(), config)


def test_modules_inside_each_other_are_refused():
    config = config_of("double_sequential", attention_modules=["mlp.down_proj"])
    with pytest.raises(ValueError, match=r"mlp.down_proj lies inside .*mlp"):
        get_peft_model(llama(), config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"placement": "paralel"}, "choose from double_sequential, sequential, .*parallel"),
        ({"reduction_factor": 0}, "at least 1"),
        ({"activation": "rellu"}, "choose from .*relu"),
        ({"activation": "prelu"}, "has weights"),
    ],
)
def test_what_a_config_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**settings)


def test_registering_twice_is_registering_once():
    before = dict(PEFT_TYPE_TO_TUNER_MAPPING)
    bottleneck.register()
    assert before == PEFT_TYPE_TO_TUNER_MAPPING


def test_the_file_imports_alone_and_serves_a_saved_adapter(tmp_path):
    # Alone in a folder, as in a registered model.
    shutil.copy(bottleneck.__file__, tmp_path / "bottleneck.py")
    model = shake(get_peft_model(llama(), config_of("parallel")).eval())
    inputs = {"input_ids": torch.arange(3, 21).view(2, 9)}
    llama().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    torch.save((inputs, model(**inputs).logits.detach()), tmp_path / "expected.pt")
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import bottleneck
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
inputs, expected = torch.load({str(tmp_path / "expected.pt")!r})
assert torch.equal(model(**inputs).logits, expected)
print({{name.split(".")[0] for name in sys.modules}} & {{"tasks", "schemas", "flows"}})
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, cwd=Path("/")
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "set()"
