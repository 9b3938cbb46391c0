"""A tiny Llama that counts upwards to its end token, its prepared rows, and a finished entry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from schemas.stages import TurboSpec
from schemas.turbo import Turbo
from tasks.core.tokens import TokenRows

#: Tokens of the vocabulary, numbers that are counted from FIRST to LAST, the end behind them.
VOCABULARY, FIRST, LAST, END = 512, 3, 90, 2
CONTEXT, NEW_TOKENS = 48, 16


@dataclass(frozen=True)
class World:
    """Paths of the turbo stage."""

    paths: dict[str, Path]

    @property
    def rows(self) -> TokenRows:
        return TokenRows.load(self.paths["prepared"] / "tokens" / "train.safetensors")

    def model(self) -> Any:
        return LlamaForCausalLM.from_pretrained(self.paths["base"], dtype=torch.float32).eval()

    def spec(self, **turbo: Any) -> TurboSpec:
        """Few prompts, and rates at which a few epochs are enough."""
        settings = {"heads": 3, "prompts": 150, "epochs": 10, "batch_tokens": 128, **turbo}
        settings = {"learning_rate": 1e-2, **settings}
        return TurboSpec(
            task="causal-lm",
            turbo=Turbo(**settings),
            max_new_tokens=NEW_TOKENS,
            dtype="float32",
        )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products over several threads are mostly waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<bos>": 1, "<eos>": END}
    words |= {f"n{number}": number for number in range(FIRST, VOCABULARY)}
    whole = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def counting_rows(count: int = 300) -> TokenRows:
    """From a random number to the last one, at most 20, and the end."""
    draw = np.random.default_rng(0)
    rows, starts = [], []
    for _ in range(count):
        start = int(draw.integers(FIRST, LAST - 2))
        upwards = list(range(start, min(start + 24, LAST)))
        rows.append(upwards + ([END] if upwards[-1] == LAST - 1 else []))
        starts.append(int(draw.integers(1, min(5, len(upwards)))))
    lengths = [len(row) for row in rows]
    return TokenRows(
        input_ids=np.concatenate(rows).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        source_rows=np.arange(count) + 1,
        loss_mask=np.ones(sum(lengths), dtype=np.uint8),
        answer_start=np.array(starts, dtype=np.int64),
    )


def teach(model: Any, rows: TokenRows) -> None:
    """Until it counts: about two seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = np.random.default_rng(1)
    for _ in range(150):
        chosen = [rows.row(int(index)) for index in draw.integers(0, len(rows), 16)]
        longest = max(map(len, chosen))
        ids_BT = torch.zeros((len(chosen), longest), dtype=torch.long)
        labels_BT = torch.full_like(ids_BT, -100)
        for at, row in enumerate(chosen):
            ids_BT[at, : len(row)] = labels_BT[at, : len(row)] = torch.from_numpy(row.copy())
        model(input_ids=ids_BT, labels=labels_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("turbo")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=END,
        pad_token_id=0,
    )
    rows = counting_rows()
    (root / "prepared" / "tokens").mkdir(parents=True)
    rows.save(root / "prepared" / "tokens" / "train.safetensors")
    model = LlamaForCausalLM(config)
    teach(model, rows)
    model.save_pretrained(root / "base")
    model.save_pretrained(root / "finished" / "model")
    tokenizer().save_pretrained(root / "base")
    paths = {name: root / name for name in ("base", "prepared")}
    return World({**paths, "subject": root / "finished"})
