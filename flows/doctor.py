"""What is wrong with this machine, if anything: one line for each thing that a run leans on."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from flows.execute import ROOT
from flows.home import Home
from flows.hub import reachable
from flows.machine import gpus, resolve_dtype, torch_version
from flows.servers import HOST, MLFLOW_PORT, PREFECT_PORT, running
from schemas.errors import StageError, UserError

Verdict = Literal["ok", "note", "broken"]

#: Below these a quickstart still runs, and a model worth tuning may not.
ROOMY_DISK_GIB = 10.0
ROOMY_MEMORY_GIB = 8.0


@dataclass(frozen=True)
class Finding:
    """One thing looked at. broken: a run cannot work; note: it can, and here is what it means."""

    what: str
    found: str
    verdict: Verdict = "ok"
    fix: str = ""


def examine(home: Home) -> list[Finding]:
    """Everything, in the order in which one would put it right."""
    return [
        python(),
        versions(),
        processor(home),
        accelerator(),
        memory(),
        home_directory(home),
        disk(home),
        *(port(home, name, number) for name, number in _PORTS.items()),
        compiler(),
        hub(),
        browser(),
    ]


_PORTS = {"prefect": PREFECT_PORT, "mlflow": MLFLOW_PORT}


def python() -> Finding:
    fine = sys.version_info >= (3, 11)
    return Finding(
        "python",
        platform.python_version(),
        "ok" if fine else "broken",
        "" if fine else "install Python 3.11 or later",
    )


def versions() -> Finding:
    """Installed against constraints.txt, where the checkout has one."""
    constraints = ROOT / "constraints.txt"
    if not constraints.exists():
        return Finding("versions", "no constraints.txt beside the package", "note")
    apart, missing = [], []
    needed = {name.lower().replace("_", "-") for name in _requirements()}
    for line in constraints.read_text().splitlines():
        name, equals, wanted = line.partition("==")
        if not equals or line.startswith("#"):
            continue
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name.lower().replace("_", "-") in needed:
                missing.append(name)
            continue
        if found.partition("+")[0] != wanted.split(";")[0].strip():
            apart.append(f"{name} {found}, tested with {wanted}")
    fix = "pip install -c constraints.txt -e ."
    if missing:
        return Finding("versions", f"missing: {', '.join(missing)}", "broken", fix)
    if apart:
        return Finding("versions", "; ".join(apart), "note", fix)
    return Finding("versions", "as in constraints.txt")


def _requirements() -> list[str]:
    """The names of what the package itself needs."""
    try:
        lines = metadata.requires("peftflow") or []
    except metadata.PackageNotFoundError:
        return []
    return [
        line.split(";")[0].split("[")[0].rstrip("<>=!~.,0123456789 ")
        for line in lines
        if "extra ==" not in line
    ]


def processor(home: Home) -> Finding:
    cores = len(os.sched_getaffinity(0))
    try:
        home.open()
        dtype = resolve_dtype("auto", home)
    except UserError:
        return Finding("processor", f"{cores} cores")  # the home has a line of its own
    except StageError as error:
        return Finding("processor", str(error), "broken", "install torch again")
    return Finding("processor", f"{cores} cores; dtype auto means {dtype}")


def accelerator() -> Finding:
    found = ", ".join(gpus())
    if not found:
        return Finding("accelerator", "none: everything runs on the processor", "note")
    try:
        version = torch_version()
    except StageError as error:
        return Finding("accelerator", f"{found}, but {error}", "broken", "install torch again")
    if "+cpu" in version:
        fix = "install torch's CUDA build"
        return Finding("accelerator", f"{found}, but torch is for CPU", "note", fix)
    return Finding("accelerator", found)


def memory() -> Finding:
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    total = int(fields["MemTotal"].split()[0]) / 2**20
    free = int(fields["MemAvailable"].split()[0]) / 2**20
    text = f"{free:.1f} GiB free of {total:.1f}"
    return Finding("memory", text, "ok" if free >= ROOMY_MEMORY_GIB else "note")


def home_directory(home: Home) -> Finding:
    try:
        home.open()
    except UserError as error:
        problem = error.problems[0]
        return Finding("home", f"{problem.place}: {problem.found}", "broken", problem.fix)
    return Finding("home", str(home.root))


def disk(home: Home) -> Finding:
    place = home.root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    return Finding("disk", f"{free:.1f} GiB free", "ok" if free >= ROOMY_DISK_GIB else "note")


def port(home: Home, name: str, number: int) -> Finding:
    """Whether `up` can have its usual port. It takes another where it cannot."""
    server = running(home, name)
    if server is not None:
        return Finding(f"{name} server", f"up at {server.url}")
    with socket.socket() as probe:
        try:
            probe.bind((HOST, number))
        except OSError:
            return Finding(
                f"{name} server", f"down; port {number} is taken, `up` finds another", "note"
            )
    return Finding(f"{name} server", f"down; port {number} is free")


def compiler() -> Finding:
    found = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if found is None:
        return Finding("compiler", "none: torch.compile is not used", "note", "apt install g++")
    return Finding("compiler", found)


def hub() -> Finding:
    if not reachable():
        return Finding("model hub", "out of reach: give bases and data as paths", "note")
    return Finding("model hub", "within reach")


def browser() -> Finding:
    names = ("chromium", "chromium-browser", "google-chrome", "firefox")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        return Finding("browser", "none here: open reports elsewhere", "note")
    return Finding("browser", found)
