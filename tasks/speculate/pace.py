"""How many drafts a pass verifies, so that tokens come fastest: never slower than none.

A pass over N nodes is expected to bring 1 + the sum of their chances in tokens, and costs the
time that such passes took here. With few rows and a large model a wide pass costs little more
than one token; with many rows, or a small model, it does. Where no width is faster than no drafts
at all, none are made, for longer each time, and then tried again.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable

#: Nodes of a pass. Few different ones, so that each is measured soon and compiled once.
WIDTHS = (1, 2, 4, 8, 16, 32, 64)
#: Passes of each width whose times are kept.
KEPT = 7
#: A pass with drafts has to promise so much more a second than one without.
MARGIN = 1.02
#: Passes without drafts after drafts did not pay, at first (of up to four rows) and at most.
HOLD, LONGEST_HOLD = 8, 512
#: A pass without drafts is timed again after so many with.
REFRESH = 256
#: After so many passes with drafts it is counted what they brought, whatever was expected.
COUNTED = 16
#: What a node more adds to a pass, as a share of it, until two widths are measured.
PRIOR = 0.01
#: What drafts are believed again, at least, when they are tried again.
REVIVED = 0.5
#: Nodes that are drafted at least, where drafts are made.
FEWEST_OFFERED = 4
#: Weight of the last pass in running means.
FORGET = 0.05


class Pace:
    """What is known of passes on this machine. One for a model: it learns across answers."""

    def __init__(self, widest: int = WIDTHS[-1]) -> None:
        """widest: nodes that a pass has at most; 1: never a draft."""
        self.widths = tuple(width for width in WIDTHS if width <= widest)
        self.passes: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self.drafts: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        #: Accepted drafts over expected ones.
        self.honesty = 1.0
        #: Chance of a copied token to be right where the one before it was.
        self.copied = 0.8
        #: Widths that were taken, and drafts that were made, once: those times had a first
        #: call's work in them.
        self.begun: set[tuple[int, int]] = set()
        self.begun_drafts: set[tuple[int, int]] = set()
        self.waiting: dict[int, int] = defaultdict(int)
        self.hold: dict[int, int] = {}
        #: Tokens and seconds of the last passes with drafts, for each size.
        self.counted: dict[int, deque[tuple[float, float]]] = defaultdict(
            lambda: deque(maxlen=COUNTED)
        )
        self.since_plain: dict[int, int] = defaultdict(int)
        #: Widths that were taken last, for each size, and nodes that drafts were made for.
        self.chosen: dict[int, deque[int]] = defaultdict(lambda: deque(maxlen=KEPT))
        self.offered: dict[int, int] = defaultdict(lambda: self.widths[-1])
        self.next_offer: dict[int, int] = {}

    def drafting(self, rows: int) -> bool:
        """Whether the next pass of so many rows is worth drafts."""
        size = _size(rows)
        if self.widths[-1] == 1:
            return False
        if not self.passes[size, 1]:
            return False
        if self.waiting[size]:
            self.waiting[size] -= 1
            if not self.waiting[size]:
                # What was drafted badly of one text may be good of the next.
                self.honesty = max(self.honesty, REVIVED)
            return False
        self.since_plain[size] += 1
        if self.since_plain[size] > REFRESH:
            self.since_plain[size] = 0
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
        for width in self.widths[1:]:
            if width > len(chances):
                break
            gain = sum(chances[1:width]) * self.honesty
            rate = self.rate(size, width, gain, drafting)
            if rate > best:
                best, found = rate, width
            if not self.passes[size, width]:
                # Widths are tried one after the other: how a wider one would do is a guess.
                break
        if best > plain * MARGIN and self._paid(size, plain):
            self.chosen[size].append(found)
            wide = max(2 * max(self.chosen[size]), FEWEST_OFFERED)
            self.next_offer[size] = min(wide, self.widths[-1])
            return found
        # Fewer drafts cost less: the next try has half as many, and after the fewest all again.
        half = self.offered[size] // 2
        self.next_offer[size] = half if half >= FEWEST_OFFERED else self.widths[-1]
        self.counted[size].clear()
        self.waiting[size] = self.hold.get(size, _hold(size))
        self.hold[size] = min(2 * self.waiting[size], LONGEST_HOLD)
        return 1

    def _drafting(self, size: int) -> float:
        """Seconds of drafts for as many nodes as were offered last; 0 until they are measured."""
        times = self.drafts[size, self.offered[size]]
        return usual(times) if times else 0.0

    def _paid(self, size: int, plain: float) -> bool:
        """Whether the passes with drafts that were counted last were worth it."""
        last = self.counted[size]
        if len(last) < COUNTED:
            return True
        tokens, seconds = (sum(part) for part in zip(*last, strict=True))
        last.clear()
        if tokens / seconds < plain:
            return False
        self.hold[size] = max(self.hold.get(size, 0) // 2, _hold(size))
        return True

    def rate(self, size: int, width: int, gain: float, drafting: float) -> float:
        """Tokens a second."""
        return (1 + gain) / (self.cost(size, width) + drafting)

    def cost(self, size: int, width: int) -> float:
        """Seconds of a pass: as measured, or on the line through the two widest narrower ones."""
        own = self.passes[size, width]
        if own:
            return usual(own)
        known = [at for at in self.widths if at < width and self.passes[size, at]]
        *narrower, near = known
        last = usual(self.passes[size, near])
        if not narrower:
            return last * (1 + PRIOR * size * width) / (1 + PRIOR * size * near)
        before = usual(self.passes[size, narrower[-1]])
        slope = max(last - before, 0.0) / (near - narrower[-1])
        return last + slope * (width - near)

    def took(self, rows: int, width: int, seconds: float, drafting: float | None = None) -> None:
        """A pass, and the drafts before it, took so long."""
        at = _size(rows), width
        if at in self.begun:
            self.passes[at].append(seconds)
        self.begun.add(at)
        if drafting is not None:
            made = at[0], self.offered[at[0]]
            if made in self.begun_drafts:
                self.drafts[made].append(drafting)
            self.begun_drafts.add(made)

    def accepted(self, rows: int, width: int, expected: float, found: float) -> None:
        """Of so many expected drafts of a pass so many were right, each the mean over rows."""
        size = _size(rows)
        drafting = self._drafting(size)
        if times := self.passes[size, width]:
            self.counted[size].append((1 + found, usual(times) + drafting))
        if expected > 0.05:
            ratio = min(found / expected, 2.0)
            self.honesty += FORGET * (ratio - self.honesty)
            self.honesty = min(self.honesty, 1.2)


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


def _hold(size: int) -> int:
    """Passes until the second try: a try costs drafts for every row, and with many seldom pays."""
    return HOLD * max(1, size // 4)


def _size(rows: int) -> int:
    """Rows as the next power of two: what is measured of 13 holds for 16."""
    return 1 << (rows - 1).bit_length()
