"""Rank of the heads and width of the state, where the recipe leaves them open.

A twentieth of what Medusa-1's heads would have is what they may cost together
(`HeadsConfig.medusa_parameters`).
"""

from __future__ import annotations

from schemas.errors import UserError
from schemas.turbo import Turbo
from tasks.speculate.heads import HeadsConfig

SHARE = 20
#: Of the budget, for the state, where both are open: docs/log.md has the search.
STATE_SHARE = 0.45
WIDEST_STATE, HIGHEST_RANK = 512, 256


def sized(turbo: Turbo, hidden_size: int, vocab_size: int) -> HeadsConfig:
    """The heads' shape.

    Raises:
        UserError: the heads would have more parameters than a twentieth of Medusa-1's.
    """

    def config(rank: int, state: int) -> HeadsConfig:
        return HeadsConfig(turbo.heads, rank, state, hidden_size, vocab_size)

    budget = config(0, 0).medusa_parameters / SHARE
    state = turbo.state
    if state is None:
        # No more than leaves each head a rank of 1.
        least = budget - config(turbo.rank or 1, 0).parameters
        share = min(budget * STATE_SHARE, least) if turbo.rank is None else least
        fitting = (
            width
            for width in range(WIDEST_STATE, -1, -8)
            if 3 * hidden_size * width + width * width <= share
        )
        state = next(fitting, 0)
    rank = turbo.rank
    if rank is None:
        left = budget - config(0, state).parameters
        rank = min(HIGHEST_RANK, int(left / (2 * hidden_size * turbo.heads)))
    found = config(max(rank, 1), state)
    if found.parameters > budget:
        raise UserError.at(
            "finish.turbo",
            f"{turbo.heads} heads of rank {found.rank} and a state of {state} have "
            f"{found.parameters:,} parameters, and a twentieth of Medusa-1's are {int(budget):,}",
            "leave `rank` and `state` out, or choose smaller ones"
            if config(1, 0).parameters <= budget
            else "leave `turbo` out: this base is too small for heads",
        )
    return found
