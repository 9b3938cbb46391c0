"""The MLflow registry: the only module of the pipeline's tasks that imports mlflow.

It is imported inside the functions, since that takes a second which most commands need not wait.
A version is made in steps that can be gone through again after a crash at any point: each thing
that is made carries the version's key as a tag, and is looked for before it is made.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.errors import RetryableError, StageError, UserError
from schemas.report import CriteriaReport
from schemas.tasks import is_labelled, reads_images
from tasks.core.files import sha256_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from tasks.register.package import Package

SERVED_MODEL = Path(__file__).with_name("served_model.py")

KEY, VERIFIED = "peftflow.key", "peftflow.verified"
CHALLENGER, CHAMPION = "challenger", "champion"


@dataclass(frozen=True)
class VersionRecord:
    """One version of a registered model.

    verified: it was reloaded and gave the same logits. figures: `CriteriaReport.figures()` as
    MLflow's metrics hold them. created: UTC, ISO 8601.
    """

    name: str
    version: str
    run_id: str
    aliases: list[str]
    verified: bool
    tags: dict[str, str]
    figures: dict[str, float]
    created: str

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


@contextmanager
def server_errors() -> Iterator[None]:
    """MLflow's errors as ours, without the password that a registry's address may hold.

    Raises:
        RetryableError: the server cannot be reached.
        StageError: it answered with an error.
    """
    try:
        yield
    except Exception as error:
        # By name: what never spoke to MLflow has not imported it.
        if type(error).__name__ not in ("MlflowException", "RestException"):
            raise
        text = without_password(str(error))
        if "failed with exception" in text:
            raise RetryableError(f"the MLflow server does not answer: {text}") from None
        raise StageError(f"MLflow: {text}") from None


def tracking_uri(home: Path) -> str:
    """MLFLOW_TRACKING_URI where it is set, else SQLite under the home directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow' / 'mlflow.db'}"


def without_password(text: str) -> str:
    """A text without what stands before the @ of an address in it."""
    return re.sub(r"//[^/@\s]+@", "//", text)


def identity(home: Path) -> str:
    """Which registry this is: one that was deleted and made anew is another."""
    uri, mark = without_password(tracking_uri(home)), home / "mlflow" / "id"
    local = mark.read_text() if uri.startswith("sqlite:") and mark.exists() else ""
    return sha256_json([uri, local])


def connect(uri: str) -> MlflowClient:
    """A client of the registry. No usage data leaves the machine, and nothing is unpickled."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import mlflow

    directory = sqlite_directory(uri)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    return mlflow.MlflowClient(uri, uri)


def sqlite_directory(uri: str) -> Path | None:
    """The directory of a SQLite registry; None for a server."""
    return Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:///") else None


def experiment(client: MlflowClient, name: str) -> str:
    """The id of the experiment `name`, made if need be.

    Beside SQLite its artifacts lie beside the database: MLflow's default is the directory in
    which a process happens to be.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    directory = sqlite_directory(client.tracking_uri)
    place = None if directory is None else (directory.resolve() / "artifacts" / name).as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=place))
    except MlflowException:
        # Another process made it first.
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def register_package(package: Package, name: str, experiment_name: str, uri: str) -> VersionRecord:
    """The version of a package: found by its key, or made. Not yet verified, without alias."""
    client = connect(uri)
    found = find_version(client, name, package.key)
    if found is not None:
        return found
    experiment_id = experiment(client, experiment_name)
    run_id = run_of(client, experiment_id, package)
    model_uri = logged_model(client, experiment_id, run_id, package)
    tags = {
        KEY: package.key,
        VERIFIED: "false",
        "peftflow.task": package.task,
        "peftflow.method": package.report.method,
        "peftflow.recipe": experiment_name,
    }
    ensure_name(client, name)
    made = client.create_model_version(
        name, model_uri, run_id, tags=tags, description=package.card, model_id=model_id(model_uri)
    )
    return record_of(client, made)


def run_of(client: MlflowClient, experiment_id: str, package: Package) -> str:
    """The run that holds the figures of a package: found by its key, or made."""
    runs = client.search_runs([experiment_id], f"tags.`{KEY}` = '{package.key}'", max_results=1)
    run = (
        runs[0]
        if runs
        else client.create_run(
            experiment_id, tags={KEY: package.key}, run_name=f"register {package.key[:8]}"
        )
    )
    run_id = str(run.info.run_id)
    for figure, value in package.report.figures().items():
        client.log_metric(run_id, figure, value)
    for file in ("criteria.json", "data_report.json", "manifest.json", "README.md"):
        client.log_artifact(run_id, str(package.directory / file))
    client.set_terminated(run_id)
    return run_id


def logged_model(client: MlflowClient, experiment_id: str, run_id: str, package: Package) -> str:
    """The URI of the package as MLflow stores it: found whole, or made.

    A crash leaves a model PENDING; it is deleted and made again.
    """
    import mlflow
    from mlflow.entities.logged_model_status import LoggedModelStatus

    for model in client.search_logged_models([experiment_id], f"tags.`{KEY}` = '{package.key}'"):
        if model.status == LoggedModelStatus.READY:
            return str(model.model_uri)
        client.delete_logged_model(model.model_id)
    with mlflow.start_run(run_id=run_id):
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(SERVED_MODEL),
            artifacts={"package": str(package.directory)},
            pip_requirements=package.requirements,
            signature=signature(
                package.task,
                package.serving["max_new_tokens"],
                turbo=(package.directory / "heads").is_dir(),
            ),
            input_example=package.example,
            tags={KEY: package.key},
            metadata={"task": package.task, "base": package.serving["base"], "key": package.key},
        )
    return str(info.model_uri)


