"""What a run leaves in the databases of Prefect and MLflow."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any


def query(database: Path, sql: str) -> list[Any]:
    with sqlite3.connect(database) as connection:
        return connection.execute(sql).fetchall()


def children(home: Path, parent: str) -> list[Any]:
    """Name, id and status of each MLflow run below another."""
    return query(
        home / "mlflow" / "mlflow.db",
        "select r.name, r.run_uuid, r.status from runs r join tags t on t.run_uuid = r.run_uuid "
        f"where t.key = 'mlflow.parentRunId' and t.value = '{parent}'",
    )


def metrics(home: Path, run_id: str) -> dict[str, float]:
    """The last value of each metric of an MLflow run."""
    sql = f"select key, value from latest_metrics where run_uuid = '{run_id}'"
    return dict(query(home / "mlflow" / "mlflow.db", sql))
