"""Virtual tokens of an encoder-decoder, against PEFT's own forward, one row at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BlenderbotSmallConfig,
    LongT5Config,
    T5Config,
)

from schemas.candidates import PrefixTuning, PromptTuning, PTuning
from schemas.errors import StageError, UserError
from schemas.together import Together
from tasks.core import adapters
from tasks.evaluate.batches import context_limit
from tasks.evaluate.generate import generate
from tasks.evaluate.workload import prompt_length
from tasks.methods import soft
from tasks.methods.method import trained
from tasks.methods.table import METHODS, methods_of
from tasks.register import served_model
from tasks.train.output import save_model

V, CONTEXT = 5, 48
#: Keys are narrower than the model, and T5's decoder has as many heads as its encoder. Wide draws,
#: so that what is seen makes a difference.
T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "initializer_factor": 2.0,
}
BART = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
    "init_std": 0.5,
    "scale_embedding": True,  # what stands beside the virtual tokens is scaled, and they are not
}
CONFIGS = {
    "t5": T5Config(**T5),
    "t5 v1.1": T5Config(**T5, tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
    "bart": BartConfig(**BART),
}
SOFT = {
    "prompt": PromptTuning(method="prompt_tuning", virtual_tokens=V),
    "random": PromptTuning(method="prompt_tuning", virtual_tokens=V, init="random"),
    "mlp": PTuning(method="p_tuning", virtual_tokens=V),
    "prefix": PrefixTuning(method="prefix_tuning", virtual_tokens=V),
    "projected": PrefixTuning(
        method="prefix_tuning", virtual_tokens=V, projection=True, hidden_size=12
    ),
}
kinds = pytest.mark.parametrize("kind", CONFIGS)
soft_prompts = pytest.mark.parametrize("name", SOFT)


def built(kind: str, candidate: Any) -> Any:
    torch.manual_seed(0)
    base = AutoModelForSeq2SeqLM.from_config(copy.deepcopy(CONFIGS[kind])).eval()
    return METHODS[candidate.method].build(base, candidate, "seq2seq").eval()


def rows_of(*lengths: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (length,), generator=draw) for length in lengths]


def padded(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    fill = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": fill(sources, batch_first=True),
        "attention_mask": fill([torch.ones_like(row) for row in sources], batch_first=True),
        "decoder_input_ids": fill(targets, batch_first=True),
    }


@kinds
@soft_prompts
def test_padded_pairs_give_what_peft_gives_each_alone(kind, name):
    model = built(kind, SOFT[name])
    sources, targets = rows_of(3, 9, 6), rows_of(7, 2, 5)
    with torch.no_grad():
        both = [
            {"input_ids": source[None], "decoder_input_ids": target[None]}
            for source, target in zip(sources, targets, strict=True)
        ]
        alone = [model(**one).logits[0] for one in both]
        plain = [model.get_base_model()(**one).logits[0] for one in both]
        found = soft.run(model, **padded(sources, targets), use_cache=False).logits
    for ours, theirs, without in zip(found, alone, plain, strict=True):
        # float32 sums over other shapes, and attention that is nearly one-hot; logits reach 40.
        torch.testing.assert_close(ours[: len(theirs)], theirs, rtol=1e-4, atol=1e-3)
        assert not torch.allclose(theirs, without, atol=0.03), "the virtual tokens are not seen"


@kinds
@soft_prompts
def test_answers_of_padded_prompts_are_pefts_own(kind, name):
    """Token by token behind what was read, rows leaving early, against PEFT's generate of each."""
    model = built(kind, SOFT[name])
    prompts = rows_of(3, 9, 6, 4, 7)
    # BART's own settings begin and end an answer with tokens of theirs, which nobody asks for.
    settings = model.get_base_model().generation_config
    settings.forced_eos_token_id = settings.forced_bos_token_id = None
    expected = []
    for prompt in prompts:
        written = model.generate(
            input_ids=prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            decoder_start_token_id=model.config.decoder_start_token_id,
        )
        expected.append(written[0, 1:].tolist())
    arrays = [prompt.numpy().astype("int32") for prompt in prompts]
    assert [answer.tokens for answer in generate(model, arrays, frozenset(), 8)] == expected
    stops = frozenset({expected[0][2], expected[1][4]})
    cut = [next((at for at, token in enumerate(row) if token in stops), 8) for row in expected]
    answers = generate(model, arrays, stops, 8)
    assert [a.tokens for a in answers] == [r[:n] for r, n in zip(expected, cut, strict=True)]


