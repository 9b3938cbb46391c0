"""What each part of Turbo heads is worth: one thing changed at a time, on one model.

    python benchmarks/heads.py [--quick] [--work DIR] [--size grown] [--task gsm8k] [--rates]

Every variant learns from the same stored states in the same order for the same steps, and drafts
for the same test prompts with trees of 16 nodes, without lookup. Tokens a pass depend on no clock.
Losses are of texts that were not learned, and those of other numbers of heads are not comparable.
What is made on the way is kept in DIR, where `decode.py` finds it too.

With --rates instead: these heads and Medusa-1's, each at several learning rates, on trees of 16
and of 64 nodes; the best of each are compared.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from common import Result, at_least, write
from speculation.contenders import Desk
from speculation.material import Learned, desk_of, learned, loaded, prompts_of, split
from speculation.medusa import train_medusa
from speculation.subjects import SIZES, TASKS, TURBO, Subject, subject

from schemas.turbo import Turbo
from tasks.core.checkpoint import Checkpoints
from tasks.core.tokens import TokenRows
from tasks.core.waiting import waiting
from tasks.speculate import draft
from tasks.speculate.heads import HeadsConfig, TurboHeads
from tasks.speculate.pace import Fixed
from tasks.turbo import continuations
from tasks.turbo.distil import distil, heads_loss, scored_by
from tasks.turbo.sizes import sized
from tasks.turbo.states import States, save, shard_path, shards_of

NODES, COMPARED = 16, 64


@dataclass(frozen=True)
class Variant:
    """rank, state: None: as the recipe's default has them. chain: one draft of each head."""

    name: str
    heads: int = TURBO.heads
    rank: int | None = None
    state: int | None = None
    positions: float = TURBO.positions
    chain: bool = False
    given: bool = False

    def config(self, desk: Desk) -> HeadsConfig:
        vocabulary, width = desk.parts.scored.shape
        usual = sized(Turbo(heads=self.heads), width, vocabulary)
        return replace(
            usual,
            rank=usual.rank if self.rank is None else min(self.rank, width),
            state=usual.state if self.state is None else self.state,
        )


#: More than any model's width: full.
FULL = 1 << 20
VARIANTS = (
    Variant("as it is"),
    Variant("a chain, no tree", chain=True),
    Variant("no state", state=0),
    Variant("no state, full rank", rank=FULL, state=0),
    Variant("full rank", rank=FULL),
    Variant("rank 1", rank=1),
    Variant("rank 8", rank=8),
    Variant("rank 64", rank=64),
    Variant("a state of 32", state=32),
    Variant("a state of 256", state=256),
    Variant("3 heads", heads=3),
    Variant("5 heads", heads=5),
    Variant("9 heads", heads=9),
    Variant("learned from a quarter of the positions", positions=0.25),
    Variant("learned from all positions", positions=1),
    Variant("learned from the given answers", given=True),
)
QUICK = ("as it is", "a chain, no tree", "no state")

