"""The shape of transformers' own generate(): what goes in, what comes out, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteriaList

from tasks.speculate.decode import PromptError
from tasks.speculate.heads import HeadsError
from tasks.speculate.model import TurboModel
from tasks.speculate.pace import Fixed
from tasks.speculate.request import RequestError

IDS = torch.tensor([[0, 0, 5, 6, 7, 5, 6], [8, 9, 8, 9, 8, 9, 3]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


class Listening:
    """A streamer that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.told.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def turbo(small: Any) -> TurboModel:
    return TurboModel(small.model, small.heads, pace=Fixed(16))


@pytest.mark.parametrize(
    "asked",
    [
        {"max_new_tokens": 9},
        {"max_length": 12},
        {"max_new_tokens": 1},
        {},
        {"max_new_tokens": 9, "eos_token_id": 3},
        {"max_new_tokens": 15, "eos_token_id": list(range(40)), "pad_token_id": 95},
        {"max_new_tokens": 15, "eos_token_id": list(range(40)), "pad_token_id": None},
        {"max_new_tokens": 15, "eos_token_id": list(range(40)), "min_new_tokens": 6},
        {"max_new_tokens": 15, "eos_token_id": list(range(40)), "min_length": 11},
        {"generation_config": GenerationConfig(max_new_tokens=7, eos_token_id=3, pad_token_id=1)},
        {"max_new_tokens": 9, "do_sample": True, "top_k": 1},
        {"max_new_tokens": 9, "temperature": 0.5},
        {"max_new_tokens": 9, "use_cache": False},
    ],
    ids=str,
)
def test_the_same_settings_mean_the_same(small: Any, turbo: TurboModel, asked: Any) -> None:
    given = {"attention_mask": MASK, **asked}
    expected = small.model.generate(IDS, **given)
    assert torch.equal(turbo.generate(IDS, **given), expected)
    assert torch.equal(turbo.generate(input_ids=IDS, **given), expected)
    own = small.model.generate(IDS, custom_generate=turbo.custom_generate, **given)
    assert torch.equal(own, expected)


def test_padding_known_by_its_token(small: Any, turbo: TurboModel) -> None:
    """Without a mask transformers takes padding tokens for padding."""
    expected = small.model.generate(IDS, max_new_tokens=9, pad_token_id=0, eos_token_id=3)
    found = turbo.generate(IDS, max_new_tokens=9, pad_token_id=0, eos_token_id=3)
    assert torch.equal(found, expected)


def test_with_an_adapter_that_is_not_merged(make: Any, untaught: Any) -> None:
    """PEFT calls the base's generate() in turn."""
    model = make["lora"]()
    turbo = TurboModel(model)
    turbo = TurboModel(model, untaught(turbo.writer.parts))
    expected = model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=9)
    found = turbo.generate(IDS, attention_mask=MASK, max_new_tokens=9)
    assert torch.equal(found, expected)
    with model.disable_adapter():
        bare = model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=9)
        assert torch.equal(turbo.generate(IDS, attention_mask=MASK, max_new_tokens=9), bare)
    assert not torch.equal(bare, expected)


def test_an_output_with_sequences(turbo: TurboModel) -> None:
    found = turbo.generate(IDS[1:], max_new_tokens=5, return_dict_in_generate=True)
    assert torch.equal(found.sequences, turbo.generate(IDS[1:], max_new_tokens=5))


def test_a_streamer_hears_each_token_once_and_in_order(turbo: TurboModel) -> None:
    listening = Listening()
    found = turbo.generate(IDS[1:], max_new_tokens=20, streamer=listening)
    prompt, *news = listening.told
    assert prompt == IDS[1].tolist()
    assert [token for new in news for token in new] == found[0, IDS.shape[1] :].tolist()
    assert listening.ended
    # Accepted drafts come together.
    assert max(map(len, news)) > 1


def test_the_account(turbo: TurboModel) -> None:
    found = turbo.generate(IDS, attention_mask=MASK, max_new_tokens=20)
    account = turbo.account
    assert account.tokens == found[:, IDS.shape[1] :].numel()
    # The first token of each row is the prompt's.
    assert sum(length * n for length, n in account.lengths.items()) == account.tokens - 2
    assert account.tokens_per_pass > 1
    assert account.tokens_per_second > 0
    assert account.accepted[1] <= account.drafted[1]


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"num_beams": 3}, "num_beams=3"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2"),
        ({"bad_words_ids": [[4]]}, "bad_words_ids"),
        ({"suppress_tokens": [4]}, "suppress_tokens"),
        ({"do_sample": True, "typical_p": 0.5}, "typical_p=0.5"),
        ({"repetition_penalty": 1.2, "max_time": 1.0}, "repetition_penalty=1.2, max_time=1.0"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [1, 2]}, "PrefixConstrained"),
        ({"stopping_criteria": StoppingCriteriaList([lambda *_: False])}, "stopping_criteria"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
        ({"assistant_model": object()}, "assistant_model"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1]] * 2)}, "within row 0"),
        ({"attention_mask": torch.tensor([[1] * 7, [0] * 7])}, "prompt 1 has no tokens"),
        ({"streamer": Listening()}, "one prompt"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused_is_named(turbo: TurboModel, asked: Any, named: str) -> None:
    with pytest.raises((RequestError, PromptError), match=named.replace("[", r"\[")):
        turbo.generate(IDS, **{"max_new_tokens": 5, **asked})


def test_positions_of_ones_own_are_refused(turbo: TurboModel) -> None:
    with pytest.raises(RequestError, match="position_ids"):
        turbo.generate(IDS, max_new_tokens=5, position_ids=torch.arange(3, 10).expand(2, -1))


def test_nothing_to_answer(turbo: TurboModel) -> None:
    with pytest.raises(RequestError, match="no input_ids"):
        turbo.generate(max_new_tokens=5)
    with pytest.raises(RequestError, match="no input_ids"):
        turbo.generate(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(PromptError, match="prompt 1 has no tokens"):
        turbo.writer.write([[1], []], 5)


def test_a_prompt_longer_than_the_context(turbo: TurboModel) -> None:
    ids = torch.ones(1, 129, dtype=torch.long)
    with pytest.raises(PromptError, match=r"129 tokens, and the model knows 128 positions"):
        turbo.generate(ids, max_new_tokens=5)


def test_an_answer_that_the_context_ends_says_so(turbo: TurboModel, caplog: Any) -> None:
    found = turbo.generate(torch.ones(1, 120, dtype=torch.long), max_new_tokens=30)
    assert found.shape == (1, 129)
    assert "end at the last of the model's 128 positions" in caplog.text


def test_another_model_is_refused(turbo: TurboModel, make: Any) -> None:
    with pytest.raises(RequestError, match="another model"):
        make["llama"]().generate(IDS, max_new_tokens=5, custom_generate=turbo.custom_generate)


def test_a_vocabulary_resized_since(make: Any, untaught: Any) -> None:
    model = make["llama"]()
    turbo = TurboModel(model)
    heads = untaught(turbo.writer.parts)
    model.resize_token_embeddings(100)
    with pytest.raises(HeadsError, match="lm_head was replaced"):
        turbo.generate(IDS, max_new_tokens=5)
    with pytest.raises(HeadsError, match="resized"):
        TurboModel(model, heads)