@kinds
@soft_prompts
def test_what_learns_is_the_formula(kind, name):
    method, candidate = METHODS[SOFT[name].method], SOFT[name]
    counted = method.trainable_parameters(
        AutoModelForSeq2SeqLM.from_config(CONFIGS[kind]), candidate, "seq2seq"
    )
    assert sum(w.numel() for w in trained(built(kind, candidate)).values()) == counted
    # A prefix stands in the decoder: BART's has 3 layers with keys 32 wide, T5's 2 with 2 * 12.
    layers, width = (3, 32) if kind == "bart" else (2, 24)
    assert (
        counted
        == {
            "prompt": V * 32,
            "random": V * 32,
            "mlp": V * 32 + 3 * (32 * 32 + 32),
            "prefix": V * 2 * layers * width,
            "projected": V * width + (width * 12 + 12) + 13 * 2 * layers * width,
        }[name]
    )


@kinds
@soft_prompts
def test_what_is_saved_reloads_to_the_same_logits(tmp_path, kind, name):
    model = built(kind, SOFT[name])
    with torch.no_grad():
        for weight in trained(model).values():
            weight += 0.1 * torch.randn_like(weight)
        inputs = padded(rows_of(4, 8), rows_of(5, 3))
        expected = soft.run(model, **inputs).logits
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        base = AutoModelForSeq2SeqLM.from_config(CONFIGS[kind]).eval()
        again = PeftModel.from_pretrained(base, tmp_path).eval()
        assert torch.equal(soft.run(again, **inputs).logits, expected)


@kinds
@soft_prompts
def test_a_run_ends_with_proof_that_the_prompt_is_attended_to(monkeypatch, kind, name):
    model = built(kind, SOFT[name])
    before = {key: weight.clone() for key, weight in model.named_parameters()}
    course = METHODS[SOFT[name].method].course(model, SOFT[name], 1)
    assert course.finish()["virtual_tokens_move_logits"] > 0
    assert all(torch.equal(weight, before[key]) for key, weight in model.named_parameters())
    monkeypatch.setattr(soft, "run", lambda model, **inputs: model.get_base_model()(**inputs))
    with pytest.raises(StageError, match="no row attends to the virtual tokens"):
        course.finish()


@pytest.mark.parametrize(("name", "reading"), [("prompt", True), ("prefix", False)])
def test_the_side_that_they_stand_on_has_less_room(name, reading):
    """Prompts take positions of the encoder, a prefix those of the decoder, which is filled."""
    model = built("bart", SOFT[name])
    assert context_limit(model, reading=reading) == CONTEXT - V
    assert context_limit(model, reading=not reading) == CONTEXT
    assert prompt_length(model, 100, 4) == (CONTEXT - V if reading else CONTEXT)
    [answer] = generate(model, [rows_of(4)[0].numpy().astype("int32")], frozenset(), 100)
    assert len(answer.tokens) == (CONTEXT if reading else CONTEXT - V)
    fits, full = (CONTEXT - V, CONTEXT), (CONTEXT - V + 1, CONTEXT)
    order = slice(None) if reading else slice(None, None, -1)
    soft.check_room(model, *fits[order])
    with pytest.raises(UserError, match=r"44 tokens behind 5 virtual[\s\S]*max_length: 43"):
        soft.check_room(model, *full[order])


def test_a_prefix_is_lost_where_layers_are_computed_again_and_a_prompt_is_not():
    soft.check_checkpointing(built("t5", SOFT["prompt"]))
    with pytest.raises(UserError, match=r"train\.gradient_checkpointing"):
        soft.check_checkpointing(built("t5", SOFT["prefix"]))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LongT5Config(**T5), r"longt5 has layers that look back[\s\S]*method: lora"),
        (
            BlenderbotSmallConfig(**BART),
            r"blenderbot-small does not read embeddings[\s\S]*prefix_tuning",
        ),
    ],
)
def test_encoders_that_would_read_a_prompt_otherwise_are_refused(config, words):
    base = AutoModelForSeq2SeqLM.from_config(config)
    for name in ("prompt", "mlp"):
        with pytest.raises(UserError, match=words):
            METHODS[SOFT[name].method].build(base, SOFT[name], "seq2seq")


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_beside_lora_it_is_saved_by_itself_and_served_the_same(tmp_path, kind, method):
    parts = [{"method": "lora", "rank": 4}, {"method": method, "virtual_tokens": V}]
    candidate = Together.model_validate({"method": "together", "of": parts})
    model = built(kind, candidate)
    with torch.no_grad():
        for weight in trained(model).values():
            weight += 0.1 * torch.randn_like(weight)
    save_model(model, tmp_path / "model", tmp_path, "float32", *methods_of(candidate))
    [source], [target] = rows_of(6), rows_of(4)
    one = {"input_ids": source[None], "labels": target[None]}
    torch.manual_seed(0)
    base = AutoModelForSeq2SeqLM.from_config(CONFIGS[kind]).eval()
    served = served_model.with_adapters(base, adapters.directories(tmp_path / "model")).eval()
    with torch.no_grad():
        assert torch.equal(served(**one).logits, model(**one).logits)
