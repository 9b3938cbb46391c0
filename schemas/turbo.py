"""What a recipe says of Turbo heads (`tasks/speculate/heads.py`) and how they are distilled."""

from __future__ import annotations

from pydantic import Field

from schemas.frozen import Frozen


class Turbo(Frozen):
    """Heads that draft tokens ahead, trained on what the finished model itself writes."""

    heads: int = Field(7, ge=1, le=16, description="Tokens that are drafted ahead.")
    rank: int | None = Field(
        None,
        ge=1,
        description="Of each head. null: with `state`, what a twentieth of the parameters of "
        "Medusa-1's heads leaves, at most 256.",
    )
    state: int | None = Field(
        None,
        ge=0,
        description="Width of the state that follows the drafted tokens; 0: none, each head "
        "drafts by itself. null: as for rank, at most 512.",
    )
    prompts: int = Field(
        2000, ge=1, description="Train rows whose prompts the model continues, at most."
    )
    sampled: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of the continuations that are sampled; the others are greedy.",
    )
    temperature: float = Field(1.0, gt=0, description="Of the sampled continuations.")
    epochs: float = Field(6, gt=0, description="Over the continuations.")
    learning_rate: float = Field(1e-2, gt=0)
    batch_tokens: int = Field(2048, ge=1, description="Written tokens of an optimiser step.")
    positions: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of these from which the step learns, drawn at random each time.",
    )
    decay: float = Field(0.8, gt=0, le=1, description="Weight of head k in the loss: decay^k.")
    hard: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of the loss that is cross-entropy with the token that was written; the "
        "rest is the divergence from the model's own distribution there.",
    )
    state_dropout: float = Field(
        0.3, ge=0, lt=1, description="Share of the steps that are made without the state."
    )
    store_mib: int = Field(
        4096, ge=1, description="Disk for hidden states, MiB; fewer rows are taken if they exceed."
    )
    checkpoint_every_s: float = Field(60.0, ge=0, description="Seconds; 0: after every step.")
    seed: int = Field(0, ge=0, lt=2**31)
