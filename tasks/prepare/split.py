"""One split: which lines of a source belong to it, and why some of them are not kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from schemas.errors import UserError
from schemas.rows import REASONS
from tasks.prepare.blocks import Refused
from tasks.prepare.ingest import Ingested
from tasks.prepare.same import Digests, equal_in, first_equal


@dataclass
class Split:
    """name: train, test or retention. members: its rows among the source's typed rows, [N].

    refused: lines that never became rows. reasons: index of a typed row, why it is refused.
    """

    name: str
    ingested: Ingested
    members: NDArray[np.bool_]
    refused: list[Refused]
    reasons: dict[int, list[str]] = field(default_factory=dict)

    @property
    def rows_in(self) -> int:
        return int(self.members.sum()) + len(self.refused)

    @property
    def kept(self) -> NDArray[np.bool_]:
        """The rows that nothing speaks against, a mask over the source's typed rows."""
        kept = self.members.copy()
        kept[list(self.reasons)] = False
        return kept

    def refuse(self, index: int, reason: str) -> None:
        self.reasons.setdefault(index, []).append(reason)

    def refuse_duplicates(self) -> None:
        """Refuse each row that equals an earlier one of the split."""
        places = np.flatnonzero(self.members)
        first = first_equal(self.ingested.digests[places])
        lines = self.ingested.lines[places]
        for place in np.flatnonzero(first != np.arange(len(places))):
            self.refuse(int(places[place]), f"duplicate_of:{lines[first[place]]}")

    def refuse_leaks(self, test: Split) -> None:
        """Refuse each row that stands in the test split, also where the test split refused it."""
        places = np.flatnonzero(self.members)
        found = equal_in(self.ingested.digests[places], test.member_digests)
        lines = test.ingested.lines[test.members]
        for place in np.flatnonzero(found >= 0):
            self.refuse(int(places[place]), f"leaks_into_test:{lines[found[place]]}")

    @property
    def member_digests(self) -> Digests:
        return self.ingested.digests[self.members]

    def refused_by_reason(self) -> dict[str, int]:
        """First reason of a row (its code): rows. The most frequent first."""
        lists = [line.reasons for line in self.refused] + list(self.reasons.values())
        counts = Counter(reasons[0].split(":")[0] for reasons in lists)
        return dict(counts.most_common())

    def all_refused(self) -> Iterator[Refused]:
        """Every refused line, in file order."""
        source = self.ingested
        rows = [
            Refused(
                int(source.lines[index]),
                int(source.offsets[index]),
                int(source.lengths[index]),
                reasons,
            )
            for index, reasons in self.reasons.items()
        ]
        yield from sorted([*self.refused, *rows], key=lambda line: line.line)

    def require_rows(self) -> None:
        """Raise a UserError where nothing is left."""
        if self.kept.any():
            return
        if not self.rows_in:
            found, fix = "no row", "give a file with at least one row"
        else:
            counts = ", ".join(
                f"{count} {reason} ({REASONS[reason]})"
                for reason, count in self.refused_by_reason().items()
            )
            first = next(self.all_refused())
            found = f"all {self.rows_in} rows are refused: {counts}"
            fix = f"see line {first.line}: {', '.join(first.reasons)}"
        raise UserError.at(f"{self.ingested.source.name} (data.{self.name})", found, fix)
