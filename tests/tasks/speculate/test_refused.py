"""Models of which drafts cannot be verified are refused, and files that are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tasks.speculate.heads import CONFIG, WEIGHTS, HeadsConfig, HeadsError, TurboHeads
from tasks.speculate.model import TurboModel
from tasks.speculate.pace import Fixed
from tasks.speculate.parts import NotSpeculableError

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}


def made(kind: str, auto: Any = AutoModelForCausalLM, **shape: Any) -> Any:
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(kind, **shape)).float().eval()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: made("bert", AutoModel, **SHAPE), "no lm_head"),
        (lambda: made("bert", **SHAPE), "is an encoder"),
        (
            lambda: made(
                "t5",
                AutoModelForSeq2SeqLM,
                vocab_size=64,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            ),
            "an encoder with a decoder",
        ),
        (lambda: made("mistral", **GROUPED, sliding_window=8), "sliding_window 8"),
        (lambda: made("gemma2", **GROUPED), "sliding_attention"),
        (
            lambda: made(
                "gpt_neo",
                vocab_size=64,
                hidden_size=32,
                num_layers=2,
                num_heads=4,
                attention_types=[[["global", "local"], 1]],
                max_position_embeddings=64,
            ),
            "local",
        ),
        (lambda: made("granite", **GROUPED, logits_scaling=8.0), "more than its lm_head"),
        (
            lambda: made(
                "gemma2",
                **GROUPED,
                layer_types=["full_attention"] * 2,
                # So low that logits of a random model reach it.
                final_logit_softcapping=0.01,
            ),
            "more than its lm_head",
        ),
        (lambda: made("mamba", vocab_size=64, hidden_size=32, num_hidden_layers=2), "state"),
        (
            lambda: made("bloom", vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
            "mask and positions",
        ),
        (
            lambda: made("mpt", vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
            "otherwise than each path",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(model: Any, reason: str) -> None:
    with pytest.raises(NotSpeculableError, match=reason):
        TurboModel(model())


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("mistral", {**GROUPED, "sliding_window": None}),
        ("qwen3", GROUPED),
        ("gemma", GROUPED),
        ("granite", {**GROUPED, "embedding_multiplier": 3.0, "attention_multiplier": 0.3}),
        ("gpt_neox", SHAPE),
        ("gpt2", GPT),
        ("phi", GROUPED),
        ("mixtral", GROUPED),
        ("opt", {**SHAPE, "ffn_dim": 64, "word_embed_proj_dim": 32}),
        ("olmo2", GROUPED),
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_served(kind: str, shape: dict[str, Any], attention: str) -> None:
    """Architectures that nobody listed, with either attention: the same as generate()."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **shape)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    turbo = TurboModel(model, pace=Fixed(8))
    ids = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=40)
    assert torch.equal(turbo.generate(ids, attention_mask=mask, max_new_tokens=40), expected)
    assert turbo.account.tokens_per_pass > 1


@pytest.mark.parametrize(("rank", "hidden"), [(4, 16), (4, 32)])
def test_heads_of_other_widths(make: Any, rank: int, hidden: int) -> None:
    heads = TurboHeads(HeadsConfig(2, rank, 0, hidden, 97))
    with pytest.raises(HeadsError):
        TurboModel(make["llama"](), heads)


def damage_weights(place: Path) -> None:
    path = place / WEIGHTS
    path.write_bytes(path.read_bytes()[:-40])


def change_rank(place: Path) -> None:
    record = json.loads((place / CONFIG).read_text())
    (place / CONFIG).write_text(json.dumps({**record, "rank": 5}))


def change_format(place: Path) -> None:
    record = json.loads((place / CONFIG).read_text())
    (place / CONFIG).write_text(json.dumps({**record, "format": 9}))


def unknown_key(place: Path) -> None:
    record = json.loads((place / CONFIG).read_text())
    (place / CONFIG).write_text(json.dumps({**record, "colour": 1}))


@pytest.mark.parametrize(
    "damage",
    [
        damage_weights,
        change_rank,
        change_format,
        unknown_key,
        lambda place: (place / WEIGHTS).unlink(),
        lambda place: (place / CONFIG).write_text("{"),
        lambda place: (place / CONFIG).unlink(),
    ],
)
def test_damaged_heads(tmp_path: Path, damage: Any) -> None:
    """One error that names the file."""
    TurboHeads(HeadsConfig(2, 4, 3, 16, 20)).save(tmp_path)
    TurboHeads.load(tmp_path)
    damage(tmp_path)
    with pytest.raises(HeadsError, match="turbo_"):
        TurboHeads.load(tmp_path)


def test_from_pretrained(tmp_path: Path, make: Any, untaught: Any) -> None:
    model = make["llama"]()
    model.save_pretrained(tmp_path)
    with pytest.raises(HeadsError, match="holds no heads"):
        TurboModel.from_pretrained(tmp_path)
    untaught(TurboModel(model).writer.parts).save(tmp_path)
    turbo = TurboModel.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(
        turbo.generate(ids, max_new_tokens=12), model.generate(ids, max_new_tokens=12)
    )
