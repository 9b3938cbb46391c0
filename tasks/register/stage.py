"""Register: the finished model as an MLflow version that is proven to load as it was trained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from schemas.errors import StageError
from schemas.report import Registration
from schemas.stages import RegisterSpec
from tasks.core.progress import say
from tasks.core.store import SCRATCH
from tasks.register import registry
from tasks.register.package import make_package
from tasks.register.verify import TOLERANCE, reload_difference


def run(spec: RegisterSpec, paths: dict[str, Path], out_dir: Path) -> dict[str, Any]:
    """Register the finished entry, load it back, compare, and make it the challenger.

    Writes registration.json. A run that was killed anywhere goes on with the version that it
    made: there is one version for one finished model.

    Raises:
        StageError: the reloaded version gives other logits; it keeps the tag verified=false.
    """
    tracking = os.environ["MLFLOW_TRACKING_URI"]
    scratch = out_dir / SCRATCH
    scratch.mkdir(exist_ok=True)
    package = make_package(spec, paths, scratch / "package")
    version = registry.register_package(package, spec.name, spec.recipe_name, tracking)
    say(f"{spec.name} version {version.version}: loading it back to compare")
    difference = reload_difference(
        version.uri, tracking, paths, package.serving, scratch / "verify"
    )
    if not difference <= TOLERANCE:
        raise StageError(
            f"{spec.name} version {version.version} was registered but does not load as it was "
            f"trained: logits differ by up to {difference:g} (allowed: {TOLERANCE:g}). It is "
            "tagged peftflow.verified=false and cannot be promoted."
        )
    registry.mark_verified(spec.name, version.version, tracking)
    registration = Registration(
        name=spec.name,
        version=version.version,
        run_id=version.run_id,
        model_uri=version.uri,
        max_logit_difference=difference,
        tolerance=TOLERANCE,
    )
    (out_dir / "registration.json").write_text(registration.model_dump_json(indent=1))
    return {"format": "registration", **registration.model_dump(), "key": package.key}
