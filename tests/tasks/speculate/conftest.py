"""Models that are small, speak different dialects of attention, and heads that are often right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tasks.speculate.heads import HeadsConfig, TurboHeads
from tasks.speculate.parts import Parts, parts_of

QUICKSTART = Path(__file__).parents[3] / "recipes/quickstart"
NAMES = ("llama", "qwen2", "gpt2", "lora", "quickstart")
VOCABULARY = 96
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Larger than usual: a random model then answers its prompt, not the same to each.
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def quiet(model: Any) -> Any:
    """Without an end of its own: each test says which token ends an answer."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def llama(**changes: Any) -> Any:
    torch.manual_seed(1)
    return quiet(LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})))


def qwen2() -> Any:
    torch.manual_seed(2)
    return quiet(Qwen2ForCausalLM(Qwen2Config(**SHAPE)))


def gpt2(positions: int = 128) -> Any:
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=positions,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=None,
    )
    return quiet(GPT2LMHeadModel(config))


def lora() -> Any:
    base = llama()
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", lora_alpha=8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return quiet(model)


def quickstart(dtype: torch.dtype = torch.float32) -> Any:
    return quiet(AutoModelForCausalLM.from_pretrained(QUICKSTART / "base", dtype=dtype))


MAKERS: dict[str, Callable[..., Any]] = {
    "llama": llama,
    "qwen2": qwen2,
    "gpt2": gpt2,
    "lora": lora,
    "quickstart": quickstart,
}


def repeating(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to 24 tokens, of few different ones, so that pairs of them come again."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator)

    prompts = []
    for _ in range(count):
        few = whole(1, VOCABULARY, 5)
        prompts.append(few[whole(0, 5, int(whole(1, 25)))].tolist())
    return prompts


def chats(count: int) -> list[list[int]]:
    """The quickstart's own questions, as its model reads them."""
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "base")
    with (QUICKSTART / "test.jsonl").open() as lines:
        asked = [json.loads(line)["prompt"] for line, _ in zip(lines, range(count), strict=False)]
    return [
        list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
        )
        for text in asked
    ]


@dataclass(frozen=True)
class Speaker:
    """A model, heads for it, and prompts that it answers."""

    name: str
    model: Any
    parts: Parts
    heads: TurboHeads
    prompts: list[list[int]]

    def batches(self) -> list[list[list[int]]]:
        """The prompts in batches of 1 to 16, in their order."""
        sizes, left, found = [1, 16, 2, 8, 3, 16, 5, 13, 4, 16, 7, 16, 5], list(self.prompts), []
        for size in sizes:
            found.append(left[:size])
            left = left[size:]
        assert not left
        assert all(found)
        return found


def drawn_heads(parts: Parts, heads: int = 4, rank: int = 8, state: int = 8) -> TurboHeads:
    """Heads with weights that nobody trained."""
    vocabulary, width = parts.scored.shape
    made = TurboHeads(HeadsConfig(heads, rank, state, width, vocabulary))
    generator = torch.Generator().manual_seed(7)
    for parameter in made.parameters():
        with torch.no_grad():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


def taught(parts: Parts, prompts: list[list[int]], steps: int = 100) -> TurboHeads:
    """Heads that learned the model's own greedy answers to some prompts."""
    heads, count = drawn_heads(parts), 4
    shortest = min(map(len, prompts[:24]))
    ids_BT = parts.model.generate(
        torch.tensor([prompt[-shortest:] for prompt in prompts[:24]]), max_new_tokens=24
    )
    with torch.no_grad():
        x_BTD = parts.layers(input_ids=ids_BT, use_cache=False)[0]
        tokens_BTD = parts.embed(ids_BT)
    n = ids_BT.shape[1] - count - 1
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    for _ in range(steps):
        x_ND, loss, state_NS = x_BTD[:, :n].flatten(0, 1), torch.tensor(0.0), None
        ahead_KND, begun_NS = heads.ahead(x_ND), heads.begin(x_ND)
        for k in range(count):
            before_ND = tokens_BTD[:, k + 1 : k + 1 + n].flatten(0, 1)
            state_NS = heads.follow(state_NS, heads.read(before_ND), begun_NS)
            logits_NV = parts.lm_head(ahead_KND[k] + heads.correction(state_NS))
            target_N = ids_BT[:, k + 2 : k + 2 + n].flatten()
            loss = loss + torch.nn.functional.cross_entropy(logits_NV, target_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return heads.requires_grad_(False)


@pytest.fixture(scope="session")
def make() -> dict[str, Callable[..., Any]]:
    """Models by name, made anew."""
    return MAKERS


@pytest.fixture(scope="session")
def untaught() -> Callable[..., TurboHeads]:
    return drawn_heads


@pytest.fixture(scope="session", params=NAMES)
def speaker(request: pytest.FixtureRequest) -> Speaker:
    name = request.param
    model = MAKERS[name]()
    parts = parts_of(model)
    prompts = chats(112) if name == "quickstart" else repeating(112, seed=NAMES.index(name))
    return Speaker(name, model, parts, taught(parts, prompts), prompts)


@pytest.fixture(scope="session")
def small() -> Speaker:
    """One of them, where one is enough."""
    model = llama()
    parts = parts_of(model)
    prompts = repeating(112)
    return Speaker("llama", model, parts, taught(parts, prompts), prompts)
