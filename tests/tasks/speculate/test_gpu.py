"""The same loop on a CUDA device: what is written is what generate() writes there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tasks.speculate.decode import Writer
from tasks.speculate.pace import Fixed
from tasks.speculate.parts import parts_of


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_on_a_gpu(make: Any, untaught: Any, name: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = make[name]().cuda()
    parts = parts_of(model)
    prompts = [[1, 2, 3] * 3, [7], [5, 6, 7, 8, 5, 6]]
    expected = [
        model.generate(torch.tensor([prompt], device="cuda"), max_new_tokens=24)[0, len(prompt) :]
        for prompt in prompts
    ]
    for nodes in (1, 16):
        writer = Writer(parts, untaught(parts), lookup=True, pace=Fixed(nodes))
        found, _ = writer.write(prompts, 24)
        assert found == [answer.tolist() for answer in expected]