#: Learning rates, thrice each other, around the recipe's and around Medusa's own.
RATES = {"Turbo": (1e-3, 3e-3, 1e-2, 3e-2), "Medusa-1": (3e-4, 1e-3, 3e-3, 1e-2)}
TREES = (NODES, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three variants, three epochs")
    parser.add_argument("--work", type=Path, help="keep what is made here; else nothing is kept")
    parser.add_argument("--size", choices=SIZES, default="embedded")
    parser.add_argument("--task", choices=sorted(TASKS), default="json")
    parser.add_argument("--rates", action="store_true", help="rates in place of parts")
    arguments = parser.parse_args()
    if added := waiting(os.environ):
        environment = {**os.environ, **added}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    turbo = TURBO.model_copy(update={"epochs": 3.0}) if arguments.quick else TURBO
    with tempfile.TemporaryDirectory(prefix="heads-") as name:
        work = (arguments.work or Path(name)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        own = subject(arguments.size, arguments.task, work)
        chosen = rates if arguments.rates else measure
        rows = chosen(own, turbo, work, arguments.quick)
    notes = f"{arguments.size} model, {arguments.task}. " + " ".join(
        __doc__.split("\n\n", 2)[2].split()
    )
    write("heads_rates" if arguments.rates else "heads", rows, quick=arguments.quick, notes=notes)


def measure(own: Subject, turbo: Turbo, work: Path, quick: bool) -> list[Result]:
    desk, prompts = desk_of(own, loaded(own.merged.path / "model")), prompts_of(own)[:COMPARED]
    written = learned(own, desk, turbo, work)
    rows: list[Result] = []
    for variant in VARIANTS:
        if quick and variant.name not in QUICK:
            continue
        material = given(own, desk, turbo, work) if variant.given else written
        heads, parameters = trained(variant, desk, material, turbo)
        held = written.states.texts(written.held)
        at_C = torch.arange(len(held.tokens_T))
        parts, with_state = desk.parts, heads.config.state > 0
        with torch.inference_mode():
            loss = float(heads_loss(heads, parts, scored_by(parts), held, turbo, with_state, at_C))
        one = 1 if variant.chain else draft.CANDIDATES
        with patch.object(draft, "CANDIDATES", one), patch.object(draft, "BEAM", one):
            _, account = desk.loop(heads, pace=Fixed(NODES))(prompts)
        assert account is not None
        shape = f"{heads.config.heads} heads, rank {heads.config.rank}, state {heads.config.state}"
        rows += [
            Result(f"{variant.name}: tokens a pass", round(account.tokens_per_pass, 3), shape),
            Result(f"{variant.name}: loss", round(loss, 4), "nats"),
            Result(f"{variant.name}: parameters", round(parameters, 4), "of Medusa-1's"),
        ]
        print(rows[-3], rows[-2].value, file=sys.stderr, flush=True)
    return rows


def rates(own: Subject, turbo: Turbo, work: Path, quick: bool) -> list[Result]:
    """Tokens a pass by learning rate, and the best of Turbo's to the best of Medusa-1's."""
    desk, prompts = desk_of(own, loaded(own.merged.path / "model")), prompts_of(own)[:COMPARED]
    material = learned(own, desk, turbo, work)
    rows: list[Result] = []
    best = {name: dict.fromkeys(TREES, 0.0) for name in RATES}
    for name, tried in RATES.items():
        for rate in tried[1:3] if quick else tried:
            if name == "Turbo":
                at_rate = turbo.model_copy(update={"learning_rate": rate})
                heads, _ = trained(VARIANTS[0], desk, material, at_rate)
            else:
                heads = train_medusa(desk.parts, material, turbo, rate)
            for nodes in TREES:
                _, account = desk.loop(heads, pace=Fixed(nodes))(prompts)
                assert account is not None
                found = account.tokens_per_pass
                best[name][nodes] = max(best[name][nodes], found)
                told = f"{name} at {rate:g}, {nodes} nodes: tokens a pass"
                rows.append(Result(told, round(found, 3), ""))
                print(rows[-1], file=sys.stderr, flush=True)
    for nodes in TREES:
        share = best["Turbo"][nodes] / best["Medusa-1"][nodes]
        rows.append(at_least(f"{nodes} nodes: the best to Medusa-1's best", share, "x", 1.0))
    return rows


def trained(
    variant: Variant, desk: Desk, material: Learned, turbo: Turbo
) -> tuple[TurboHeads, float]:
    """Its heads, and their parameters as a share of Medusa-1's."""
    config = variant.config(desk)
    torch.manual_seed(turbo.seed)
    heads = TurboHeads(config, turbo.seed)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoints = Checkpoints(Path(scratch), variant.name)
        turbo = turbo.model_copy(update={"positions": variant.positions})
        distil(heads, desk.parts, material.states, material.chosen, turbo, checkpoints)
    return heads.requires_grad_(False), config.parameters / config.medusa_parameters


def given(own: Subject, desk: Desk, turbo: Turbo, work: Path) -> Learned:
    """States over the answers of the train rows, of as many prompts, in place of the model's."""
    rows = TokenRows.load(own.rows.path / "tokens" / "train.safetensors")
    assert rows.answer_start is not None
    directory = work / "states" / f"{own.merged.key[:12]}-given"
    chosen = np.random.default_rng(turbo.seed).permutation(len(rows))[: turbo.prompts]
    shards = list(shards_of(len(chosen), continuations.SHARD))
    for number, part in shards:
        if shard_path(directory, number).exists():
            continue
        prompts, answers = [], []
        for index in chosen[part].tolist():
            row, start = rows.row(index).tolist(), int(rows.answer_start[index])
            prompts.append(row[:start])
            answers.append(row[start : start + desk.longest])
        save(continuations.thoughts(desk.parts, prompts, answers), directory, number)
    return split(States(directory, len(shards)))


if __name__ == "__main__":
    main()
