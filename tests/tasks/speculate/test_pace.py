"""How many drafts, by a clock of our own: a pass costs what a formula says."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

from tasks.speculate.pace import HOLD, LONGEST_HOLD, REFRESH, TOGETHER, WIDTHS, Fixed, Pace

#: Each node is a little less likely than the one before it, and 64 bring twice what 16 do.
CHANCES = [0.97**node for node in range(64)]
FLAT = lambda width: 1.0  # noqa: E731
STEEP = lambda width: float(width)  # noqa: E731
#: As a model of 148 M on a processor in bfloat16: flat to 8 nodes, then in proportion.
KNEE = lambda width: max(1.0, width / 8)  # noqa: E731


def run(
    pace: Pace,
    cost: Callable[[int], float],
    passes: int,
    chances: list[float] = CHANCES,
    honest: float = 1.0,
    drafting: float = 0.01,
    rows: int = 1,
) -> tuple[list[int], float, float]:
    """Widths taken, tokens brought, seconds spent."""
    taken, tokens, seconds = [], 0.0, 0.0
    for _ in range(passes):
        drafts = pace.drafting(rows)
        width = pace.width(rows, chances) if drafts else 1
        right = honest * sum(chances[1:width]) if drafts else 0.0
        pace.took(rows, width, cost(width), drafting if drafts else None)
        if drafts and width > 1:
            left = [1000.0] * rows
            after = [one - 1 - right for one in left]
            pace.accepted(width, sum(chances[1:width]), left, after)
        taken.append(width)
        tokens += 1 + right
        seconds += cost(width) + (drafting if drafts else 0.0)
    return taken, tokens, seconds


def test_flat_passes_are_filled() -> None:
    taken, *_ = run(Pace(), FLAT, 400)
    assert taken[-1] == 64
    assert taken[20:].count(64) > 0.98 * 380


def test_where_a_pass_costs_by_the_node_none_are_drafted() -> None:
    taken, tokens, seconds = run(Pace(), STEEP, 2000)
    assert taken[-1] == 1
    # Against one token a second without drafts: at most 3 % slower, first tries included.
    assert tokens / seconds > 0.97


def test_the_knee_is_found() -> None:
    taken, *_ = run(Pace(), KNEE, 400)
    best = max(WIDTHS, key=lambda width: (1 + sum(CHANCES[1:width])) / KNEE(width))
    assert best == 8
    assert taken[100:].count(best) > 0.9 * 300


@pytest.mark.parametrize("cost", [FLAT, STEEP, KNEE], ids=["flat", "steep", "knee"])
@pytest.mark.parametrize("honest", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("drafting", [0.01, 0.3])
@pytest.mark.parametrize("rows", [1, 16])
def test_never_slower(
    cost: Callable[[int], float], honest: float, drafting: float, rows: int
) -> None:
    """Heads that are never right, passes that cost by the node, drafts that cost a third of a
    pass: over 4000 passes, at most 3 % slower than one token a pass of one second."""
    _, tokens, seconds = run(Pace(), cost, 4000, honest=honest, drafting=drafting, rows=rows)
    assert tokens / seconds > 0.97


def test_the_wait_doubles_and_ends() -> None:
    """After drafts did not pay they are tried again, each time later, but never given up."""
    pace, tries = Pace(), []
    for at in range(6000):
        if pace.drafting(1):
            tries.append(at)
            assert pace.width(1, [1.0, 0.001]) == 1
        pace.took(1, 1, 1.0)
    apart = [later - earlier - 1 for earlier, later in pairwise(tries)]
    assert apart[:3] == [HOLD, 2 * HOLD, 4 * HOLD]
    assert max(apart) <= LONGEST_HOLD + 1
    assert apart[-1] >= LONGEST_HOLD


def test_a_bad_beginning_of_each_text_does_not_end_drafts() -> None:
    """Texts of 64 tokens whose first 8 no head foresees, and all others every head: drafts are
    tried again in each text, as what they saved pays for it."""
    pace, drafted = Pace(), 0
    for _ in range(40):
        run(pace, FLAT, 8, honest=0.0, drafting=0.5)
        taken, *_ = run(pace, FLAT, 10, drafting=0.5)
        drafted += sum(width > 1 for width in taken)
    assert drafted > 0.5 * 40 * 10


def test_it_comes_back_when_drafts_pay_again() -> None:
    pace = Pace()
    run(pace, KNEE, 300, chances=[1.0, *[1e-4] * 63])
    taken, *_ = run(pace, KNEE, 700)
    assert 8 in taken
    assert taken[-1] == 8


def test_plain_passes_are_timed_again() -> None:
    pace = Pace()
    taken, *_ = run(pace, FLAT, 3 * REFRESH)
    assert taken[0] == 1
    # So many in a row, once a REFRESH; the first ones were timed soon.
    assert taken[10:].count(1) == TOGETHER * 2
    assert taken.count(1) == 1 + TOGETHER * 3


def test_a_plain_pass_between_drafts_that_takes_longer_deceives_nobody() -> None:
    """A pass without drafts that comes right after others with them takes twice as long as the ones
    behind it, as does the very first. Drafts that bring 1.5 tokens for 1.8 times the time of a
    plain pass do not pay."""
    pace, chances = Pace(), [1.0, 0.5]
    tokens = seconds = 0.0
    last = 2
    for _ in range(4000):
        drafts = pace.drafting(16)
        width = pace.width(16, chances) if drafts else 1
        took = 1.6 if width > 1 else 2.0 if last > 1 else 1.0
        pace.took(16, width, took, 0.2 if drafts else None)
        if width > 1:
            pace.accepted(width, 0.5, [1000.0] * 16, [998.5] * 16)
        tokens += 1.5 if width > 1 else 1.0
        seconds += took + (0.2 if drafts else 0.0)
        last = width
    assert tokens / seconds > 0.97


def test_what_does_not_bring_the_last_row_forward_is_waited_with() -> None:
    """One row of 16 foresees nothing, and a pass takes as long for one as for 16: all are done when
    that row is. Where a pass costs by its rows, the others' tokens are gained."""
    left, after = [100] * 16, [99, *[96] * 15]
    for cost, gained in ((lambda rows: 1.0, 1.0), (lambda rows: rows / 16, 1 + 3 * 15 / 16)):
        pace = Pace()
        for rows in (1, 2, 4, 8, 16):
            pace.took(rows, 1, cost(rows))
            pace.took(rows, 1, cost(rows))
        pace.took(16, 4, 1.0)
        pace.took(16, 4, 1.0)
        pace.accepted(4, 3.0, left, after)
        assert pace.counted[16][-1][0] == pytest.approx(gained)


