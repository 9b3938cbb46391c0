"""Promotion: which version is `champion`, decided under one lock and written down.

MLflow's aliases have no compare-and-swap: promoters that read, judge and set at the same time all
believe that they have won. Here reading, judging and setting happen under the ledger's lock.
"""

from __future__ import annotations

import getpass
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from schemas.errors import StageError, UserError
from schemas.report import GateVerdict, LedgerEntry
from tasks.register import registry
from tasks.register.gate import judge
from tasks.register.ledger import Ledger

if TYPE_CHECKING:
    from mlflow import MlflowClient

#: `expected` of a promotion that replaces whatever champion there is.
ANY: Final = "any"


@dataclass(frozen=True)
class Promotion:
    """What came of `promote`.

    verdict: each bound with the figure it met. promoted: whether `champion` names the version.
    entry: the ledger's line; None where the gate refused or the version was champion already.
    """

    verdict: GateVerdict
    promoted: bool
    entry: LedgerEntry | None


@registry.server_errors()
def promote(
    home: Path,
    name: str,
    version: str,
    why: str,
    gate: dict[str, str],
    expected: str | None = ANY,
) -> Promotion:
    """Make `version` the champion of `name` if its own report keeps the bounds of `gate`.

    Args:
        home: where the ledger, and a registry on SQLite, live.
        gate: figure: bound, as in a recipe.
        expected: the champion that this promotion is meant to replace, None for none; by
            default any.

    Raises:
        UserError: no such name or version, or a version that did not load as it was trained.
        StageError: another promotion came first, so that the champion is not `expected`.
    """
    client = registry.connect(registry.tracking_uri(home))
    record = registry.get_version(client, name, version)
    registry.require_verified(record)
    verdict = judge(gate, registry.read_report(record).figures())
    ledger = Ledger(home, name)
    with ledger.locked():
        champion = recovered_champion(client, ledger, name)
        if not verdict.passed:
            return Promotion(verdict, champion == version, None)
        if champion == version:
            return Promotion(verdict, True, None)
        if expected not in (ANY, champion):
            raise StageError(
                f"{name} {version} was to replace version {expected}, but the champion is "
                f"{champion}: another promotion came first. Compare again, then promote."
            )
        entry = entry_now("promote", name, champion, version, why)
        move(client, ledger, entry)
    return Promotion(verdict, True, entry)


@registry.server_errors()
def rollback(home: Path, name: str, why: str = "rollback") -> LedgerEntry:
    """Give `champion` back to the version that the present one replaced when it was promoted.

    Raises:
        UserError: no such name, no champion, or none before it.
    """
    client = registry.connect(registry.tracking_uri(home))
    ledger = Ledger(home, name)
    with ledger.locked():
        champion = recovered_champion(client, ledger, name)
        last = None if champion is None else replaced_by(champion, ledger.entries())
        if last is None:
            found = "has no champion" if champion is None else f"had no champion before {champion}"
            raise UserError.at(name, found, "promote a version: peftflow promote NAME VERSION")
        registry.get_version(client, name, last)
        entry = entry_now("rollback", name, champion, last, why)
        move(client, ledger, entry)
    return entry


@registry.server_errors()
def champion(home: Path, name: str) -> str | None:
    """The version that `champion` names, or None."""
    client = registry.connect(registry.tracking_uri(home))
    return registry.alias_version(client, name, registry.CHAMPION)


def ledger(home: Path, name: str) -> list[LedgerEntry]:
    """Every promotion and rollback of `name`, oldest first. Does not import mlflow."""
    return Ledger(home, name).entries()


def recovered_champion(client: MlflowClient, ledger: Ledger, name: str) -> str | None:
    """The champion, after what a dead promoter left was settled. Under the lock."""
    version = registry.alias_version(client, name, registry.CHAMPION)
    ledger.recover(version)
    return version


def move(client: MlflowClient, ledger: Ledger, entry: LedgerEntry) -> None:
    """Set the alias and write it down, so that a crash in between can be settled."""
    ledger.begin(entry)
    registry.set_alias(client, entry.name, registry.CHAMPION, entry.to_version)
    ledger.commit(entry)


def replaced_by(version: str, entries: list[LedgerEntry]) -> str | None:
    """The version that `version` replaced at its latest promotion, or None."""
    for entry in reversed(entries):
        if entry.action == "promote" and entry.to_version == version:
            return entry.from_version
    return None


def entry_now(action: str, name: str, before: str | None, after: str, why: str) -> LedgerEntry:
    return LedgerEntry.model_validate(
        {
            "when": datetime.now(UTC).isoformat(timespec="microseconds"),
            "who": who(),
            "action": action,
            "name": name,
            "alias": registry.CHAMPION,
            "from_version": before,
            "to_version": after,
            "why": why,
        }
    )


def who() -> str:
    """The user's name, or the number of a user without one, as in some containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
