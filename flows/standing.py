"""Where a registered version stands, by the ledger and the store: MLflow need not be asked."""

from __future__ import annotations

from flows.home import Home
from schemas.report import Registration
from tasks.core.store import Store
from tasks.register.promote import ledger


def was_promoted(home: Home, version: Registration) -> bool:
    """Whether the version has ever been champion. A run promotes it once and undoes no rollback."""
    entries = ledger(home.root, version.name)
    return any(entry.to_version == version.version for entry in entries)


def aliases(home: Home, version: Registration) -> list[str]:
    """`challenger` for the newest version of its name, `champion` for the ledger's last."""
    versions = [
        int(entry.facts["version"])
        for entry in Store(home.store).entries("register")
        if entry.facts["name"] == version.name and entry.manifest.spec["tracking"] == home.registry
    ]
    found = ["challenger"] if int(version.version) >= max(versions, default=0) else []
    entries = ledger(home.root, version.name)
    if entries and entries[-1].to_version == version.version:
        found.append("champion")
    return found
