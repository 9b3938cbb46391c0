"""What heads may cost: a twentieth of Medusa-1's, counted on the file."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open

from schemas.errors import UserError
from schemas.turbo import Turbo
from tasks.speculate.heads import WEIGHTS, HeadsConfig, TurboHeads
from tasks.turbo.sizes import HIGHEST_RANK, SHARE, WIDEST_STATE, sized

widths, vocabularies, counts = st.integers(1, 8192), st.integers(1, 300_000), st.integers(1, 16)


@given(d=widths, vocabulary=vocabularies, heads=counts)
# A state of 8 is within its share here, and would leave the heads no rank.
@example(d=50, vocabulary=20, heads=16)
def test_open_sizes_keep_the_budget_and_fail_only_where_nothing_would(d, vocabulary, heads) -> None:
    least = HeadsConfig(heads, 1, 0, d, vocabulary)
    turbo = Turbo(heads=heads)
    if least.parameters * SHARE > least.medusa_parameters:
        with pytest.raises(UserError, match="base is too small for heads"):
            sized(turbo, d, vocabulary)
        return
    found = sized(turbo, d, vocabulary)
    assert found.parameters * SHARE <= found.medusa_parameters
    assert 1 <= found.rank <= HIGHEST_RANK
    assert 0 <= found.state <= WIDEST_STATE
    # What is left buys no further rank.
    more = HeadsConfig(heads, found.rank + 1, found.state, d, vocabulary)
    assert found.rank == HIGHEST_RANK or more.parameters * SHARE > more.medusa_parameters


@given(
    d=widths,
    vocabulary=vocabularies,
    heads=counts,
    rank=st.none() | st.integers(1, 600),
    state=st.none() | st.integers(0, 1024),
)
def test_given_sizes_are_kept_or_refused(d, vocabulary, heads, rank, state) -> None:
    turbo = Turbo(heads=heads, rank=rank, state=state)
    try:
        found = sized(turbo, d, vocabulary)
    except UserError:
        fewest = HeadsConfig(heads, rank or 1, state or 0, d, vocabulary)
        assert fewest.parameters * SHARE > fewest.medusa_parameters
        return
    assert found.parameters * SHARE <= found.medusa_parameters
    assert rank in (None, found.rank)
    assert state in (None, found.state)


def test_on_the_shape_of_a_model_of_7b() -> None:
    """Vicuna's: 739 M of Medusa-1, as its paper's heads have."""
    found = sized(Turbo(heads=5), 4096, 32000)
    assert found.medusa_parameters == 739_266_560
    assert found.parameters <= 739_266_560 / 20


@pytest.mark.parametrize(("rank", "state"), [(1, 0), (9, 8), (0, 8), (4, 0)])
def test_the_file_holds_as_many_numbers_as_are_told(tmp_path, rank, state) -> None:
    config = HeadsConfig(3, rank, state, 64, 512)
    TurboHeads(config).save(tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert stored == config.parameters
