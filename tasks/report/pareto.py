"""The Pareto front, and labels beside points that do not cover each other."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, float]

#: Where a label may stand, best first: plotly's name; shift in label widths, in line heights.
#: A front runs from its points to the right and from there up, so these places keep off it.
LEFT_HALF = (("bottom right", 0.5, -1.0), ("top right", 0.5, 1.0), ("middle right", 0.6, 0.0))
RIGHT_HALF = (("top left", -0.5, 1.0), ("middle left", -0.6, 0.0), ("bottom left", -0.5, -1.0))
#: Where there is no room on the side of the middle.
CENTRE = (("top center", 0.0, 1.0), ("bottom center", 0.0, -1.0))

#: A letter and a line, as shares of a plot of about 330 by 230 pixels.
LETTER, LINE = 0.021, 0.07

#: Half the size of a marker, as a share.
MARKER = 0.02


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


def joined_labels(points: Sequence[Point], labels: Sequence[str]) -> list[str]:
    """Labels with those of points in one place joined at the first of them, and "" at the rest."""
    joined = list(labels)
    for i, point in enumerate(points):
        for j in range(i):
            if joined[j] and max(abs(point[0] - points[j][0]), abs(point[1] - points[j][1])) < 0.01:
                joined[j], joined[i] = f"{joined[j]}, {joined[i]}", ""
                break
    return joined


def label_positions(points: Sequence[Point], labels: Sequence[str]) -> list[str]:
    """Plotly's `textposition` of each label, so that labels keep off each other if they can.

    points: in shares of the plot, 0 to 1.
    """
    markers = [(x, y, MARKER) for x, y in points]
    taken: list[tuple[float, float, float]] = []
    chosen = []
    for i, ((x, y), label) in enumerate(zip(points, labels, strict=True)):
        width = LETTER * len(label) + MARKER
        near, far = (LEFT_HALF, RIGHT_HALF) if x <= 0.5 else (RIGHT_HALF, LEFT_HALF)
        places = (*near, *CENTRE, *far)
        boxes = [(x + right * width, y + up * LINE, width / 2) for _, right, up in places]
        others = [*taken, *markers[:i], *markers[i + 1 :]]
        # The fewest covered, and off the plot is worse than that; of equals the first.
        covered = [sum(_cover(box, one) for one in others) for box in boxes]
        outside = [box[0] - box[2] < 0 or box[0] + box[2] > 1 for box in boxes]
        best = min(range(len(boxes)), key=lambda n: (outside[n] and n >= len(near), covered[n]))
        chosen.append(places[best][0])
        if label:
            taken.append(boxes[best])
    return chosen


def _cover(one: tuple[float, float, float], other: tuple[float, float, float]) -> bool:
    return abs(one[0] - other[0]) < one[2] + other[2] and abs(one[1] - other[1]) < 0.9 * LINE
