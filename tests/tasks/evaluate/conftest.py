"""Tiny random models with prepared rows and trained entries, made offline in a second.

The causal base is a two-layer Llama over bytes, the classifier a two-layer BERT.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from schemas.candidates import Lora
from schemas.recipe import Evaluate, Train
from schemas.report import CurvePoint
from schemas.stages import Call, EvaluateSpec
from tasks.core.models import load_base
from tasks.core.store import Store
from tasks.core.tokens import TokenRows
from tasks.methods.table import method_for, methods_of
from tasks.train.output import save_model

LABELS = ["apple", "banana", "cherry"]
CONTEXT = 96


@dataclass(frozen=True)
class World:
    """A base, its prepared rows, and the spec and paths of its evaluation."""

    spec: EvaluateSpec
    paths: dict[str, Path]

    @property
    def test_rows(self) -> TokenRows:
        return TokenRows.load(self.paths["prepared"] / "tokens" / "test.safetensors")

    def of(self, subject: str, entry: Path, **changes: Any) -> World:
        spec = self.spec.model_copy(update={"subject": subject, **changes})
        return World(spec, self.paths | {"subject": entry})


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token, after <pad>, <bos>, <eos>."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<bos>", "<eos>"])}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """input_ids, offsets and source_rows of token lists."""
    lengths = [len(row) for row in rows]
    return (
        np.array([token for row in rows for token in row], dtype=np.int32),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.arange(1, len(rows) + 1, dtype=np.int64),
    )


def causal_rows(tokenizer: Any, texts: list[tuple[str, str]]) -> TokenRows:
    rows, masks, starts = [], [], []
    for prompt, answer in texts:
        before = [tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]
        after = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        rows.append(before + after)
        masks += [0] * len(before) + [1] * len(after)
        starts.append(len(before))
    return TokenRows(
        *flat(rows),
        loss_mask=np.array(masks, dtype=np.uint8),
        answer_start=np.array(starts, dtype=np.int64),
    )


def write_prepared(
    directory: Path, train: TokenRows, test: TokenRows, texts: list[dict[str, Any]]
) -> None:
    (directory / "tokens").mkdir(parents=True)
    train.save(directory / "tokens" / "train.safetensors")
    test.save(directory / "tokens" / "test.safetensors")
    lines = [json.dumps({"row": row, **text}) for row, text in enumerate(texts, start=1)]
    (directory / "test_rows.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on more threads, and far slower where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def causal(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Prompts of many lengths with JSON answers, and general text to retain."""
    root = tmp_path_factory.mktemp("causal")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,  # a wide draw, so that the greedy token is a clear choice
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    texts = [("a" * (1 + 3 * n) + "?", json.dumps({"n": n, "odd": n % 2 == 1})) for n in range(14)]
    rows = causal_rows(tokenizer, texts)
    answers = [{"prompt": prompt, "answer": answer} for prompt, answer in texts]
    write_prepared(root / "prepared", rows, rows, answers)
    general = [tokenizer(f"the {n} brown foxes")["input_ids"] for n in range(5)]
    mask = [int(place > 0) for row in general for place in range(len(row))]
    TokenRows(*flat(general), loss_mask=np.array(mask, dtype=np.uint8)).save(
        root / "prepared" / "tokens" / "retention.safetensors"
    )
    return World(spec_for("causal-lm"), {"base": root / "base", "prepared": root / "prepared"})


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Texts of many lengths with one of three labels."""
    root = tmp_path_factory.mktemp("classes")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        num_labels=len(LABELS),
        pad_token_id=tokenizer.pad_token_id,
    )
    BertForSequenceClassification(config).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    texts = [(LABELS[n % 3][: 1 + n % 6] * (1 + n % 4), n % 3) for n in range(40)]
    rows = TokenRows(
        *flat([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]] for text, _ in texts]),
        labels=np.array([label for _, label in texts], dtype=np.int64),
    )
    lines = [{"prompt": text, "label": LABELS[label]} for text, label in texts]
    write_prepared(root / "prepared", rows, rows, lines)
    (root / "prepared" / "labels.json").write_text(json.dumps(LABELS))
    spec = spec_for("sequence-classification")
    return World(spec, {"base": root / "base", "prepared": root / "prepared"})


def spec_for(task: str) -> EvaluateSpec:
    return EvaluateSpec(
        task=task,
        subject="base",
        evaluate=Evaluate(
            max_new_tokens=12, batch_sizes=[1, 3], prompt_tokens=[16, 8], repeats=3, bootstrap=100
        ),
        train=Train(batch_tokens=256),
        dtype="float32",
    )


def train_entry(world: World, store: Path, candidate: Any, steps: int = 3) -> Path:
    """A train entry as the train stage leaves it: a few plain steps, saved, sealed, with facts."""
    call = Call(
        stage="train",
        stage_version=1,
        format="peft-adapter",
        spec={"candidate": candidate.model_dump(mode="json"), "task": world.spec.task},
        paths={},
    )

    def run(out: Path) -> dict[str, Any]:
        torch.manual_seed(1)
        labels = LABELS if world.spec.task != "causal-lm" else None
        base = load_base(world.paths["base"], world.spec.task, labels, "float32")
        model = method_for(candidate.method, world.spec.task).build(
            base, candidate, world.spec.task
        )
        learned = [weight for weight in model.parameters() if weight.requires_grad]
        with torch.no_grad():
            for weight in learned:
                weight += 0.05 * torch.randn_like(weight)
        base = world.paths["base"]
        save_model(model, out / "model", base, "float32", *methods_of(candidate))
        curve = [
            CurvePoint(
                step=step,
                epoch=step,
                loss=1.0,
                learning_rate=1e-3,
                grad_norm=1.0,
                tokens=200 * step,
                step_time_s=0.5,
            ).model_dump()
            for step in range(1, steps + 1)
        ]
        (out / "curve.json").write_text(json.dumps(curve))
        return {
            "trainable_parameters": sum(weight.numel() for weight in learned),
            "train_peak_mib": 12.5,
            "train_weights_mib": 8.0,
            "train_gradients_mib": 1.0,
            "train_optimiser_mib": 2.0,
            "train_activations_mib": 2.0,
            "train_rest_mib": -0.5,
            "train_flops_per_token": 7e6,
            "format": "peft-adapter" if candidate.method == "lora" else "transformers",
        }

    return Store(store).make(call, run).path


@pytest.fixture(scope="session")
def causal_lora(causal: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    store = tmp_path_factory.mktemp("causal-store")
    candidate = Lora(method="lora", rank=4, alpha=8)
    return causal.of("candidate", train_entry(causal, store, candidate))


@pytest.fixture(scope="session")
def classes_lora(classes: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    store = tmp_path_factory.mktemp("classes-store")
    candidate = Lora(method="lora", rank=4, alpha=8)
    return classes.of("candidate", train_entry(classes, store, candidate))


@pytest.fixture(scope="session")
def trained() -> Callable[[World, Path, Any], Path]:
    """`trained(world, store, candidate)` makes a train entry."""
    return train_entry
