"""LoRA that starts in the base's own weights, PiSSA and OLoRA, and its way back to a plain LoRA.

    W = R + s B0 A0        trained: R + s B A        shipped: W + s (B A - B0 A0)

B0 A0 is the heaviest part of W (PiSSA, Meng et al. 2024, arXiv:2404.02948: a truncated SVD; OLoRA,
Büyükakyüz 2024, arXiv:2406.01775: a truncated QR), and R stands in W's place while it trains. The
base that a user has is W. So what ships has B, B0 side by side and A, -A0 one above the other: a
LoRA of twice the rank at the same scale, which every loader knows.

In bfloat16 R is rounded, so that the start is the base to one rounding of each weight.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from schemas.candidates import Lora
from tasks.core.adapters import CONFIG, WEIGHTS, own_name
from tasks.core.files import write_atomic
from tasks.methods.course import Course
from tasks.methods.method import trained

#: PEFT's names. A randomised SVD of 16 iterations: a full one takes minutes for a large layer.
PEFT_NAMES: dict[str, str | bool] = {"default": True, "pissa": "pissa_niter_16", "olora": "olora"}


class ResidualCourse(Course):
    """Keeps A0 and B0. They are in every checkpoint: R comes again from the base alone, and the
    same but for rounding on any machine, while the signs in A0 and B0 are free."""

    def __init__(self, model: nn.Module, candidate: Lora, steps: int) -> None:
        super().__init__(model, candidate, steps)
        self.start: dict[str, torch.Tensor] = {}
        if candidate.init != "default":
            self.start = {
                name: weight.detach().clone()
                for name, weight in trained(model).items()
                if ".lora_A." in name or ".lora_B." in name
            }

    def state(self) -> dict[str, torch.Tensor]:
        return self.start

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.start = {name: value.to(self.start[name].device) for name, value in state.items()}

    def export(self, adapter: Path) -> None:
        if not self.start:
            return
        path, settings = adapter / WEIGHTS, adapter / CONFIG
        # clone: what safetensors maps from a file must not be there when the file is written.
        tensors = {name: value.clone() for name, value in load_file(path).items()}
        for full, start in self.start.items():
            name = own_name(full.replace(".default.", "."))
            own = tensors[name]
            start = start.to(own)
            joined = (own, -start) if ".lora_A." in name else (own, start)
            tensors[name] = torch.cat(joined, 0 if ".lora_A." in name else 1).contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
        config = json.loads(settings.read_text())
        write_atomic(settings, json.dumps(doubled(config), indent=2, sort_keys=True) + "\n")


def doubled(config: dict[str, Any]) -> dict[str, Any]:
    """A LoRA's configuration at twice the rank and the same scale."""
    # The scale is alpha / rank, or alpha / sqrt(rank).
    times = math.sqrt(2) if config["use_rslora"] else 2
    return {
        **config,
        "r": 2 * config["r"],
        "lora_alpha": times * config["lora_alpha"],
        "rank_pattern": {name: 2 * rank for name, rank in config["rank_pattern"].items()},
        "init_lora_weights": True,
    }
