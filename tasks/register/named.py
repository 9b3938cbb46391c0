"""One version as people name it: `NAME@ALIAS` or `NAME/3`, what MLflow has after `models:/`."""

from __future__ import annotations

import re
from pathlib import Path

from schemas.errors import UserError
from tasks.register import registry
from tasks.register.registry import VersionRecord


@registry.server_errors()
def named(home: Path, text: str) -> VersionRecord:
    """The version that a text names.

    Raises:
        UserError: another form, no such model, alias or version, with those that there are; or a
            version that was never shown to load as it was trained.
    """
    parts = re.fullmatch(r"(?:models:/)?([^/]+?)(?:@([^/@]+)|/(\d+))", text)
    if parts is None:
        raise UserError.at(text, "names no version", "write NAME@champion, NAME@ALIAS or NAME/3")
    name, alias, number = parts.groups()
    client = registry.connect(registry.tracking_uri(home))
    if alias is not None:
        number = registry.alias_version(client, name, alias)
    if number is None:
        known = {
            alias: record.version
            for record in reversed(registry.versions(home, name))
            for alias in record.aliases
        }
        there = ", ".join(f"{name}@{alias} (version {at})" for alias, at in known.items())
        raise UserError.at(
            text,
            f"no version has the alias {alias}",
            f"choose {there}" if there else f"name a version: {name}/1",
        )
    record = registry.get_version(client, name, number)
    registry.require_verified(record)
    return record
