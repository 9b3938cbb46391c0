"""What is measured: the untouched base, a candidate, or the finished model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft.utils import ModulesToSaveWrapper

from schemas.manifest import Manifest
from schemas.stages import EvaluateSpec
from schemas.tasks import Task, is_labelled
from tasks.core import runtime
from tasks.core.adapters import is_adapter
from tasks.core.models import load_base, load_trained, read_labels
from tasks.core.progress import warn
from tasks.core.quantised import Quantisation
from tasks.core.runtime import Dtype
from tasks.core.shots import Shots, is_prompt
from tasks.core.store import read_manifest


@dataclass(frozen=True)
class Subject:
    """Where the model under test lies, and what is known of how it came about.

    model_dir: `model/` of its entry; None for the base itself.
    trained: the train entry behind it, and its manifest; None for the base, and where the train
        entry of a merged model is no longer in the store.
    head_seed: draws the classification head that the base lacks.
    """

    kind: Literal["base", "candidate", "finished"]
    task: Task
    dtype: Dtype
    base: Path
    labels: list[str] | None
    model_dir: Path | None
    merged: bool
    trained_dir: Path | None
    trained: Manifest | None
    head_seed: int

    @property
    def is_adapter(self) -> bool:
        return self.model_dir is not None and is_adapter(self.model_dir)

    @property
    def is_prompt(self) -> bool:
        """Whether it is the base's own weights, asked in another way."""
        return self.model_dir is not None and is_prompt(self.model_dir)

    @property
    def whole_dir(self) -> Path:
        """The directory of the whole model that is loaded: its own, or that of its base."""
        if self.model_dir is None or self.is_adapter or self.is_prompt:
            return self.base
        return self.model_dir

    def shots(self) -> Shots | None:
        """The examples that stand before each prompt, if any do."""
        return None if self.model_dir is None else Shots.load(self.model_dir)

    @property
    def method(self) -> str:
        """The recipe's word for how it was tuned, or `base`."""
        if self.trained is not None:
            return str(self.trained.spec["candidate"]["method"])
        return "base" if self.kind == "base" else "unknown"

    @property
    def training_facts(self) -> dict[str, Any]:
        return {} if self.trained is None else self.trained.facts

    def load(self) -> torch.nn.Module:
        """The model under test, on the CPU, in evaluation mode."""
        if self.model_dir is None:
            return self.load_base()
        return frozen(load_trained(self.base, self.model_dir, self.task, self.labels, self.dtype))

    def load_base(
        self, dtype: Dtype | None = None, quantisation: Quantisation | None = None
    ) -> torch.nn.Module:
        """The untouched base, with a drawn head where the task asks for one."""
        return frozen(
            load_base(
                self.base,
                self.task,
                self.labels,
                dtype or self.dtype,
                head_seed=self.head_seed,
                quantisation=quantisation,
            )
        )

    def base_beside(self, model: torch.nn.Module) -> torch.nn.Module:
        """What a subject is compared with, where it runs: its base, or the model itself where its
        weights are the base's."""
        own = self.kind != "base" and not self.is_prompt
        return self.load_base().to(runtime.device()) if own else model

    def load_merged(self) -> torch.nn.Module:
        """The adapter folded into a base of its own, as a plain transformers model. As the merge
        stage does, into the base as it is: never into a quantised one."""
        assert self.model_dir is not None
        adapter: Any = load_trained(
            self.base, self.model_dir, self.task, self.labels, self.dtype, quantised_base=False
        )
        return frozen(folded(adapter))


def folded(adapter: Any) -> torch.nn.Module:
    """An adapter's model, plain and with all that was learned in its own weights.

    PEFT's own unloading takes a head for one layer: with IA3 it asks a pooler, which holds one,
    for its weight. So the heads leave their wrappers first.
    """
    for name, module in list(adapter.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, own = name.rpartition(".")
            head = module.modules_to_save[module.active_adapters[0]]
            setattr(adapter.get_submodule(parent), own, head)
    return cast(torch.nn.Module, adapter.merge_and_unload())


def frozen(model: torch.nn.Module) -> torch.nn.Module:
    """A model as it is served: in evaluation mode, no weight asking for a gradient.

    It is more than tidiness: on a CPU the same bfloat16 forward pass, under inference mode, was
    seen to take 16 or 22 ms by whether its weights ask for gradients, which PEFT's do not.
    """
    return model.eval().requires_grad_(False)


def read_subject(spec: EvaluateSpec, paths: dict[str, Path]) -> Subject:
    """The subject of a call, from the manifest of the entry that it names."""
    labels = read_labels(paths["prepared"]) if is_labelled(spec.task) else None
    entry = paths.get("subject")
    assert (entry is None) == (spec.subject == "base"), "every subject but the base has a path"
    manifest = None if entry is None else read_manifest(entry)
    trained_dir = entry
    if entry is not None and manifest is not None and manifest.stage == "merge":
        trained_dir = train_entry_of(entry, manifest)
    return Subject(
        kind=spec.subject,
        task=spec.task,
        dtype=spec.dtype,
        base=paths["base"],
        labels=labels,
        model_dir=None if entry is None else entry / "model",
        merged=manifest is not None and manifest.stage == "merge",
        trained_dir=trained_dir,
        trained=None if trained_dir is None else read_manifest(trained_dir),
        head_seed=spec.train.seed,
    )


def train_entry_of(entry: Path, manifest: Manifest) -> Path | None:
    """The train entry that a merge entry was made from: its sibling in the same store."""
    trained = entry.parent.parent / "train" / manifest.inputs.get("trained", "")
    if (trained / "manifest.json").exists():
        return trained
    warn(f"{entry}: its train entry is not in this store, so the training figures are left out")
    return None
