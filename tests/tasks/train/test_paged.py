"""The paged AdamW of QLoRA on a GPU: torch's up to roundings, and exactly resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from schemas.recipe import Train
from tasks.core.checkpoint import Checkpoints, RunState
from tasks.methods.course import Course
from tasks.train.loop import make_optimizer

#: Above bitsandbytes' smallest paged tensor, 100,000 numbers.
SHAPES = {"matrix": (400, 300), "vector": (300,)}
TRAIN = Train(learning_rate=1e-2, weight_decay=0.1)


def weights_on(device: str) -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=draw).to(device))
        for name, shape in SHAPES.items()
    }


def steps(
    weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, numbers: range
) -> None:
    """Each step's gradients are drawn by its number; rates change, as a schedule's do."""
    for number in numbers:
        draw = torch.Generator().manual_seed(number)
        for group in optimizer.param_groups:
            group["lr"] = TRAIN.learning_rate / (1 + number)
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=draw).to(weight.device)
        optimizer.step()


def check_steps_and_resume(device: str, folder: Path) -> torch.optim.Optimizer:
    """20 steps are torch's, and 10 of them after a checkpoint the same bits. The one resumed."""
    plain, paged = weights_on(device), weights_on(device)
    steps(plain, make_optimizer(plain, TRAIN), range(20))
    optimizer = make_optimizer(paged, TRAIN, paged=True)
    steps(paged, optimizer, range(10))
    course = Course(nn.Module(), None, 20)
    Checkpoints(folder, "one").save(RunState(step=10), paged, optimizer, course)
    steps(paged, optimizer, range(10, 20))
    for name, weight in plain.items():
        # A rounding or two a step, of weights of about 1, and rates up to 1e-2.
        torch.testing.assert_close(paged[name], weight, rtol=0, atol=5e-6)
        assert not torch.equal(weight, weights_on(device)[name])

    again = weights_on(device)
    resumed = make_optimizer(again, TRAIN, paged=True)
    state = Checkpoints(folder, "one").restore(again, resumed, course)
    assert state is not None
    assert state.step == 10
    steps(again, resumed, range(10, 20))
    for name, weight in paged.items():
        assert torch.equal(again[name], weight), name
    return resumed


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_it_learns_as_torchs_does_and_goes_on_where_it_was(tmp_path: Path) -> None:
    check_steps_and_resume("cpu", tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_moments_are_paged_after_a_resume_too(tmp_path: Path) -> None:
    resumed = check_steps_and_resume("cuda", tmp_path)
    [matrix] = [slots for weight, slots in resumed.state.items() if weight.ndim == 2]
    assert matrix["state1"].is_paged
    assert matrix["state2"].is_paged
