"""The Pareto front, and labels beside points that do not cover each other."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, float]

#: Where a label may stand, best first: (plotly's name, shift right and up in label sizes).
LEFT_HALF = (("middle right", 0.62, 0.0), ("top right", 0.5, 0.9), ("bottom right", 0.5, -0.9))
RIGHT_HALF = (("middle left", -0.62, 0.0), ("top left", -0.5, 0.9), ("bottom left", -0.5, -0.9))


def pareto_front(points: Sequence[Point], *, higher_is_better: bool) -> list[int]:
    """Indices of the points that no other dominates, by rising x.

    Less x is better; y as told. A point is dominated when another is at least as good in both
    and better in one. Of equal points the first stands for all.
    """
    sign = -1.0 if higher_is_better else 1.0
    order = sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1], i))
    front: list[int] = []
    for index in order:
        if not front or sign * points[index][1] < sign * points[front[-1]][1]:
            front.append(index)
    return front


def label_positions(points: Sequence[Point], labels: Sequence[str]) -> list[str]:
    """Plotly's `textposition` of each label, so that labels keep off each other if they can.

    Points are in shares of the plot, 0 to 1. A letter is taken as 1/50 of its width and a line
    as 1/16 of its height: a plot of about 340 by 260 pixels.
    """
    taken: list[tuple[float, float, float]] = [(x, y, 0.02) for x, y in points]
    chosen = []
    for (x, y), label in zip(points, labels, strict=True):
        width = 0.02 * len(label) + 0.02
        places = LEFT_HALF if x <= 0.5 else RIGHT_HALF
        boxes = [(x + right * width, y + up * 0.065, width / 2) for _, right, up in places]
        own = (x, y, 0.02)
        others = [box for box in taken if box != own]
        free = [i for i, box in enumerate(boxes) if not any(_cover(box, other) for other in others)]
        best = free[0] if free else 0
        chosen.append(places[best][0])
        taken.append(boxes[best])
    return chosen


def _cover(one: tuple[float, float, float], other: tuple[float, float, float]) -> bool:
    return abs(one[0] - other[0]) < one[2] + other[2] and abs(one[1] - other[1]) < 0.06
