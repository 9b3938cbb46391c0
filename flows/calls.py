"""The calls of one recipe: for each stage what it is told, which entries and files it reads.

A spec holds what changes a stage's result and nothing else (`schemas/stages.py`), so these
functions also say what a stage does *not* depend on: evaluating the untouched base, for instance,
does not read the learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import yaml

from flows.home import Home
from flows.hub import base_directory, sources
from flows.machine import Dtype, resolve_dtype
from flows.remember import FileHashes
from schemas.candidates import CandidateBase, TrainOverrides
from schemas.errors import Problem, StageError, UserError
from schemas.load import resolve
from schemas.manifest import FileFormat
from schemas.recipe import Evaluate, HoldOut, Recipe, Search, Train
from schemas.report import TASK_METRICS, Trial
from schemas.stages import (
    Call,
    CompareSpec,
    CostSpec,
    EvaluateSpec,
    InspectSpec,
    MergeSpec,
    PageSpec,
    PrepareSpec,
    RegisterSpec,
    Spec,
    TrainSpec,
    TurboSpec,
)
from schemas.tasks import is_labelled, reads_images
from schemas.together import Candidate
from schemas.turbo import Turbo
from tasks.core.bases import (
    base_files,
    refuse_pickles,
    require_safetensors,
    tokenizer_files,
    weight_files,
)
from tasks.core.store import read_manifest
from tasks.prepare.references import named_images


class Made(Protocol):
    """An entry, or one that is still to be made: what later calls need to know of it."""

    @property
    def key(self) -> str: ...

    @property
    def path(self) -> Path: ...


@dataclass(frozen=True)
class Step:
    """A call and whom it is about: a candidate's label, `base`, `finished`, or nobody.

    seed: where the recipe has several. trial: the learning rate that a search tries.
    """

    call: Call
    label: str = ""
    seed: int | None = None
    trial: float | None = None

    @property
    def title(self) -> str:
        """Stage, subject, and what tells it from others of the same: `train lora seed 1`."""
        words = [self.call.stage, self.label]
        if self.trial is not None:
            words.append(f"at rate {self.trial:.3g}")
        elif self.seed is not None:
            words.append(f"seed {self.seed}")
        return " ".join(filter(None, words))


#: Weights that a plan hashes where they are new to it: more take longer than it may.
PLANNED_BYTES = 2**29


class NotYetError(StageError):
    """What is asked for next is still to be made."""


def figures_of(made: Made) -> dict[str, float]:
    """The flat figures of an evaluation.

    Raises:
        NotYetError: it is still to be made.
    """
    try:
        return dict(read_manifest(made.path).facts["figures"])
    except FileNotFoundError:
        raise NotYetError(f"{made.path} is not there") from None


class Calls:
    """Makes the steps of one recipe in one home. Nothing heavy is imported or read twice.

    planning: the base's weights need not be here, and none of a hub's are fetched. Steps that read
    them then raise a NotYetError, as they do where hashing them takes long.
    """

    def __init__(
        self, recipe: Recipe, recipe_path: Path, home: Home, *, planning: bool = False
    ) -> None:
        self.recipe, self.home, self._planning = recipe, home, planning
        self._path = recipe_path
        self._hashes = FileHashes(home.cache / "hashes.json")
        check_sources(recipe, recipe_path)
        self.base = base_directory(recipe, recipe_path, weights=not planning)
        check_base(self.base, weights=not planning)

    def inspect(self) -> Step:
        """Reads the base's configuration alone: shapes need no weights and no rows."""
        candidates = [labelled(candidate) for candidate in self.recipe.candidates]
        spec = InspectSpec(task=self.recipe.task, candidates=candidates)
        outside = {"base": self._hashes.of_files([self.base / "config.json"])}
        return self._step(spec, "report", paths=self._with_base, outside=outside)

    def prepare(self, holdout: float | None = None) -> Step:
        """The recipe's rows; with `holdout`, its train rows alone, cut in two for a search."""
        data = self.recipe.data
        label = ""
        if holdout is not None:
            taken = data.test.holdout if isinstance(data.test, HoldOut) else 0.0
            share = HoldOut(holdout=holdout, after=taken)
            data = data.model_copy(update={"test": share, "retention": None, "test_rows": None})
            label = "for the search"
        paths = {"base": self.base}
        outside = {"base": self._hashes.of_files(tokenizer_files(self.base))}
        renamed: dict[str, Any] = {}
        for split, source in sources(data).items():
            if source.path.startswith("hub:"):
                continue
            paths[split] = resolve(source.path, self._path)
            outside[split] = self._hashes.of_file(paths[split])
            if reads_images(self.recipe.task):
                names = named_images(paths[split], source.columns.get("image", "image"))
                outside[f"{split} images"] = self._hashes.of_named(names, paths[split].parent)
            renamed[split] = source.model_copy(update={"path": paths[split].name})
        spec = PrepareSpec(task=self.recipe.task, data=data.model_copy(update=renamed))
        return self._step(spec, "rows", paths=paths, outside=outside, label=label)

    def train(self, candidate: Candidate, rows: Made, seed: int | None = None) -> Step:
        """seed: None for the only one, and where it changes nothing."""
        schedule = self.recipe.train.for_candidate(candidate.train)
        schedule = schedule.model_copy(
            update={"seed": self.recipe.all_seeds[0] if seed is None else seed}
        )
        return replace(self._train(candidate, rows, schedule), seed=seed)

    def cost(self, rows: Made | None, times: float = 1.0) -> Step:
        """What each candidate would cost.

        rows: None where they are still to be prepared. times: on a base so many times as large.
        """
        outside = {"base": self._hashes.of_files([self.base / "config.json"])}
        inputs = {"prepared": rows} if rows else {}
        spec = cost_spec(self.recipe, self.dtype).model_copy(update={"times": times})
        label = "" if times == 1 else f"base x {times:g}"
        return self._step(spec, "report", inputs, self._with_base, outside, label)

    def trial(self, candidate: Candidate, rows: Made, search: Search, rate: float) -> Step:
        """A shorter training at another rate."""
        schedule = self.recipe.train.for_candidate(candidate.train)
        length: dict[str, Any] = {"epochs": schedule.epochs * search.share}
        if schedule.max_steps is not None:
            length["max_steps"] = max(1, round(schedule.max_steps * search.share))
        schedule = schedule.model_copy(
            update={**length, "learning_rate": rate, "seed": search.seed}
        )
        return replace(self._train(candidate, rows, schedule), trial=rate)

    def _train(self, candidate: Candidate, rows: Made, schedule: Train) -> Step:
        if not candidate.TRAINS:  # of the schedule it reads the seed at most
            schedule = Train(seed=schedule.seed) if candidate.seeded else Train()
        spec = TrainSpec(
            task=self.recipe.task,
            candidate=candidate.as_trained(),
            train=schedule,
            dtype=self.dtype,
        )
        kind, inputs = candidate.FORMAT, {"prepared": rows}
        return self._step(spec, kind, inputs, self._with_base, self._weights, candidate.label)

    def evaluate(
        self, label: str, rows: Made, subject: Made | None, heads: Made | None = None
    ) -> Step:
        """`subject` is None for the untouched base; `label` is `base`, `finished` or a candidate's.

        heads: with which the subject is to write.

        Of the training schedule only what a step costs is told: how many tokens it takes.
        """
        train = self.recipe.train
        who: Any = label if label in ("base", "finished") else "candidate"
        spec = EvaluateSpec(
            task=self.recipe.task,
            subject=who,
            evaluate=self.recipe.evaluate,
            train=Train(
                batch_tokens=train.batch_tokens,
                micro_batch_tokens=train.micro_batch_tokens,
                gradient_checkpointing=train.gradient_checkpointing,
            ),
            dtype=self.dtype,
        )
        given = {"subject": subject, "heads": heads}
        inputs = {"prepared": rows} | {name: made for name, made in given.items() if made}
        return self._step(spec, "report", inputs, self._with_base, self._weights, label)

    def score(self, like: Step, rows: Made, trained: Made) -> Step:
        """The accuracy alone of what the step `like` trained."""
        evaluate = self.recipe.evaluate
        spec = EvaluateSpec(
            task=self.recipe.task,
            subject="candidate",
            evaluate=Evaluate(
                max_new_tokens=evaluate.max_new_tokens,
                generate_rows=evaluate.generate_rows,
                bootstrap=evaluate.bootstrap,
            ),
            train=Train(),
            dtype=self.dtype,
            accuracy_only=True,
        )
        inputs = {"prepared": rows, "subject": trained}
        step = self._step(spec, "report", inputs, self._with_base, self._weights, like.label)
        return replace(step, seed=like.seed, trial=like.trial)

    def compare(self, evaluated: dict[str, dict[int, Made]]) -> Step:
        """evaluated: label, seed: the evaluation."""
        spec = CompareSpec(
            labels=list(evaluated),
            seeds=self.recipe.all_seeds,
            metric=self.metric,
            more_is_better=self.more_is_better,
            resamples=self.recipe.evaluate.bootstrap,
        )
        inputs = {
            f"{label}/{seed}": entry
            for label, seeds in evaluated.items()
            for seed, entry in seeds.items()
        }
        return self._step(spec, "report", inputs)

    @property
    def metric(self) -> str:
        """By which candidates are told apart and rates are chosen: the goal of `select` where
        that is a metric, else the task's first."""
        metrics = TASK_METRICS[self.recipe.task]
        select = self.recipe.select
        goal = select.maximize or select.minimize
        return goal if goal in metrics else next(iter(metrics))

    @property
    def more_is_better(self) -> bool:
        return TASK_METRICS[self.recipe.task][self.metric]

    def merge(self, label: str, rows: Made, trained: Made) -> Step:
        """Of the rows a classifier needs its labels, and a causal model nothing."""
        spec = MergeSpec(finish=self.recipe.finish)
        labels = {"prepared": rows} if is_labelled(self.recipe.task) else {}
        inputs = {"trained": trained, **labels}
        return self._step(spec, "transformers", inputs, self._with_base, self._weights, label)

    def turbo(self, label: str, turbo: Turbo, rows: Made, finished: Made) -> Step:
        """Heads for the finished model."""
        spec = TurboSpec(
            task=self.recipe.task,
            turbo=turbo,
            max_new_tokens=self.recipe.evaluate.max_new_tokens,
            dtype=self.dtype,
        )
        inputs = {"prepared": rows, "subject": finished}
        return self._step(spec, "heads", inputs, self._with_base, self._weights, label)

    def register(
        self, rows: Made, finished: Made, evaluated: Made, page: Made, heads: Made | None = None
    ) -> Step:
        recipe = self.recipe
        spec = RegisterSpec(
            task=recipe.task,
            name=recipe.register_.name,
            recipe_name=recipe.name,
            base={"model": recipe.base.model, "revision": recipe.base.revision},
            max_new_tokens=recipe.evaluate.max_new_tokens,
            tracking=self.home.registry,
        )
        inputs = {"prepared": rows, "finished": finished, "evaluated": evaluated}
        if heads is not None:
            inputs["heads"] = heads
        # Not of the key: a version keeps the page of the run that made it.
        paths = self._with_base | {"page": page.path}
        return self._step(spec, "registration", inputs, paths, self._weights)

    def page(
        self,
        inputs: dict[str, Made],
        selected: str,
        why: str,
        failed: dict[str, str],
        searched: dict[str, list[Trial]],
    ) -> Step:
        select = self.recipe.select
        tree = self.recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
        spec = PageSpec(
            recipe_name=self.recipe.name,
            recipe_yaml=yaml.safe_dump(tree, sort_keys=False, allow_unicode=True),
            labels=[name.removeprefix("train:") for name in inputs if name.startswith("train:")],
            selected=selected,
            why=why,
            failed=failed,
            searched=searched,
            goal=select.maximize or select.minimize or "",
            merges=self.recipe.finish.merge,
        )
        return self._step(spec, "page", inputs)

    @cached_property
    def dtype(self) -> Dtype:
        return resolve_dtype(self.recipe.base.dtype, self.home)

    @property
    def _with_base(self) -> dict[str, Path]:
        return {"base": self.base}

    @cached_property
    def _weights(self) -> dict[str, str]:
        if self.unread is not None:
            raise NotYetError(self.unread)
        return {"base": self._hashes.of_files(base_files(self.base))}

    @cached_property
    def unread(self) -> str | None:
        """When the steps that read the base's weights can be told, where a plan cannot tell."""
        if not self._planning:
            return None
        if not weight_files(self.base):
            return "when the base's weights are here"
        size = self._hashes.unread(base_files(self.base))
        return (
            f"when a run has read the base's {size / 2**30:.1f} GiB"
            if size > PLANNED_BYTES
            else None
        )

    def _step(
        self,
        spec: Spec,
        kind: FileFormat,
        inputs: dict[str, Made] | None = None,
        paths: dict[str, Path] | None = None,
        outside: dict[str, str] | None = None,
        label: str = "",
    ) -> Step:
        made = inputs or {}
        places = (paths or {}) | {name: entry.path for name, entry in made.items()}
        call = Call(
            stage=spec.STAGE,
            stage_version=spec.VERSION,
            format=kind,
            spec=spec.model_dump(mode="json"),
            unkeyed=spec.UNKEYED,
            paths={name: str(path) for name, path in places.items()},
            inputs={name: entry.key for name, entry in made.items()},
            outside=outside or {},
        )
        return Step(call, label)


