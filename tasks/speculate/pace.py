"""How many drafts a pass verifies, so that tokens come fastest: never slower than none.

A pass over N nodes is expected to stand for 1 + the sum of their chances in passes without drafts,
and costs the time that such passes took here. With few rows and a large model a wide pass costs
little more than one token; with many rows, or a small model, it does. Where no width is faster than
no drafts at all, none are made, for longer each time, and then tried again.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from itertools import pairwise

#: Nodes of a pass. Few different ones, so that each is measured soon and compiled once.
WIDTHS = (1, 2, 4, 8, 16, 32, 64)
#: Passes of each width whose times are kept.
KEPT = 7
#: A pass with drafts has to promise so much more a second than one without.
MARGIN = 1.02
#: Passes without drafts after drafts did not pay, at first and at most.
HOLD, LONGEST_HOLD = 8, 512
#: What drafts may cost where they do not pay, as a share of the passes until they are tried again.
WASTE = 0.01
#: Passes without drafts are timed again after so many with: soon, until one is known.
REFRESH, SOON = 256, 4
#: So many of them, one right after the other: between passes with drafts one alone takes longer
#: than it would without any, and drafts would seem to pay that do not.
TOGETHER = 3
#: After so many passes with drafts it is counted what they brought, whatever was expected.
COUNTED = 16
#: Passes without drafts whose time may be lost before that.
LOST = 3
#: What a token more adds to a pass, as a share of it, until two sizes are measured.
PRIOR = 0.01
#: A pass has at most so many times the tokens of the largest that was measured.
LEAP = 4
#: Two measured passes tell a slope where one has so many times the other's tokens.
APART = 1.5
#: Passes whose time drafts may waste of what they have saved before, at most: where they pay for
#: some texts, or for the ends of texts, a bad beginning must not end them for long.
CREDIT = 64
#: What drafts are believed again, at least, when they are tried again.
REVIVED = 0.5
#: Nodes that are drafted at least, where drafts are made.
FEWEST_OFFERED = 4
#: Weight of the last pass in running means.
FORGET = 0.05

#: Rows, rounded up to a power of two, and nodes of each.
Shape = tuple[int, int]


class Times:
    """Seconds that something took, the last few of each shape.

    A shape's first time has a first call's work in it: it serves until there is a second.
    """

    def __init__(self) -> None:
        self.kept: dict[Shape, deque[float]] = {}
        self.fresh: set[Shape] = set()

    def add(self, shape: Shape, seconds: float) -> None:
        if shape not in self.kept:
            self.fresh.add(shape)
            self.kept[shape] = deque(maxlen=KEPT)
        elif shape in self.fresh:
            self.fresh.remove(shape)
            self.kept[shape].clear()
        self.kept[shape].append(seconds)

    def known(self, shape: Shape) -> float | None:
        times = self.kept.get(shape)
        return usual(times) if times else None


class Pace:
    """What is known of passes on this machine. One for a model: it learns across answers."""

    def __init__(self, widest: int = WIDTHS[-1]) -> None:
        """widest: nodes that a pass has at most; 1: never a draft."""
        self.widths = tuple(width for width in WIDTHS if width <= widest)
        self.passes, self.drafts = Times(), Times()
        #: Tokens that answers usually have; None until one has ended.
        self.length: float | None = None
        #: Passes that drafts saved over those they were expected to, for each size.
        self.honesty: dict[int, float] = defaultdict(lambda: 1.0)
        #: Chance of a copied token to be right where the one before it was.
        self.copied = 0.8
        #: Passes without drafts whose time was saved by drafts, for each size.
        self.credit: dict[int, float] = defaultdict(float)
        self.waiting: dict[int, int] = defaultdict(int)
        self.hold: dict[int, int] = {}
        #: Of the last passes with drafts those they stood for, and seconds, for each size.
        self.counted: dict[int, deque[tuple[float, float]]] = defaultdict(
            lambda: deque(maxlen=COUNTED)
        )
        self.since_plain: dict[int, int] = defaultdict(int)
        #: Passes without drafts that are still to be timed.
        self.timing: dict[int, int] = defaultdict(int)
        #: Widths that were taken last, for each size, and nodes that drafts were made for.
        self.chosen: dict[int, deque[int]] = defaultdict(lambda: deque(maxlen=KEPT))
        self.offered: dict[int, int] = defaultdict(lambda: self.widths[-1])
        self.next_offer: dict[int, int] = {}

    def drafting(self, rows: int) -> bool:
        """Whether the next pass of so many rows is worth drafts."""
        size = _size(rows)
        if self.widths[-1] == 1 or not self.passes.kept:
            return False
        if self.waiting[size]:
            self.waiting[size] -= 1
            if not self.waiting[size]:
                # What was drafted badly of one text may be good of the next.
                self.honesty[size] = max(self.honesty[size], REVIVED)
            return False
        if self.timing[size]:
            self.timing[size] -= 1
            return False
        self.since_plain[size] += 1
        plain = size, 1
        settled = plain in self.passes.kept and plain not in self.passes.fresh
        if self.since_plain[size] > (REFRESH if settled else SOON):
            self.since_plain[size] = 0
            self.timing[size] = TOGETHER - 1
            return False
        return True

    def offer(self, rows: int) -> int:
        """Nodes that the next drafts are made for: what is drafted and not verified costs too."""
        size = _size(rows)
        self.offered[size] = self.next_offer.get(size, self.widths[-1])
        return self.offered[size]

    def width(self, rows: int, chances: list[float]) -> int:
        """Nodes of the next pass. chances: of each node, the mean over rows, falling."""
        size = _size(rows)
        drafting = self._drafting(size)
        best, found = self.rate(size, 1, 0.0, 0.0), 1
        plain = best
        most = LEAP * max(at * nodes for at, nodes in self.passes.kept)
        for width in self.widths[1:]:
            if width > len(chances) or size * width > most:
                break
            gain = sum(chances[1:width]) * self.honesty[size]
            rate = self.rate(size, width, gain, drafting)
            if rate > best:
                best, found = rate, width
        if best > plain * MARGIN and self._paid(size, plain):
            self.chosen[size].append(found)
            wide = max(2 * max(self.chosen[size]), FEWEST_OFFERED)
            self.next_offer[size] = min(wide, self.widths[-1])
            return found
        # Fewer drafts cost less: the next try has half as many, and after the fewest all again.
        half = self.offered[size] // 2
        self.next_offer[size] = half if half >= FEWEST_OFFERED else self.widths[-1]
        self.counted[size].clear()
        self.credit[size] -= drafting * plain
        if self.credit[size] >= LOST:
            self.waiting[size], self.hold[size] = HOLD, HOLD
        else:
            self.waiting[size] = max(self.hold.get(size, HOLD), math.ceil(drafting * plain / WASTE))
            self.hold[size] = min(2 * self.waiting[size], LONGEST_HOLD)
        return 1

    def _drafting(self, size: int) -> float:
        """Seconds of drafts for as many nodes as were offered last; 0 until they are measured.

        The first ones compile what they need, and may take many passes: they count as one without
        drafts, or nobody would ask for the second for hundreds of passes."""
        shape = size, self.offered[size]
        own = self.drafts.known(shape) or 0.0
        return min(own, self.cost(size, 1)) if shape in self.drafts.fresh else own

    def _paid(self, size: int, plain: float) -> bool:
        """Whether the passes with drafts that were counted last were worth it."""
        last = self.counted[size]
        stood_for, seconds = (sum(part) for part in zip((0.0, 0.0), *last, strict=True))
        lost = seconds * plain - stood_for
        if len(last) == COUNTED:
            last.clear()
        elif lost < LOST:
            return True
        if lost > 0:
            return False
        self.hold[size] = max(self.hold.get(size, 0) // 2, HOLD)
        return True

    def rate(self, size: int, width: int, gain: float, drafting: float) -> float:
        """Passes without drafts that one of so many nodes stands for, a second."""
        return (1 + gain) / (self.cost(size, width) + drafting)

    def cost(self, size: int, width: int) -> float:
        """Seconds of a pass: as measured, or guessed from passes of other shapes."""
        shape = size, width
        own = self.passes.known(shape)
        if own is None:
            return self._guess(shape)
        if shape in self.passes.fresh and len(self.passes.kept) > 1:
            return min(own, self._guess(shape))
        return own

    def _guess(self, shape: Shape) -> float:
        """What a pass costs goes by its tokens, those of all rows: no less than one with fewer, and
        beyond all that were measured on the line through the last two. Where there are two of as
        many rows, those are asked. Too little, and it is tried and measured; too much, and it
        never would be."""
        tokens = shape[0] * shape[1]
        others = [other for other in self.passes.kept if other != shape]
        same = [other for other in others if other[0] == shape[0]]
        known = sorted(
            (size * width, usual(self.passes.kept[size, width]))
            for size, width in (same if len(same) > 1 else others)
        )
        below = [point for point in known if point[0] <= tokens]
        if not below:
            at, seconds = known[0]
            return seconds * (1 + PRIOR * tokens) / (1 + PRIOR * at)
        at, seconds = below[-1]
        if len(below) < len(known):
            return seconds
        for before, shorter in reversed(below):
            if at >= APART * before:
                return seconds + max(seconds - shorter, 0.0) / (at - before) * (tokens - at)
        return seconds * (1 + PRIOR * tokens) / (1 + PRIOR * at)

    def took(self, rows: int, width: int, seconds: float, drafting: float | None = None) -> None:
        """A pass, and the drafts before it, took so long."""
        size = _size(rows)
        self.passes.add((size, width), seconds)
        if drafting is not None:
            self.drafts.add((size, self.offered[size]), drafting)

    def left(self, written: int, room: int) -> int:
        """Tokens that an answer has still to get, as far as is known: as many as answers usually
        have, and not more than there is room for."""
        usually = room if self.length is None else min(round(self.length), room)
        return max(usually - written, 1)

    def ended(self, written: int) -> None:
        """An answer has so many tokens."""
        before = written if self.length is None else self.length
        self.length = before + FORGET * (written - before)

    def accepted(
        self, width: int, expected: float, before: Sequence[float], after: Sequence[float]
    ) -> None:
        """A pass with drafts, of which so many were expected to be right, the mean over rows.

        before, after: tokens that each row had and has to get, as `left` says it.
        """
        size = _size(len(before))
        took = self.cost(size, width) + self._drafting(size)
        # Of fewer rows no more than of more.
        costs: dict[int, float] = {}
        plain, fewer = self.cost(size, 1), size
        while fewer:
            costs[fewer] = min(self.cost(fewer, 1), costs.get(2 * fewer, plain))
            fewer //= 2
        stood_for = (_without(before, costs) - _without(after, costs)) / plain
        self.counted[size].append((stood_for, took))
        self.credit[size] = min(self.credit[size] + stood_for - took / plain, CREDIT)
        if expected > 0.05:
            ratio = min((stood_for - 1) / expected, 2.0)
            believed = self.honesty[size] + FORGET * (ratio - self.honesty[size])
            self.honesty[size] = min(believed, 1.2)


def _without(left: Sequence[float], costs: dict[int, float]) -> float:
    """Seconds that rows with so many tokens left would take without drafts. A pass over few rows
    often takes as long as one over all: then what brings the last row forward counts, and what
    others gain is waiting for it. costs: of a pass, by rows as a power of two."""
    steps = zip(range(len(left), 0, -1), pairwise([0, *sorted(left)]), strict=True)
    return sum(costs[_size(rows)] * (more - less) for rows, (less, more) in steps)


class Fixed(Pace):
    """Always so many nodes, or as many as there are: for tests and measurements."""

    def __init__(self, nodes: int) -> None:
        super().__init__(nodes)
        self.nodes = nodes

    def drafting(self, rows: int) -> bool:
        return self.nodes > 1

    def width(self, rows: int, chances: list[float]) -> int:
        return min(self.nodes, len(chances))


def usual(times: Iterable[float]) -> float:
    """What a pass takes where nothing else wants the machine: the lower quartile. Others only
    ever add to a time, and a median of few would follow them."""
    ordered = sorted(times)
    return ordered[len(ordered) // 4]


def _size(rows: int) -> int:
    """Rows as the next power of two: what is measured of 13 holds for 16."""
    return 1 << (rows - 1).bit_length()
