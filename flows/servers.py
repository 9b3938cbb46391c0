"""The two local servers: Prefect's, and MLflow's UI, both under one home.

`up` starts them for good (until `down`); a run without them starts a Prefect server of its own
that ends with it. Prefect's ephemeral mode is no substitute: it loses task history.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http import HTTPStatus
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from flows.execute import start_bound
from flows.home import Home
from flows.processes import Process
from schemas.errors import StageError, UserError
from tasks.core.files import write_atomic

HOST = "127.0.0.1"
PREFECT_PORT = 4200
MLFLOW_PORT = 5000
POOL = "peftflow"

#: Seconds that a server may take to answer; the first start also makes its database.
START_S = 90.0

#: A run's own server only keeps history: nothing is scheduled, watched or shown by it.
HISTORY_ONLY = {
    f"PREFECT_SERVER_SERVICES_{service}_ENABLED": "false"
    for service in ("SCHEDULER", "LATE_RUNS", "FOREMAN", "TRIGGERS", "REPOSSESSOR")
}


class Server(BaseModel):
    """A server that `up` started: where it answers, and its process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    url: str
    log: Path
    process: Process

    @property
    def api(self) -> str:
        """The base of Prefect's API, as PREFECT_API_URL wants it."""
        return f"{self.url}/api"

    def is_alive(self) -> bool:
        return self.process.alive


def server_file(home: Home, name: str) -> Path:
    return home.root / name / "server.json"


def running(home: Home, name: str) -> Server | None:
    """The server of this name that `up` started, if its process is alive."""
    try:
        server = Server.model_validate_json(server_file(home, name).read_bytes())
    except (OSError, ValidationError):
        return None
    return server if server.process.alive else None


def up(home: Home) -> list[Server]:
    """The servers, started where they are not running, each answering.

    MLflow is not among them where MLFLOW_TRACKING_URI names a server: there is one already.
    """
    starting = []
    for name in ("prefect",) if home.mlflow_server else ("prefect", "mlflow"):
        server = running(home, name)
        if server is None:
            server = _start_detached(home, name)
            write_atomic(server_file(home, name), server.model_dump_json(indent=1))
        starting.append(server)
    for server in starting:
        path = "/api/health" if server.name == "prefect" else "/health"
        _wait(server.url + path, server.name, server.is_alive, server.log)
        if server.name == "prefect":
            make_pool(server.api)
    return starting


def make_pool(api: str) -> None:
    """The work pool of `infra/prefect.yaml`: flow runs as processes of a worker's machine.

    A worker fills in the pool's job template when it starts.
    """
    body = json.dumps({"name": POOL, "type": "process"}).encode()
    request = urllib.request.Request(
        f"{api}/work_pools/", body, {"Content-Type": "application/json"}, method="POST"
    )
    try:
        _local().open(request, timeout=30).close()
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.CONFLICT:  # it is there already
            raise StageError(f"Prefect refuses the work pool {POOL}: {error}") from error


def down(home: Home) -> list[str]:
    """Stop what `up` started; the names of the servers that were running."""
    stopped = []
    for name in ("prefect", "mlflow"):
        server = running(home, name)
        if server is not None:
            server.process.end_group()
            stopped.append(name)
        server_file(home, name).unlink(missing_ok=True)
    return stopped


class PrefectApi:
    """The API that one run reports to: PREFECT_API_URL, what `up` started, or a server of its own.

    Starting takes seconds, so it begins in `__init__` and is waited for in `ready`.
    """

    def __init__(self, home: Home) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._first = ExitStack()
        self._log = home.logs / "prefect-run.log"
        given, server = os.environ.get("PREFECT_API_URL"), running(home, "prefect")
        if given:
            self.url, self.whose = given.rstrip("/"), "PREFECT_API_URL"
        elif server is not None:
            self.url, self.whose = server.api, "peftflow up"
        else:
            port = free_port()
            self.url, self.whose = f"http://{HOST}:{port}/api", "this run"
            if not (home.prefect / "prefect.db").exists():
                self._first.enter_context(alone(home.prefect / ".making"))
            with self._log.open("wb") as log:
                environment = _prefect_environment(home, port) | HISTORY_ONLY
                self._child = start_bound(_prefect_command(port), environment, log, log)

    def ready(self) -> str:
        """The URL, once it answers.

        Raises:
            UserError: PREFECT_API_URL is set and nobody answers there.
            StageError: the server that was started does not come up.
        """
        child = self._child
        if child is None:
            if not answers(f"{self.url}/health"):
                raise UserError.at(
                    f"Prefect at {self.url} ({self.whose})",
                    "does not answer",
                    "unset PREFECT_API_URL, or `peftflow down` and `peftflow up`",
                )
        else:
            _wait(f"{self.url}/health", "prefect", lambda: child.poll() is None, self._log)
            self._first.close()
        return self.url

    def close(self) -> None:
        """End a server of this run's own."""
        self._first.close()
        if self._child is not None:
            self._child.terminate()
            self._child.wait()


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time past this line: two servers must not make one database."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def prefect_api(home: Home) -> Iterator[PrefectApi]:
    """A `PrefectApi` that is closed at the end."""
    api = PrefectApi(home)
    try:
        yield api
    finally:
        api.close()


def answers(url: str, timeout_s: float = 2.0) -> bool:
    """Whether a GET gets 200."""
    try:
        with _local().open(url, timeout=timeout_s) as response:
            return bool(response.status == HTTPStatus.OK)
    except OSError:
        return False


def _local() -> urllib.request.OpenerDirector:
    """Requests that no proxy of the environment sees: these servers are local."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port(preferred: int = 0) -> int:
    """`preferred` if it is free, else one that the kernel chooses."""
    with socket.socket() as probe:
        try:
            probe.bind((HOST, preferred))
        except OSError:
            probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _start_detached(home: Home, name: str) -> Server:
    """Start a server in a session of its own, which outlives this process."""
    if name == "prefect":
        port = free_port(PREFECT_PORT)
        command, environment = _prefect_command(port), _prefect_environment(home, port)
    else:
        port = free_port(MLFLOW_PORT)
        command, environment = _mlflow_command(home, port), home.environment()
        # Its job runners (for judging traces) are seven processes that nobody here needs.
        environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    log = home.logs / f"{name}.log"
    with log.open("ab") as output:
        child = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    url = f"http://{HOST}:{port}"
    return Server(name=name, url=url, log=log, process=Process.of(child.pid))


def _prefect_command(port: int) -> list[str]:
    command = [sys.executable, "-P", "-m", "prefect", "server", "start"]
    return [*command, "--host", HOST, "--port", str(port)]


def _prefect_environment(home: Home, port: int) -> dict[str, str]:
    """`home.prefect` holds Prefect's database, whatever PREFECT_API_URL says about another."""
    environment = home.environment()
    environment.pop("PREFECT_API_URL", None)
    return environment | {
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    }


def _mlflow_command(home: Home, port: int) -> list[str]:
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", home.tracking_uri]
    return [*command, "--artifacts-destination", str(home.root / "mlflow" / "artifacts")]


def _wait(url: str, name: str, alive: Callable[[], bool], log: Path) -> None:
    """Until `url` answers.

    Raises:
        StageError: it does not, with the end of its log.
    """
    deadline = time.monotonic() + START_S
    while not answers(url):
        if not alive() or time.monotonic() > deadline:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
            raise StageError(f"{name}'s server does not come up\n{tail}\n    log: {log}")
        time.sleep(0.1)
