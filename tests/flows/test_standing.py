"""Where a version stands is told by the ledger of the registry in use."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.home import Home
from flows.standing import aliases, was_promoted
from schemas.report import Registration
from tasks.register.ledger import Ledger
from tasks.register.promote import entry_now

FIRST = Registration(
    name="tiny",
    version="1",
    run_id="r",
    model_uri="models:/tiny/1",
    max_logit_difference=0.0,
    tolerance=0.0,
)


def test_a_champion_of_one_registry_is_none_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = Home(tmp_path)
    home.open()
    ledger, entry = Ledger(home.root, "tiny"), entry_now("promote", "tiny", None, "1", "first")
    with ledger.locked():
        ledger.begin(entry)
        ledger.commit(entry)
    assert was_promoted(home, FIRST)
    assert "champion" in aliases(home, FIRST)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:old@mlflow.example:5000")
    assert not was_promoted(home, FIRST)
    assert "champion" not in aliases(home, FIRST)
    before = home.registry
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:new@mlflow.example:5000")
    assert home.registry == before  # a new password makes no other registry
