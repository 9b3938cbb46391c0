"""How many drafts a pass verifies, so that tokens come fastest: never slower than none.

A pass over N nodes is expected to bring 1 + the sum of their chances in tokens, and costs the
time that such passes took here. With few rows and a large model a wide pass costs little more
than one token; with many rows, or a small model, it does. Where no width is faster than no drafts
at all, none are made, for longer each time, and then tried again.
"""

from __future__ import annotations

from collections import defaultdict, deque
from statistics import median

#: Nodes of a pass. Few different ones, so that each is measured soon and compiled once.
WIDTHS = (1, 2, 4, 8, 16, 32, 64)
#: Passes of each width whose times are kept.
KEPT = 7
#: A pass with drafts has to promise so much more a second than one without.
MARGIN = 1.02
#: Passes without drafts after drafts did not pay, at first and at most.
HOLD, LONGEST_HOLD = 8, 512
#: A pass without drafts is timed again after so many with.
REFRESH = 256
#: What a node more adds to a pass, as a share of it, until it is measured.
PRIOR = 0.01
#: Weight of the last pass in running means.
FORGET = 0.05


class Pace:
    """What is known of passes on this machine. One for a model: it learns across answers."""

    def __init__(self, widest: int = WIDTHS[-1]) -> None:
        """widest: nodes that a pass has at most; 1: never a draft."""
        self.widths = tuple(width for width in WIDTHS if width <= widest)
        self.passes: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        self.drafts: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))
        #: Accepted drafts over expected ones.
        self.honesty = 1.0
        #: Chance of a copied token to be right where the one before it was.
        self.copied = 0.8
        self.waiting: dict[int, int] = defaultdict(int)
        self.hold: dict[int, int] = defaultdict(lambda: HOLD)
        self.since_plain: dict[int, int] = defaultdict(lambda: REFRESH - 1)

    def drafting(self, rows: int) -> bool:
        """Whether the next pass of so many rows is worth drafts."""
        size = _size(rows)
        if self.widths[-1] == 1:
            return False
        if self.waiting[size]:
            self.waiting[size] -= 1
            return False
        self.since_plain[size] += 1
        if self.since_plain[size] > REFRESH:
            self.since_plain[size] = 0
            return False
        return True

    def width(self, rows: int, chances: list[float]) -> int:
        """Nodes of the next pass. chances: of each node, the mean over rows, falling."""
        size = _size(rows)
        drafting = median(self.drafts[size]) if self.drafts[size] else 0.0
        best, found = self.rate(size, 1, 0.0, 0.0), 1
        plain = best
        gain = 0.0
        for width in self.widths[1:]:
            if width > len(chances):
                break
            gain = sum(chances[1:width]) * self.honesty
            rate = self.rate(size, width, gain, drafting)
            if rate > best:
                best, found = rate, width
        if best > plain * MARGIN:
            self.hold[size] = HOLD
            return found
        self.waiting[size] = self.hold[size]
        self.hold[size] = min(2 * self.hold[size], LONGEST_HOLD)
        return 1

    def rate(self, size: int, width: int, gain: float, drafting: float) -> float:
        """Tokens a second."""
        return (1 + gain) / (self.cost(size, width) + drafting)

    def cost(self, size: int, width: int) -> float:
        """Seconds of a pass: as measured, or the nearest narrower one and a little a node."""
        own = self.passes.get((size, width))
        if own:
            return median(own)
        known = [at for at in self.widths if self.passes.get((size, at))]
        if not known:
            return 1.0 + PRIOR * size * width
        near = max((at for at in known if at < width), default=min(known))
        share = (1 + PRIOR * size * width) / (1 + PRIOR * size * near)
        return median(self.passes[size, near]) * share

    def took(self, rows: int, width: int, seconds: float, drafting: float | None = None) -> None:
        """A pass, and the drafts before it, took so long."""
        self.passes[_size(rows), width].append(seconds)
        if drafting is not None:
            self.drafts[_size(rows)].append(drafting)

    def accepted(self, expected: float, found: float) -> None:
        """Of so many expected drafts of a pass so many were right."""
        if expected > 0.05:
            ratio = min(found / expected, 2.0)
            self.honesty += FORGET * (ratio - self.honesty)
            self.honesty = min(max(self.honesty, 0.1), 1.2)


def _size(rows: int) -> int:
    """Rows as the next power of two: what is measured of 13 holds for 16."""
    return 1 << (rows - 1).bit_length()
