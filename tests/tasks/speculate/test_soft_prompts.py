"""Behind a soft prompt: its keys and values stand in the cache before every row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

from tasks.speculate.decode import PromptError, Writer
from tasks.speculate.heads import HeadsError
from tasks.speculate.identity import fingerprint
from tasks.speculate.model import TurboModel
from tasks.speculate.pace import Fixed
from tasks.speculate.parts import parts_of

VIRTUAL = 5
KINDS = {
    "prompt": PromptTuningConfig,
    "p-tuning": PromptEncoderConfig,
    "prefix": PrefixTuningConfig,
}


@pytest.fixture(params=[(kind, base) for kind in KINDS for base in ("llama", "gpt2")], ids=str)
def soft(request: Any, make: Any) -> Any:
    kind, base = request.param
    options = {"encoder_hidden_size": 16} if kind == "p-tuning" else {}
    config = KINDS[kind](task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, **options)
    torch.manual_seed(0)
    model = get_peft_model(make[base](), config).eval()
    for name, parameter in model.named_parameters():
        if "prompt_encoder" in name:  # a prefix is drawn too small to be seen
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_the_same_tokens_as_pefts_generate(soft: Any, untaught: Any) -> None:
    prompts = [[1, 2, 3] * 3, [7], [5, 6, 7, 8, 5, 6]]
    # One at a time: PEFT counts positions from the padding on.
    expected = [
        soft.generate(input_ids=torch.tensor([prompt]), max_new_tokens=24)[0, len(prompt) :]
        for prompt in prompts
    ]
    bare = [
        soft.get_base_model().generate(torch.tensor([prompt]), max_new_tokens=24)[0, len(prompt) :]
        for prompt in prompts
    ]
    assert not all(torch.equal(one, other) for one, other in zip(expected, bare, strict=True))
    parts = parts_of(soft)
    assert parts.virtual == VIRTUAL
    for nodes in (1, 16):
        writer = Writer(parts, untaught(parts), lookup=True, pace=Fixed(nodes))
        found, account = writer.write(prompts, 24)
        assert found == [answer.tolist() for answer in expected]
    assert account.tokens_per_pass > 1
    turbo = TurboModel(soft, untaught(parts), pace=Fixed(8))
    one = turbo.generate(torch.tensor(prompts[:1]), max_new_tokens=24)
    assert one[0, 9:].tolist() == found[0]


def test_virtual_tokens_take_positions(make: Any) -> None:
    model = make["gpt2"](16)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    parts = parts_of(get_peft_model(model, config).eval())
    assert parts.longest == 16 - VIRTUAL
    ((answer,), _) = Writer(parts, lookup=True).write([[1, 2, 3]], 100)
    assert len(answer) == 16 - VIRTUAL - 3 + 1  # the last one needs no position
    with pytest.raises(PromptError, match="12 tokens, and the model knows 11"):
        Writer(parts).write([[1] * 12], 4)


def negated(soft: Any) -> None:
    with torch.no_grad():
        for parameter in soft.prompt_encoder["default"].parameters():
            parameter.mul_(-1)


def another(soft: Any) -> None:
    soft.add_adapter("other", soft.peft_config["default"])
    soft.set_adapter("other")


@pytest.mark.parametrize("swap", [negated, another])
@pytest.mark.parametrize("drafting", [True, False])
def test_a_soft_prompt_swapped_under_a_writer_is_told(
    soft: Any, untaught: Any, swap: Any, drafting: bool
) -> None:
    """Its keys and values were taken when the writer was made, with heads or without."""
    parts = parts_of(soft)
    writer = Writer(parts, untaught(parts) if drafting else None)
    turbo = TurboModel(soft, untaught(parts) if drafting else None)
    first = writer.write([[1, 2, 3]], 4)[0]
    swap(soft)
    for _ in range(2):
        with pytest.raises(HeadsError, match="soft prompt is another one"):
            writer.write([[1, 2, 3]], 4)
    with pytest.raises(HeadsError, match="soft prompt is another one"):
        turbo.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4)
    if swap is another:
        soft.set_adapter("default")
        assert writer.write([[1, 2, 3]], 4)[0] == first
        with soft.disable_adapter(), pytest.raises(HeadsError, match="turned off"):
            writer.write([[1, 2, 3]], 4)


def test_another_prompt_is_another_model(soft: Any) -> None:
    first = fingerprint(parts_of(soft))
    assert fingerprint(parts_of(soft)) == first
    with torch.no_grad():
        next(p for n, p in soft.named_parameters() if "prompt_encoder" in n).mul_(-1)
    assert fingerprint(parts_of(soft)) != first
