"""A run killed at any moment, also while saving, ends in the bytes of one never killed.

The children are real `run` calls, killed with SIGKILL. One server process imports the
libraries once and forks a child for each attempt, which saves 4 seconds an attempt.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from schemas.stages import TrainSpec
from tasks.core.tokens import TokenRows
from tasks.train.stage import run

#: Each task has the same loop, so one of them is killed more often than the others.
KILLS = {"causal-lm": 20, "seq2seq": 6, "image-classification": 6}

SERVER = """
import os, sys
from pathlib import Path
import tasks.train.stage
from schemas.stages import TrainSpec
print("ready", flush=True)
for line in sys.stdin:
    spec, prepared, base, out = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        os.environ["PEFTFLOW_EVENTS"] = "1"
        sys.stdout = open(os.devnull, "w")
        paths = {"prepared": Path(prepared), "base": Path(base)}
        tasks.train.stage.run(TrainSpec.model_validate_json(spec), paths, Path(out))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random Llama, and rows that count upwards from random starts."""
    root = tmp_path_factory.mktemp("resume")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,  # A block of QLoRA's.
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(root / "base")
    draw = np.random.default_rng(0)
    lengths = draw.integers(8, 32, 200)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    (root / "prepared" / "tokens").mkdir(parents=True)
    TokenRows(
        input_ids=np.concatenate(
            [draw.integers(3, 90) + np.arange(length) for length in lengths]
        ).astype(np.int32),
        offsets=offsets,
        source_rows=np.arange(200) + 1,
        loss_mask=np.ones(offsets[-1], dtype=np.uint8),
        answer_start=np.zeros(200, dtype=np.int64),
    ).save(root / "prepared" / "tokens" / "train.safetensors")
    return {"prepared": root / "prepared", "base": root / "base"}


@pytest.fixture(scope="module")
def image_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random ViT, and noise with labels."""
    root = tmp_path_factory.mktemp("images")
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    ViTForImageClassification(config).save_pretrained(root / "base")
    (root / "prepared" / "tokens").mkdir(parents=True)
    TokenRows(
        input_ids=np.zeros(60 * 17, dtype=np.int32),
        offsets=np.arange(61) * 17,
        source_rows=np.arange(60) + 1,
        labels=np.arange(60) % 2,
        values=np.tile(np.linspace(-1, 1, 256, dtype=np.float32), (3, 1)),
        pixels=np.random.default_rng(0).integers(0, 256, (60, 3, 16, 16), dtype=np.uint8),
    ).save(root / "prepared" / "tokens" / "train.safetensors")
    (root / "prepared" / "labels.json").write_text('["a", "b"]')
    return {"prepared": root / "prepared", "base": root / "base"}


