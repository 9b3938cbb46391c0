"""BitFit with modules that are used in unusual ways, in threads, and in a process of its own."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from tasks.methods.method import trained
from tasks.methods.tuners import bitfit
from tasks.methods.tuners.bitfit import BitFitConfig, BitFitLayer


def make_base(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    bert = BertConfig(vocab_size=64, num_labels=5, num_hidden_layers=2, **sizes)
    return BertForSequenceClassification(bert).eval()


def tune(name: str) -> nn.Module:
    kind = "CAUSAL_LM" if name == "gpt2" else "SEQ_CLS"
    return get_peft_model(make_base(name), BitFitConfig(task_type=kind)).eval()


def ids() -> torch.Tensor:
    return torch.arange(2, 11)[None]


def learn(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.05)
    model(input_ids=ids()).logits.pow(2).mean().backward()
    optimizer.step()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def test_a_module_that_reads_the_bias_of_another_gets_the_trained_one():
    # nn.MultiheadAttention hands the bias of its output layer to a function.
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))
    model.requires_grad_(False)  # torch takes other kernels for weights that learn
    x = torch.randn(2, 3, 8)
    before = model(x)
    tuned = get_peft_model(model, BitFitConfig())
    assert torch.equal(tuned(x), before)
    tuned(x).pow(2).sum().backward()
    weights = trained(tuned)
    assert any("out_proj" in key for key in weights)
    assert all(weight.grad is not None for weight in weights.values())
    with torch.no_grad():
        # The fast path of inference reads every bias and `eps` past the modules.
        tuned.eval()
        plain = copy.deepcopy(tuned).merge_and_unload()
        assert torch.equal(tuned(x), plain(x))
        weights["base_model.model.0.self_attn.out_proj.bitfit_bias.default"][0] += 1.0
        assert not torch.allclose(tuned(x), before, atol=1e-2)


def test_a_module_that_changes_its_bias_leaves_the_trained_one_alone():
    class Casting(nn.Linear):
        """What a quantised layer of bitsandbytes does to its bias."""

        def forward(self, x):
            self.bias.data = self.bias.data.to(x.dtype)
            return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)

    tuned = get_peft_model(nn.Sequential(Casting(3, 2)), BitFitConfig())
    (bias,) = trained(tuned).values()
    before = bias.detach().clone()
    tuned(torch.ones(4, 3, dtype=torch.bfloat16)).sum().backward()
    assert bias.dtype == bias.grad.dtype == torch.float32
    assert torch.equal(bias, before)
    # Four rows of ones: small integers are exact in bfloat16.
    assert torch.equal(bias.grad, torch.full((2,), 4.0))


def test_a_module_offloaded_by_accelerate_is_refused():
    model = cpu_offload(nn.Sequential(nn.Linear(3, 2)), torch.device("cpu"))
    with pytest.raises(ValueError, match="0 is offloaded by accelerate"):
        get_peft_model(model, BitFitConfig())


def test_the_head_of_another_adapter_is_not_wrapped():
    model = tune("bert")
    model.add_adapter("other", BitFitConfig())
    assert not any(
        "classifier" in key for key, part in model.named_modules() if isinstance(part, BitFitLayer)
    )


def test_a_module_with_a_forward_of_its_own_is_trained_too():
    # As accelerate's hooks are: bound to the module, not looked up on its class.
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].forward = model[0].forward
    tuned = get_peft_model(model, BitFitConfig())
    x = torch.randn(4, 3)
    tuned(x).sum().backward()
    (bias,) = trained(tuned).values()
    assert torch.equal(bias.grad, torch.full((2,), 4.0))
    with torch.no_grad():
        before = tuned(x)
        bias.add_(1.0)
        # One addition more: a unit of float32 at values of about one.
        torch.testing.assert_close(tuned(x), before + 1.0, rtol=0, atol=1e-6)


def test_adapters_can_be_used_from_threads():
    model = tune("gpt2")
    learn(model)

    def pass_once(_):
        with torch.no_grad():
            return model(input_ids=ids()).logits

    with torch.no_grad():
        expected, own = model(input_ids=ids()).logits, values(model)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(out, expected) for out in pool.map(pass_once, range(40)))
    assert all(torch.equal(weight, own[key]) for key, weight in model.state_dict().items())


def test_an_adapter_for_each_row_is_refused():
    with pytest.raises(ValueError, match="no adapter for each row"):
        tune("gpt2")(input_ids=torch.ones(1, 2, dtype=torch.long), adapter_names=["default"])


def test_layers_of_another_method_are_not_wrapped():
    model = get_peft_model(make_base("bert"), LoraConfig(target_modules=["query"]))
    with pytest.warns(UserWarning, match="second time"):
        both = get_peft_model(model.base_model.model, BitFitConfig())
    wrapped = [key for key, part in both.named_modules() if isinstance(part, BitFitLayer)]
    assert wrapped
    assert not any("query" in key for key in wrapped)


def test_of_two_versions_in_a_process_the_last_registered_counts(monkeypatch):
    bitfit.register()
    before = tune("gpt2")
    spec = importlib.util.spec_from_file_location("bitfit", bitfit.__file__)
    second = importlib.util.module_from_spec(spec)
    # A dataclass looks its own module up.
    monkeypatch.setitem(sys.modules, "bitfit", second)
    spec.loader.exec_module(second)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["BITFIT"] is second.BitFitConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["BITFIT"] is second.BitFitModel
    bitfit.register()
    assert PEFT_TYPE_TO_TUNER_MAPPING["BITFIT"] is bitfit.BitFitModel
    # What was loaded before goes on as it was.
    with before.disable_adapter():
        before(input_ids=ids())


def test_the_file_loads_an_adapter_with_torch_and_peft_alone(tmp_path):
    model = tune("gpt2")
    learn(model)
    model.save_pretrained(tmp_path / "adapter")
    make_base("gpt2").save_pretrained(tmp_path / "base")
    torch.save(model(input_ids=ids()).logits.detach(), tmp_path / "logits.pt")
    torch.save(ids(), tmp_path / "ids.pt")
    code = f"""
import sys
sys.path.append({str(Path(bitfit.__file__).parent)!r})
import bitfit
ours = ("tasks", "schemas", "flows")
assert not [name for name in sys.modules if name.split(".")[0] in ours]
import torch
from peft import PeftModel
from transformers import GPT2LMHeadModel
base = GPT2LMHeadModel.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
out = model(input_ids=torch.load({str(tmp_path / "ids.pt")!r})).logits
assert torch.equal(out, torch.load({str(tmp_path / "logits.pt")!r}))
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
