"""A small real tokenizer with any chat template, and a run of the whole stage on rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from schemas.report import DataReport
from schemas.stages import PrepareSpec
from tasks.core.tokens import TokenRows
from tasks.prepare.stage import run

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]

CORPUS = [
    "The train to the old town leaves at nine, and the ticket costs 12 euros.",
    "system user assistant\nWhere is my card? I ordered it over a week ago.",
    '{"intent": "cancel", "order": "5512"}',
] * 4


def make_tokenizer(template: str | None, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, chat_template=template
    )


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A directory with a tokenizer, one for each template and EOS."""
    made: dict[Any, Path] = {}

    def make(template: str | None = CHATML, eos: str = "<|im_end|>") -> Path:
        if (template, eos) not in made:
            path = tmp_path_factory.mktemp("base")
            make_tokenizer(template, eos).save_pretrained(path)
            made[template, eos] = path
        return made[template, eos]

    return make


@dataclass(frozen=True)
class Prepared:
    """What a run of the stage left."""

    path: Path
    facts: dict[str, Any]

    @property
    def report(self) -> DataReport:
        return DataReport.model_validate_json((self.path / "data_report.json").read_text())

    @property
    def quarantine(self) -> pl.DataFrame:
        return pl.read_parquet(self.path / "quarantine.parquet")

    def tokens(self, split: str = "train") -> TokenRows:
        return TokenRows.load(self.path / "tokens" / f"{split}.safetensors")

    def rows(self, split: str = "train") -> pl.DataFrame:
        return pl.read_parquet(self.path / "rows" / f"{split}.parquet")

    def reasons(self, split: str = "train") -> dict[int, list[str]]:
        """Line: reasons, of one split's refused rows."""
        found = self.quarantine.filter(pl.col("split") == split)
        return dict(zip(found["line"].to_list(), found["reasons"].to_list(), strict=True))


@pytest.fixture
def prepare(tmp_path: Path, make_base: Callable[..., Path]) -> Callable[..., Prepared]:
    """Run the stage on rows (dicts, or bytes of a whole file)."""

    def go(
        train: Any,
        test: Any = None,
        *,
        base: Path | None = None,
        task: str = "causal-lm",
        suffix: str = ".jsonl",
        retention: Any = None,
        columns: dict[str, str] | None = None,
        **data: Any,
    ) -> Prepared:
        paths = {"base": base or make_base()}
        given: dict[str, Any] = dict(data)
        for name, rows in (("train", train), ("test", test), ("retention", retention)):
            if rows is None:
                continue
            if isinstance(rows, dict):  # a hold-out
                given[name] = rows
                continue
            paths[name] = tmp_path / f"{name}{suffix}"
            content = rows if isinstance(rows, bytes) else lines(rows)
            paths[name].write_bytes(content)
            given[name] = {"path": paths[name].name, "columns": columns or {}}
        spec = PrepareSpec.model_validate({"task": task, "data": given})
        number = len(list(tmp_path.glob("out*")))
        out = tmp_path / f"out{number}"
        out.mkdir()
        return Prepared(out, run(spec, paths, out))

    return go


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)
