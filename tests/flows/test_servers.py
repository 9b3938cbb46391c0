"""What `up` starts, and what it leaves to others."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows import cli, servers
from flows.home import Home
from flows.processes import Process


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the servers that `up` starts, none of which is really started."""
    names: list[str] = []

    def start(home: Home, name: str) -> servers.Server:
        names.append(name)
        here = Process.this()
        (home.root / name).mkdir(exist_ok=True)
        return servers.Server(name=name, url="http://127.0.0.1:1", log=home.logs, process=here)

    monkeypatch.setattr(servers, "_start_detached", start)
    monkeypatch.setattr(servers, "_wait", lambda *_: None)
    monkeypatch.setattr(servers, "make_pool", lambda _: None)
    return names


def test_up_starts_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = Home(tmp_path)
    home.open()
    assert [server.name for server in servers.up(home)] == started == ["prefect", "mlflow"]


def test_up_leaves_mlflow_to_the_server_that_is_given(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    started: list[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://somebody:hunter2@mlflow.example/team")
    for command in (cli.up, cli.status):
        with pytest.raises(SystemExit) as ended:
            command(tmp_path)
        assert ended.value.code == 0
        told = capsys.readouterr().out
        assert "https://mlflow.example/team" in told
        assert "hunter2" not in told
    assert started == ["prefect"]