def signature(task: str, max_new_tokens: int, *, turbo: bool = False) -> Any:
    """One unnamed column in, so that a list and a one-column frame both fit: texts, or the bytes
    of images. turbo: whether there are heads, which a caller may leave out."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    inputs = Schema([ColSpec("binary" if reads_images(task) else "string")])
    if not is_labelled(task):
        params = [ParamSpec("max_new_tokens", "long", max_new_tokens)]
        if turbo:
            params.append(ParamSpec("turbo", "boolean", True))
        answer = Schema([ColSpec("string", "completion")])
        return ModelSignature(inputs, answer, ParamSchema(params))
    if task == "token-classification":
        return ModelSignature(inputs, Schema([ColSpec("string", "spans")]))
    return ModelSignature(inputs, Schema([ColSpec("string", "label"), ColSpec("double", "score")]))


def ensure_name(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise


def model_id(model_uri: str) -> str:
    return model_uri.removeprefix("models:/")


def find_version(client: MlflowClient, name: str, key: str) -> VersionRecord | None:
    """The version of `name` with this key, or None."""
    found = client.search_model_versions(f"name = '{name}' and tag.`{KEY}` = '{key}'")
    return record_of(client, found[0]) if found else None


def record_of(client: MlflowClient, version: Any) -> VersionRecord:
    """A version as ours: over SQL MLflow gives its number as an int, over REST as a str."""
    whole = client.get_model_version(version.name, str(version.version))
    run = client.get_run(whole.run_id) if whole.run_id else None
    created = datetime.fromtimestamp(whole.creation_timestamp / 1000, UTC)
    return VersionRecord(
        name=whole.name,
        version=str(whole.version),
        run_id=whole.run_id or "",
        aliases=sorted(whole.aliases),
        verified=whole.tags.get(VERIFIED) == "true",
        tags=dict(whole.tags),
        figures=dict(run.data.metrics) if run else {},
        created=created.isoformat(timespec="seconds"),
    )


@server_errors()
def versions(home: Path, name: str) -> list[VersionRecord]:
    """The versions of a registered model, newest first.

    Raises:
        UserError: no model of this name, with the nearest that there is.
    """
    client = connect(tracking_uri(home))
    found = [record_of(client, one) for one in client.search_model_versions(f"name = '{name}'")]
    if not found:
        raise unknown_name(client, name)
    return sorted(found, key=lambda record: -int(record.version))


def get_version(client: MlflowClient, name: str, version: str) -> VersionRecord:
    """One version.

    Raises:
        UserError: no such model, or no such version of it, with those that there are.
    """
    found = [str(one.version) for one in client.search_model_versions(f"name = '{name}'")]
    if not found:
        raise unknown_name(client, name)
    if version not in found:
        known = ", ".join(sorted(found, key=int))
        raise UserError.at(f"{name} {version}", "no such version", f"choose one of {known}")
    return record_of(client, client.get_model_version(name, version))


def require_verified(record: VersionRecord) -> None:
    """Raise a UserError for a version that did not load as it was trained."""
    if not record.verified:
        raise UserError.at(
            f"{record.name} {record.version}",
            "was never shown to load as it was trained (peftflow.verified is not true)",
            "run its recipe again, which verifies it",
        )


def unknown_name(client: MlflowClient, name: str) -> UserError:
    known = [model.name for model in client.search_registered_models()]
    near = difflib.get_close_matches(name, known, n=1)
    fix = f"did you mean {near[0]}?" if near else f"known: {', '.join(known) or 'none yet'}"
    return UserError.at(name, "no registered model has this name", fix)


def alias_version(client: MlflowClient, name: str, alias: str) -> str | None:
    """The version that an alias names, or None."""
    from mlflow.exceptions import MlflowException

    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException:
        return None
    return str(aliases[alias]) if alias in aliases else None


def set_alias(client: MlflowClient, name: str, alias: str, version: str) -> None:
    client.set_registered_model_alias(name, alias, version)


def mark_verified(name: str, version: str, uri: str) -> None:
    """Say that a version loads as it was trained, and make it the challenger."""
    client = connect(uri)
    client.set_model_version_tag(name, version, VERIFIED, "true")
    set_alias(client, name, CHALLENGER, version)


def read_report(record: VersionRecord) -> CriteriaReport:
    """The five criteria that a version carries."""
    path = stored_files(record, "artifacts/package/criteria.json")
    return CriteriaReport.model_validate_json(path.read_bytes())


def stored_files(record: VersionRecord, path: str = "") -> Path:
    """A file of a version as MLflow stores it, or all of them: fetched, where not on this disk."""
    import mlflow

    return Path(mlflow.artifacts.download_artifacts(f"{record.uri}/{path}".rstrip("/")))


def load_served(model_uri: str, uri: str) -> Any:
    """The `ServedModel` of a version, loaded as anybody would load it."""
    connect(uri)
    import mlflow

    return mlflow.pyfunc.load_model(model_uri).unwrap_python_model()