def test_a_first_draft_that_compiles_for_long_does_not_end_drafts() -> None:
    pace = Pace()
    passes = []
    for _ in range(60):
        drafts = pace.drafting(1)
        # The first drafts of each number of nodes take as long as 30 passes.
        slow = drafts and (1, pace.offer(1)) not in pace.drafts.kept
        width = pace.width(1, CHANCES) if drafts else 1
        pace.took(1, width, 1.0, (30.0 if slow else 0.01) if drafts else None)
        if width > 1:
            right = sum(CHANCES[1:width])
            pace.accepted(width, right, [100.0], [99.0 - right])
        passes.append(width)
    assert passes[30:].count(64) > 20


def test_what_answers_usually_have_is_what_is_left_of_them() -> None:
    """Answers of 20 tokens where there is room for 200: a row is not behind for the room it has."""
    pace = Pace()
    assert pace.left(5, 200) == 195
    for _ in range(100):
        pace.ended(20)
    assert (pace.left(5, 200), pace.left(5, 12), pace.left(30, 200)) == (15, 7, 1)
    for _ in range(200):
        pace.ended(100)
    assert pace.left(5, 200) == 95


def test_a_pass_costs_by_its_tokens() -> None:
    """What 16 rows have shown holds for one: no plain pass is needed first, and no search."""
    by_tokens = {rows: lambda width, rows=rows: max(1.0, rows * width / 64) for rows in (1, 16)}
    pace = Pace()
    many, *_ = run(pace, by_tokens[16], 50, rows=16)
    assert many[-1] == 4
    one, *_ = run(pace, by_tokens[1], 50, rows=1)
    assert one[0] > 1
    assert one[-1] == 64


def test_a_guess_is_corrected() -> None:
    """Where 16 rows cost as much as one, what is measured of each counts."""
    pace = Pace()
    run(pace, STEEP, 200, rows=16)
    taken, *_ = run(pace, FLAT, 400, rows=1)
    assert taken[-1] == 64


def test_nothing_to_draft() -> None:
    pace = Pace(1)
    assert not any(pace.drafting(1) for _ in range(50))


def test_heads_that_promise_too_much_are_believed_less() -> None:
    pace = Pace()
    run(pace, FLAT, 100, honest=0.3)
    assert pace.honesty[1] == pytest.approx(0.3, abs=0.05)
    run(pace, FLAT, 200, honest=1.0)
    assert pace.honesty[1] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("nodes", WIDTHS)
def test_fixed(nodes: int) -> None:
    pace = Fixed(nodes)
    assert pace.drafting(4) == (nodes > 1)
    assert pace.width(4, CHANCES) == nodes
    assert pace.width(4, CHANCES[:3]) == min(3, nodes)