@pytest.fixture(scope="module")
def pair_paths(paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random T5, and the same rows, of which the last third is to be written."""
    root = tmp_path_factory.mktemp("pairs")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=128, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(root / "base")
    (root / "prepared" / "tokens").mkdir(parents=True)
    rows = TokenRows.load(paths["prepared"] / "tokens" / "train.safetensors")
    sources = 2 * rows.lengths // 3
    place = np.arange(rows.offsets[-1]) - np.repeat(rows.offsets[:-1], rows.lengths)
    learned = (place >= np.repeat(sources, rows.lengths)).astype(np.uint8)
    replace(rows, answer_start=sources, loss_mask=learned).save(
        root / "prepared" / "tokens" / "train.safetensors"
    )
    return {"prepared": root / "prepared", "base": root / "base"}


@pytest.fixture(scope="module")
def places(
    paths: dict[str, Path], pair_paths: dict[str, Path], image_paths: dict[str, Path]
) -> dict[str, dict[str, Path]]:
    return {"causal-lm": paths, "seq2seq": pair_paths, "image-classification": image_paths}


def make_spec(steps: int, task: str = "causal-lm", **candidate: object) -> TrainSpec:
    """A checkpoint after every step."""
    return TrainSpec.model_validate(
        {
            "task": task,
            "candidate": {"method": "lora", "rank": 4, **candidate},
            "train": {
                "max_steps": steps,
                "batch_tokens": 256,
                "learning_rate": 1e-2,
                "checkpoint_every_s": 0,
                "warmup_ratio": 0.1,
            },
            "dtype": "float32",
        }
    )


def model_bytes(out: Path) -> dict[str, bytes]:
    files = sorted(path for path in (out / "model").rglob("*") if path.is_file())
    assert files
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def is_saving(scratch: Path) -> bool:
    """Whether a file of a checkpoint that is not whole yet is there now."""
    try:
        return any(scratch.glob(".unfinished-*/*"))
    except FileNotFoundError:
        # It was finished, or a new attempt cleared it away, while it was looked at.
        return False


class Attempts:
    """Runs of one spec in one directory, each in a child that can be killed."""

    def __init__(self, server: subprocess.Popen[str], call: str) -> None:
        self.server, self.call = server, call

    def start(self) -> int:
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.write(self.call + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait(self) -> int:
        assert self.server.stdout
        return int(self.server.stdout.readline())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Runs within this process: tiny products over several threads are mostly waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "2"},
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("task", KILLS)
def test_killed_at_many_moments_ends_in_the_same_bytes(tmp_path, places, server, task):
    paths, kills = places[task], KILLS[task]
    spec = make_spec(steps=400 if task == "causal-lm" else 150, task=task)

    def call(out: Path) -> Attempts:
        out.mkdir()
        words = [spec.model_dump_json(), str(paths["prepared"]), str(paths["base"]), str(out)]
        return Attempts(server, "\t".join(words))

    whole = call(tmp_path / "whole")
    whole.start()
    assert whole.wait() == 0

    killed = call(tmp_path / "killed")
    scratch = tmp_path / "killed" / "scratch"
    draw = random.Random(0)
    while_saving = 0
    for number in range(kills):
        child = killed.start()
        if number % 2 == 0:
            time.sleep(draw.uniform(0.0, 0.4))
        else:
            # Wait for a save to begin and kill in the middle of it.
            deadline = time.monotonic() + 20
            while not is_saving(scratch) and time.monotonic() < deadline:
                time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL, "the run ended before it was killed"
        while_saving += any(scratch.glob(".unfinished-*"))
    assert while_saving >= kills // 4
    killed.start()
    assert killed.wait() == 0
    assert model_bytes(tmp_path / "killed") == model_bytes(tmp_path / "whole")


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "hashes.json"])
def test_a_damaged_checkpoint_is_passed_over_aloud(tmp_path, paths, capfd, name):
    """With dropout, so that going on needs the random state as well."""
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    spec = make_spec(steps=6, dropout=0.1)
    run(spec, paths, whole)
    run(spec, paths, damaged)
    newest = max((damaged / "scratch").glob("checkpoint-*")) / name
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    capfd.readouterr()
    facts = run(spec, paths, damaged)
    assert "is damaged" in capfd.readouterr().err
    assert facts["resumed_from_step"] == 4  # 5 is damaged; there is none for the last step, 6
    assert model_bytes(damaged) == model_bytes(whole)


@pytest.mark.parametrize(
    "candidate",
    [
        {"method": "full"},
        {"method": "qlora", "rank": 4},
        {"method": "lora", "rank": 4, "init": "pissa"},
        {"method": "lora", "rank": 4, "init": "olora"},
        # Steps 2 to 4 give ranks away, and 5 and 6 have the last ones.
        {"method": "adalora", "rank": 2, "initial_rank": 5, "warmup": 0.2, "final": 0.34},
        # Still giving them away when it is killed.
        {"method": "adalora", "rank": 2, "initial_rank": 5, "warmup": 0, "final": 0},
        # The courses of two parts, and what one of them wraps of the other.
        {
            "method": "together",
            "of": [
                {"method": "lora", "rank": 4, "init": "pissa", "b_rate": 4},
                {"method": "bottleneck", "reduction_factor": 4},
                {"method": "prefix_tuning", "virtual_tokens": 3},
            ],
        },
    ],
    ids=["full", "qlora", "pissa", "olora", "adalora-final", "adalora", "together"],
)
@pytest.mark.parametrize("lost", [0, 1])
def test_every_kind_of_state_resumes_in_the_same_bytes(tmp_path, paths, candidate, lost):
    """From the last checkpoint, and from the one before it: a method's own state is in both."""
    spec = TrainSpec.model_validate(make_spec(steps=6).model_dump() | {"candidate": candidate})
    run(spec, paths, tmp_path)
    first = model_bytes(tmp_path)
    if lost:
        shutil.rmtree(max((tmp_path / "scratch").glob("checkpoint-*")))
    assert run(spec, paths, tmp_path)["resumed_from_step"] == 5 - lost
    assert model_bytes(tmp_path) == first


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_a_prompt_before_pairs_resumes_in_the_same_bytes(tmp_path, pair_paths, method):
    candidate = {"method": method, "virtual_tokens": 3}
    spec = make_spec(steps=6, task="seq2seq").model_dump() | {"candidate": candidate}
    spec = TrainSpec.model_validate(spec)
    run(spec, pair_paths, tmp_path)
    first = model_bytes(tmp_path)
    assert run(spec, pair_paths, tmp_path)["resumed_from_step"] == 5
    assert model_bytes(tmp_path) == first


def test_images_of_which_a_pixel_has_changed_are_trained_on_anew(tmp_path, image_paths):
    spec = make_spec(steps=6, task="image-classification")
    run(spec, image_paths, tmp_path)
    assert run(spec, image_paths, tmp_path)["resumed_from_step"] == 5
    file = image_paths["prepared"] / "tokens" / "train.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 255
    file.write_bytes(content)
    assert run(spec, image_paths, tmp_path)["resumed_from_step"] == 0


def test_a_checkpoint_of_another_spec_is_not_used(tmp_path, paths, capfd):
    run(make_spec(steps=4), paths, tmp_path)
    facts = run(make_spec(steps=4, alpha=8), paths, tmp_path)
    assert facts["resumed_from_step"] == 0
    assert "another run" in capfd.readouterr().err
