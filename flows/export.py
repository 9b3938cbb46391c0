"""`peftflow export`: a registered version, fetched, with its base, and written for others."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from flows.home import Home
from flows.hub import fetched
from schemas.export import ExportFormat
from tasks.register.named import named
from tasks.register.registry import stored_files

#: Where a version's package lies in what MLflow stores.
PACKAGE = "artifacts/package"


def export(home: Home, text: str, form: ExportFormat, out: Path) -> list[str]:
    """Write the version that a text names to `out`. Returns what is to be said of it aloud.

    Raises:
        UserError: no such version, a base that is gone, or a version without what the form is for.
    """
    # It warns on import of a kernel that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from tasks.export.formats import export as write
    from tasks.export.place import refuse_used
    from tasks.export.version import Version, read_serving

    refuse_used(out)
    home.open()
    record = named(home.root, text)
    package = stored_files(record, PACKAGE)
    base = base_of(read_serving(package)["base"], text)
    version = Version.open(f"{record.name}/{record.version}", package, base)
    return write(version, form, out)


def base_of(described: dict[str, str] | None, text: str) -> Path | None:
    """Where a version's base is: PEFTFLOW_BASE, else where it was, else the hub's revision, as the
    registered model itself looks for it."""
    if described is None:
        return None
    named = os.environ.get("PEFTFLOW_BASE")
    place = Path(named or described["path"])
    if not named and not place.is_dir() and described["revision"]:
        model, revision = described["model"], described["revision"]
        return fetched(model, revision, f"{text} base", "set PEFTFLOW_BASE=DIR")
    return place
