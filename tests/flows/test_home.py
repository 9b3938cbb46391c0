"""The home directory: where it is, what children are told, and what happens where it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.home import ROOMS, Home
from schemas.errors import UserError


def test_option_beats_variable_beats_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PEFTFLOW_HOME", raising=False)
    assert Home.find().root == tmp_path / ".peftflow"
    monkeypatch.setenv("PEFTFLOW_HOME", str(tmp_path / "variable"))
    assert Home.find().root == tmp_path / "variable"
    assert Home.find(tmp_path / "option").root == tmp_path / "option"


def test_open_makes_the_rooms_and_leaves_no_probe(tmp_path: Path) -> None:
    home = Home(tmp_path / "new" / "home")
    home.open()
    assert sorted(path.name for path in home.root.iterdir()) == sorted(ROOMS)


@pytest.mark.parametrize("place", ["/proc/peftflow", "/sys/peftflow"])
def test_a_home_that_cannot_be_written_is_the_users_error(place: str) -> None:
    # These refuse root as well, which a directory without write permission does not.
    with pytest.raises(UserError) as caught:
        Home(Path(place)).open()
    problem = caught.value.problems[0]
    assert problem.place == place
    assert "--home" in problem.fix


def test_a_home_under_a_file_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Home(tmp_path / "file" / "home").open()


def test_children_report_nothing_and_ask_no_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    environment = Home(tmp_path).environment()
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert environment["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert "HF_HUB_OFFLINE" not in Home(tmp_path).environment(offline=False)