def labelled(candidate: Candidate) -> CandidateBase:
    """A candidate as it is trained, under the name that it has in the recipe's tables."""
    trained = candidate.as_trained()
    alike = trained.default_name() == candidate.default_name()
    return trained.model_copy(update={"name": candidate.name if alike else candidate.label})


def cost_spec(recipe: Recipe, dtype: str) -> CostSpec:
    """Of a recipe what decides costs: how much is trained at a time, and nothing of how."""
    train, evaluate = recipe.train, recipe.evaluate
    candidates = [
        labelled(candidate).model_copy(
            update={
                "train": TrainOverrides(
                    epochs=candidate.train.epochs,
                    max_steps=candidate.train.max_steps,
                    batch_tokens=candidate.train.batch_tokens,
                )
            }
        )
        for candidate in recipe.candidates
    ]
    return CostSpec.model_validate(
        {
            "task": recipe.task,
            "shape": recipe.base.shape,
            "candidates": [candidate.model_dump(mode="json") for candidate in candidates],
            "train": Train(
                epochs=train.epochs,
                max_steps=train.max_steps,
                batch_tokens=train.batch_tokens,
                micro_batch_tokens=train.micro_batch_tokens,
                gradient_checkpointing=train.gradient_checkpointing,
                seed=recipe.all_seeds[0],
            ),
            "evaluate": Evaluate(
                max_new_tokens=evaluate.max_new_tokens,
                batch_sizes=evaluate.batch_sizes,
                prompt_tokens=evaluate.prompt_tokens,
            ),
            "max_length": recipe.data.max_length,
            "dtype": dtype,
        }
    )


def check_base(base: Path, *, weights: bool = True) -> None:
    """Raise a UserError, before torch loads, for what is no safetensors checkpoint.

    weights: whether they have to be there; pickles may not, in any case.
    """
    if not base.is_dir():
        raise UserError.at(base, "is not a directory", "give a transformers directory")
    if not (base / "config.json").is_file():
        raise UserError.at(
            base,
            "holds no config.json",
            "give a transformers directory (config.json, *.safetensors)",
        )
    if weights:
        require_safetensors(base)
    elif not weight_files(base):
        refuse_pickles(base)


def check_sources(recipe: Recipe, recipe_path: Path) -> None:
    """Raise a UserError for hub rows without a pinned commit, since a branch can change."""
    problems = [
        Problem(
            f"{recipe_path} data.{split}",
            f"{source.path} has no `revision`",
            "pin the commit of the data set: 40 hexadecimal digits",
        )
        for split, source in sources(recipe.data).items()
        if source.path.startswith("hub:") and not source.revision
    ]
    if problems:
        raise UserError(problems)
