"""The home directory: everything that a run leaves behind, under one roof.

store/      artifacts, by stage and key       runs/     one JSON record a run
mlflow/     SQLite and artifacts              reports/  the HTML report of each run
prefect/    Prefect's own home and SQLite     logs/     what each child process said
cache/      hashes and machine facts, remembered
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from schemas.errors import UserError
from tasks.core.files import write_atomic
from tasks.core.waiting import waiting
from tasks.register import registry

DEFAULT = Path(".peftflow")
ROOMS = ("store", "mlflow", "prefect", "runs", "reports", "logs", "cache")

#: Nobody is told about a run: no usage statistics leave the machine.
PRIVATE = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
}


@dataclass(frozen=True)
class Home:
    """One home directory. `root` is absolute."""

    root: Path

    @classmethod
    def find(cls, option: Path | None = None) -> Home:
        """The directory of `--home`, else of PEFTFLOW_HOME, else `./.peftflow`."""
        return cls((option or Path(os.environ.get("PEFTFLOW_HOME") or DEFAULT)).resolve())

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def prefect(self) -> Path:
        return self.root / "prefect"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def diverged(self) -> Path:
        return self.cache / "diverged"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def tracking_uri(self) -> str:
        """MLflow's store: MLFLOW_TRACKING_URI where it is set, else SQLite under this home."""
        return registry.tracking_uri(self.root)

    @property
    def mlflow_server(self) -> str | None:
        """The address of MLflow where MLFLOW_TRACKING_URI names a server, without its password."""
        uri = registry.without_password(self.tracking_uri)
        return uri if uri.startswith(("http://", "https://")) else None

    @property
    def registry(self) -> str:
        """Which registry this is: one that was deleted and made anew is another."""
        return registry.identity(self.root)

    def open(self) -> None:
        """Make the rooms and prove that they can be written to.

        Raises:
            UserError: they cannot, in words.
        """
        probe = self.root / f".probe-{os.getpid()}"
        try:
            for room in ROOMS:
                (self.root / room).mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"peftflow")
            probe.unlink()
            mark = self.root / "mlflow" / "id"
            if not mark.exists():
                write_atomic(mark, secrets.token_hex(16))
        except OSError as error:
            raise UserError.at(
                self.root,
                f"the home directory cannot be written to: {error.strerror}",
                "choose another with --home DIR or PEFTFLOW_HOME, or free space there",
            ) from error

    def environment(self, *, offline: bool = True) -> dict[str, str]:
        """The environment of child processes: this process's own, and where things live.

        offline: no model hub is asked for anything, so that nothing waits for a time-out.
        """
        environment = {
            "MLFLOW_LOGGING_LEVEL": "WARNING",
            **waiting(os.environ),
            **os.environ,
            **PRIVATE,
            "PEFTFLOW_HOME": str(self.root),
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "PREFECT_HOME": str(self.prefect),
        }
        if offline:
            environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        return environment
