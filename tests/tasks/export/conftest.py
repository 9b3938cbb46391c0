"""Packages of versions as `register` lays them out, of small models, made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.core.bases import base_files
from tasks.core.files import sha256_file
from tasks.core.shots import PROMPT
from tasks.export.version import Version
from tasks.speculate.heads import HeadsConfig, TurboHeads

HIDDEN, VOCABULARY = 64, 97

#: What `serving.json` says of all of these.
SERVING = {
    "task": "causal-lm",
    "dtype": "float32",
    "labels": None,
    "base": None,
    "template": "chat",
    "stop_ids": [2, 7],
}


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 96}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **layers, **changes})).eval()


def learn(model: torch.nn.Module) -> Any:
    """Draw what is zero before training, as if it had learned."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            noise = torch.randn(weight.shape, generator=generator)
            weight.data.add_(0.2 * noise if "lora_" in name else 0.05 * noise)
    return model.eval()


def heads_for(model: Any, rank: int = 8, state: int = 0, **changes: Any) -> TurboHeads:
    """Heads that say something else than the model's next token."""
    sizes = {"hidden_size": model.config.hidden_size, "vocab_size": model.config.vocab_size}
    heads = TurboHeads(HeadsConfig(heads=3, rank=rank, state=state, **{**sizes, **changes}))
    generator = torch.Generator().manual_seed(2)
    for weight in (heads.up_KDR, heads.bias_KD):
        weight.data.normal_(std=0.5, generator=generator)
    return heads.requires_grad_(False)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Made:
    """A version, and the very model and heads that its files were written from."""

    version: Version
    model: Any
    heads: TurboHeads


@pytest.fixture
def package(tmp_path: Path) -> Callable[..., Path]:
    """`package(base, **serving)`: an empty one, which names its base as `register` does."""

    def make(base: Path | None = None, **serving: Any) -> Path:
        place = tmp_path / "package"
        (place / "model").mkdir(parents=True)
        described = {
            "model": "models/small",
            "revision": None,
            "path": str(base),
            "sha256": {path.name: sha256_file(path) for path in base_files(base)} if base else {},
        }
        said = {**SERVING, **serving, "base": described if base else None}
        (place / "serving.json").write_text(json.dumps(said))
        return place

    return make


@pytest.fixture
def saved_base(tmp_path: Path) -> Callable[[Any], Path]:
    def save(model: Any) -> Path:
        model.save_pretrained(tmp_path / "base")
        (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
        return tmp_path / "base"

    return save


@pytest.fixture
def made(package: Any, saved_base: Any) -> Callable[..., Made]:
    """`made(kind, …)`: a version that is `whole`, an `adapter`, or its base behind a `prompt`.

    peft: of an adapter. heads: of `heads_for`; rank None for a version without.
    """

    def make(
        kind: str,
        model: Any = None,
        peft: Any = None,
        rank: int | None = 8,
        state: int = 0,
        **serving: Any,
    ) -> Made:
        model = model or llama()
        if kind == "whole":
            place = package(**serving)
            model.save_pretrained(place / "model")
        else:
            base = saved_base(model)
            place = package(base, **serving)
            if kind == "prompt":
                (place / "model" / PROMPT).write_text("{}")
            else:
                targets = ["q_proj", "down_proj", "lm_head"]
                config = peft or LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
                model = learn(get_peft_model(model, config))
                model.save_pretrained(place / "model")
        heads = heads_for(model, rank or 0, state)
        if rank is not None:
            (place / "heads").mkdir()
            heads.save(place / "heads")
        base = None if kind == "whole" else place.parent / "base"
        return Made(Version.open("small/1", place, base), model, heads)

    return make


@pytest.fixture(name="llama")
def llama_fixture() -> Callable[..., LlamaForCausalLM]:
    return llama


@pytest.fixture(name="learn")
def learn_fixture() -> Callable[[torch.nn.Module], Any]:
    return learn


@pytest.fixture(name="heads_for")
def heads_for_fixture() -> Callable[..., TurboHeads]:
    return heads_for
