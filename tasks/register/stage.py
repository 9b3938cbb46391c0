"""Register: the finished model as an MLflow version that is proven to load as it was trained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from schemas.errors import StageError
from schemas.report import Registration
from schemas.stages import RegisterSpec
from tasks.core.progress import say, warn
from tasks.core.store import SCRATCH
from tasks.register import registry
from tasks.register.package import make_package
from tasks.register.verify import TOLERANCE, reload


@registry.server_errors()
def run(spec: RegisterSpec, paths: dict[str, Path], out_dir: Path) -> dict[str, Any]:
    """Register the finished entry, load it back, compare, and make it the challenger.

    Writes registration.json. A run that was killed anywhere goes on with the version that it
    made: there is one version for one finished model.

    Raises:
        RetryableError: the registry is a server, and away.
        StageError: the reloaded version gives other logits; it keeps the tag verified=false.
    """
    tracking = os.environ["MLFLOW_TRACKING_URI"]
    scratch = out_dir / SCRATCH
    scratch.mkdir(exist_ok=True)
    package = make_package(spec, paths, scratch / "package")
    version = registry.register_package(package, spec.name, spec.recipe_name, tracking)
    say(f"{spec.name} version {version.version}: loading it back to compare")
    reloaded = reload(version.uri, tracking, paths, package.serving, scratch / "verify")
    if not reloaded.difference <= TOLERANCE:
        raise StageError(
            f"{spec.name} version {version.version} was registered but does not load as it was "
            f"trained: logits differ by up to {reloaded.difference:g} (allowed: {TOLERANCE:g}). It "
            "is tagged peftflow.verified=false and cannot be promoted."
        )
    if reloaded.asked_alike < reloaded.rows:
        warn(
            f"{reloaded.rows - reloaded.asked_alike} of {reloaded.rows} held-out prompts become "
            "other tokens when the version is asked them than when it was evaluated (cut to "
            "max_length, or their last token was joined with the answer's first): its answers to "
            "them may be others than those that were measured"
        )
    registry.mark_verified(spec.name, version.version, tracking)
    registration = Registration(
        name=spec.name,
        version=version.version,
        run_id=version.run_id,
        model_uri=version.uri,
        max_logit_difference=reloaded.difference,
        tolerance=TOLERANCE,
    )
    (out_dir / "registration.json").write_text(registration.model_dump_json(indent=1))
    return {
        "format": "registration",
        **registration.model_dump(),
        "prompts_asked_alike": f"{reloaded.asked_alike}/{reloaded.rows}",
    }
