"""The stored states: whole or absent, memory-mapped, in order; what a disk damages is found."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.turbo import states
from tasks.turbo.states import States, Texts


def texts(*lengths: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Texts:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    return Texts(
        torch.randn((total, 6), generator=generator).to(dtype),
        torch.arange(total, dtype=torch.int32) + 100 * seed,
        torch.from_numpy(np.cumsum([0, *lengths])),
    )


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    for number, lengths in enumerate([(3, 0, 5), (2,), (4, 1)]):
        states.save(texts(*lengths, seed=number), tmp_path, number)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_texts_come_back_to_the_bit_in_the_order_asked(tmp_path, dtype) -> None:
    parts = [texts(3, 0, 5, dtype=dtype), texts(2, 4, seed=1, dtype=dtype)]
    for number, part in enumerate(parts):
        states.save(part, tmp_path, number)
    whole = States(tmp_path, 2)
    assert whole.lengths.tolist() == [3, 0, 5, 2, 4]
    found = whole.texts(np.array([4, 1, 2, 0]))
    assert found.offsets.tolist() == [0, 4, 4, 9, 12]
    wanted = [parts[1].states_TD[2:], parts[0].states_TD[3:], parts[0].states_TD[:3]]
    assert torch.equal(found.states_TD, torch.cat(wanted))
    assert found.tokens_T.tolist() == [102, 103, 104, 105, 3, 4, 5, 6, 7, 0, 1, 2]


def test_they_are_memory_mapped(stored) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc to look at")
    whole = States(stored, 3)
    assert str(states.shard_path(stored, 1)) in maps.read_text()
    assert len(whole) == 6


def test_a_shard_that_was_not_finished_is_none(tmp_path, monkeypatch) -> None:
    """Killed before it had its name; the next attempt clears what is left of it away."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            states.save(texts(3), tmp_path, 0)
    [left] = tmp_path.iterdir()
    assert not states.is_whole(tmp_path, 0)
    left.rename(tmp_path / ".unfinished-1")  # of another process
    states.save(texts(3), tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["00000.safetensors"]
    assert states.is_whole(tmp_path, 0)


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "other"])
def test_a_damaged_shard_is_told_and_taken_for_absent(stored, how, capfd) -> None:
    path = states.shard_path(stored, 1)
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[-1] ^= 1
    damaged = {"cut": content[:-3], "empty": b"", "other": b"{}" * 20}.get(how, content)
    path.write_bytes(damaged)
    assert [states.is_whole(stored, number) for number in range(4)] == [True, False, True, False]
    assert "00001.safetensors is damaged" in capfd.readouterr().err
    assert not path.exists()


def test_the_threads_that_began_are_remembered(stored, tmp_path_factory) -> None:
    assert states.begun_with(stored) == torch.get_num_threads()
    assert states.begun_with(tmp_path_factory.mktemp("none")) is None


def test_every_text_is_in_one_shard() -> None:
    parts = list(states.shards_of(130, 64))
    assert [(number, part.start, part.stop) for number, part in parts] == [
        (0, 0, 64),
        (1, 64, 128),
        (2, 128, 130),
    ]
