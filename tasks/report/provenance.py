"""What made the figures: entries with their keys, libraries, machine, commit, and the recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass

from schemas.manifest import Manifest, Provenance

#: An absolute path (POSIX, home or Windows) in a recipe: its directories, and its last part.
ABSOLUTE = re.compile(
    r"""(?<![\w.:/~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s"'#,\]}]*[/\\])?([^\s"'#,\]}/\\]+)[/\\]?"""
)


@dataclass(frozen=True)
class EntryRow:
    name: str
    key: str
    format: str
    started: str
    seconds: str
    mib: str


@dataclass(frozen=True)
class Fact:
    """Something that all entries share, or each value with the entries that it holds for."""

    name: str
    values: list[tuple[str, str]]


def entry_rows(manifests: dict[str, Manifest]) -> list[EntryRow]:
    return [
        EntryRow(
            name=name,
            key=manifest.key,
            format=manifest.format,
            started=manifest.provenance.started.removesuffix("+00:00").replace("T", " "),
            seconds=f"{manifest.provenance.seconds:,.1f}",
            mib=f"{sum(file.bytes for file in manifest.files.values()) / 2**20:,.2f}",
        )
        for name, manifest in manifests.items()
    ]


def facts(manifests: dict[str, Manifest]) -> list[Fact]:
    """Content hashes, machine, commit and libraries, said once where every entry agrees."""
    records = {name: manifest.provenance for name, manifest in manifests.items()}
    libraries = sorted({library for record in records.values() for library in record.libraries})
    outside = sorted({name for manifest in manifests.values() for name in manifest.outside})
    made = []
    for name in outside:
        having = {entry: one.outside for entry, one in manifests.items() if name in one.outside}
        hashes = {entry: hashes[name] for entry, hashes in having.items()}
        made.append(_fact(f"SHA-256 of {name}", hashes))
    made += [
        _fact("machine", {name: record.machine for name, record in records.items()}),
        _fact("git commit", {name: _commit(record) for name, record in records.items()}),
        _fact("Python", {name: record.python for name, record in records.items()}),
    ]
    for library in libraries:
        versions = {
            name: record.libraries[library]
            for name, record in records.items()
            if library in record.libraries
        }
        made.append(_fact(library, versions))
    return made


def _commit(record: Provenance) -> str:
    if record.git_commit is None:
        return "not a git checkout"
    return record.git_commit + (" with uncommitted changes" if record.git_dirty else "")


def _fact(title: str, values: dict[str, str]) -> Fact:
    entries: dict[str, list[str]] = {}
    for name, value in values.items():
        entries.setdefault(value, []).append(name)
    alike = len(entries) == 1
    return Fact(
        title, [(value, "" if alike else ", ".join(names)) for value, names in entries.items()]
    )


def without_directories(recipe_yaml: str) -> str:
    """The recipe with absolute paths cut to `…/name`: a report is sent around, a machine is not."""
    return ABSOLUTE.sub(r"…/\1", recipe_yaml)
