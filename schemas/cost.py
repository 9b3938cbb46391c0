"""What the cost stage says of each candidate, before anything is trained."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Cost(BaseModel):
    """One candidate. What is not trained has no figures of a training.

    Sizes are MiB, FLOPs those of a real token; padding is in them and not counted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    trainable_parameters: int
    trainable_share: float
    shipped_mib: float | None = Field(description="None: what stands before a prompt, rows.")
    training_mib: dict[str, float] | None = Field(
        None,
        description="The peak by what holds it: weights, gradients, optimiser, method (what it "
        "keeps beside), activations, rest; and their total.",
    )
    inference_mib: float
    forward_flops_per_token: float | None = None
    backward_flops_per_token: float | None = None
    step_flops: float = Field(0.0, description="Once an optimiser step: a method's own penalty.")
    steps: int | None = Field(None, description="None: the rows are not prepared yet.")
    tokens: int | None = None
    gradient_checkpointing: bool = False

    @property
    def trains(self) -> bool:
        return self.training_mib is not None

    @property
    def flops_per_token(self) -> float:
        return (self.forward_flops_per_token or 0.0) + (self.backward_flops_per_token or 0.0)

    @property
    def flops(self) -> float | None:
        """Of the whole run; None where its rows are not known."""
        if self.tokens is None or self.steps is None:
            return None
        return self.flops_per_token * self.tokens + self.step_flops * self.steps


class CostReport(BaseModel):
    """plan.json. candidates: by label."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    total_parameters: int
    candidates: dict[str, Cost]
