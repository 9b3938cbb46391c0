"""Where two texts of one bfloat16 model part, and whether it was a near tie there.

A near tie: the two likeliest tokens are, in float32, no further apart than twice the noise, which
is the most that a logit in bfloat16 is away from the same weights' in float32.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Partings:
    """texts: compared. gaps: between the two likeliest tokens where a text first parts, in
    float32. noise: of a logit in bfloat16."""

    texts: int
    gaps: list[float]
    noise: float

    @property
    def rate(self) -> float:
        return len(self.gaps) / self.texts

    @property
    def widest(self) -> float:
        """The widest gap to what a near tie may have: at most 1 where all are near ties."""
        return max(self.gaps, default=0.0) / (2 * self.noise)


@torch.inference_mode()
def partings(
    model: Any, prompts: list[list[int]], own: list[list[int]], reference: list[list[int]]
) -> Partings:
    """Answers of a bfloat16 model beside those that it should have given to the same prompts."""
    whole = copy.deepcopy(model).float()
    noise, gaps = 0.0, []
    for prompt, mine, other in zip(prompts, own, reference, strict=True):
        text_1T = torch.tensor([[*prompt, *other]])
        logits_TV = whole(text_1T).logits[0]
        noise = max(noise, float((model(text_1T).logits[0] - logits_TV).abs().max()))
        if mine != other:
            # Of two answers one of which ends where the other goes on, the first one missing.
            pairs = enumerate(zip(mine, other, strict=False))
            first = next((at for at, (a, b) in pairs if a != b), min(len(mine), len(other)))
            best = logits_TV[len(prompt) + first - 1].topk(2).values
            gaps.append(float(best[0] - best[1]))
    return Partings(len(prompts), gaps, noise)
