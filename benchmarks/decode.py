"""Decoding with Turbo heads beside transformers' generate() and Medusa-1's heads.

    python benchmarks/decode.py [--quick] [--work DIR] [--tasks json] [--sizes grown]
                                [--batches 1,16] [--turns 0.5]
    python benchmarks/decode.py --ties [--sizes embedded] [--work DIR] [--tasks json]

Two models (the embedded base; the same grown to 128 M parameters, whose decoding is bound by
memory traffic), each tuned on two tasks (`speculation/subjects.py`), in bfloat16. All contenders
write the same greedy answers to the same test prompts and take turns; prompts are in the time.
Ratios are of seconds a token in the same turn: their median and its 95 % interval. Accepted
lengths are compared on trees of a fixed number of nodes, where no clock takes part.

`--ties` times nothing: of the first 256 test prompts, how many answers part from generate()'s or
from our own loop's without drafts, and whether the two likeliest tokens were a near tie there.

Models, heads and states are made first, and kept in DIR for the next time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import product
from pathlib import Path

from common import Result, at_least, at_most, write
from speculation.contenders import (
    ASSISTED,
    COPIES,
    GENERATE,
    HEADS,
    HEADS_ALONE,
    LOOKUP,
    LOOKUP_TOKENS,
    MEDUSA,
    PLAIN,
    STATIC,
    Write,
    race,
)
from speculation.material import desk_of, learned, loaded, prompts_of
from speculation.medusa import saved_medusa
from speculation.subjects import SIZES, TASKS, TURBO, subject
from speculation.ties import partings

from schemas.report import Interval
from tasks.core import runtime
from tasks.core.waiting import waiting
from tasks.evaluate.latency import median_ratio, quantile
from tasks.speculate.heads import TurboHeads
from tasks.speculate.pace import Fixed

ROOT = Path(__file__).resolve().parents[1]

#: What speculation has to bring, by subject and batch size.
BARS = {"grown, json": {1: {"generate": 3.5, "speculation": 2.0}, 16: {"generate": 2.0}}}
#: Subjects' task and batch size with a compiled forward pass: inductor takes most of a minute.
COMPILED = ("json", 1)
#: The subject whose LoRA and heads are trained once more, one after the other: what was made before
#: was made beside who knows what.
TIMED = "grown, json"
#: Batch sizes whose peak memory is measured.
PEAKS = (1, 64)
#: Turns of each batch size, without those that warm up.
TURNS = {1: 24, 4: 10, 16: 8, 64: 6}
FEWEST_TURNS = 3
QUICK_TURNS = {1: 6, 16: 3}
#: Times as many of the small model's, where passes are short and drafts seldom pay.
MORE_TURNS = {("embedded", 4): 2, ("embedded", 16): 4, ("embedded", 64): 4}
WARM_UPS = 2
#: Answers whose accepted lengths are compared, and nodes of their trees.
COMPARED, NODES = 32, (16, 64)
#: Answers that are compared to the token, and rows of a batch of them.
TIED, TIED_ROWS = 256, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the JSON task alone, batch 1 and 16")
    parser.add_argument("--work", type=Path, help="keep what is made here; else nothing is kept")
    parser.add_argument("--tasks", default=",".join(TASKS), help="default: all of them")
    parser.add_argument("--turns", type=float, default=1.0, help="times as many turns")
    parser.add_argument("--ties", action="store_true", help="compare answers, time nothing")
    parser.add_argument("--sizes", default=",".join(SIZES), help="default: both")
    parser.add_argument("--batches", help="e.g. 1,16; default: all; with some no peaks")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        size, task, name, batch = arguments.peak
        print(peak(arguments.work, size, task, name, int(batch)))
        return
    # Threads wait for each other as they do in every stage.
    if added := waiting(os.environ):
        environment = {**os.environ, **added, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    with tempfile.TemporaryDirectory(prefix="decode-") as name:
        work = (arguments.work or Path(name)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        tasks, sizes = arguments.tasks.split(","), arguments.sizes.split(",")
        if arguments.ties:
            rows = ties(work, tasks, sizes)
        elif arguments.quick:
            rows = measure(work, ["json"], sizes, QUICK_TURNS)
        else:
            chosen = map(int, arguments.batches.split(",")) if arguments.batches else TURNS
            turns = {batch: TURNS[batch] * arguments.turns for batch in chosen}
            rows = measure(work, tasks, sizes, turns)
            if not arguments.batches:
                rows += peaks(work)
    write(
        "ties" if arguments.ties else "decode",
        rows,
        quick=arguments.quick,
        notes=" ".join(__doc__.split("\n\n", 2)[2].split()),
    )


def measure(
    work: Path, tasks: list[str], sizes: list[str], turns_of: Mapping[int, float]
) -> list[Result]:
    """turns_of: by batch size."""
    rows: list[Result] = []
    slowest: list[tuple[float, str]] = []
    for task, size in product(tasks, sizes):
        bench = Bench(size, task, work)
        began = time.monotonic()
        rows += bench.training() + bench.lengths()
        for batch, usual in turns_of.items():
            turns = round(usual * MORE_TURNS.get((size, batch), 1))
            found, beside = bench.speeds(batch, max(turns, FEWEST_TURNS))
            rows += found
            slowest.append((beside, f"x: {bench.title}, batch {batch}"))
            print(f"{slowest[-1]}", file=sys.stderr, flush=True)
        print(f"{bench.title}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    worst, where = min(slowest)
    return [*rows, at_least("heads to none, at worst", worst, where, 0.97)]


def peaks(work: Path) -> list[Result]:
    rows: list[Result] = []
    for batch, name in product(PEAKS, (GENERATE, PLAIN, HEADS, MEDUSA)):
        mib = spawn_peak(work, "grown", "json", name, str(batch))
        rows.append(Result(f"grown, json, batch {batch}, {name}: peak", round(mib), "MiB"))
    return rows


def ties(work: Path, tasks: list[str], sizes: list[str]) -> list[Result]:
    """Of the loop without drafts and with heads, at one batch size and at a fixed number of nodes:
    answers that part from another's, and the widest gap where they do."""
    rows: list[Result] = []
    for task, size in product(tasks, sizes):
        bench = Bench(size, task, work)
        heads, desk = bench.heads, bench.desk
        writers = {
            GENERATE: desk.generate(),
            PLAIN: desk.loop(),
            HEADS: desk.loop(heads, lookup=True, pace=Fixed(NODES[0])),
        }
        found: dict[str, list[list[int]]] = {name: [] for name in writers}
        prompts = bench.prompts[:TIED]
        for at in range(0, len(prompts), TIED_ROWS):
            for name, write_ in writers.items():
                found[name] += write_(prompts[at : at + TIED_ROWS])[0]
        for one, other in ((PLAIN, GENERATE), (HEADS, GENERATE), (HEADS, PLAIN)):
            parted = partings(bench.model, prompts, found[one], found[other])
            told = f"{bench.title}, {one} from {other}"
            rows += [
                Result(f"{told}: answers that part", parted.rate, f"share of {parted.texts}"),
                at_most(f"{told}: widest gap", parted.widest, "of twice the noise", 1.0),
            ]
            print(rows[-2:], parted, file=sys.stderr, flush=True)
    return rows


class Bench:
    """One subject's figures."""

    def __init__(self, size: str, task: str, work: Path) -> None:
        self.task, self.title, self.work = task, f"{size}, {task}", work
        self.subject = subject(size, task, work)
        self.entry = self.subject.heads(TURBO)
        self.model = loaded(self.subject.merged.path / "model")
        self.desk = desk_of(self.subject, self.model)
        self.prompts = prompts_of(self.subject)
        self.heads = TurboHeads.load(self.entry.path / "heads")
        # What drafts for a model in transformers is a smaller model for the same task.
        self.assistant = (
            loaded(subject("embedded", task, work).merged.path / "model")
            if size == "grown"
            else None
        )

    @cached_property
    def medusa(self) -> TurboHeads:
        """Medusa-1's heads. Only where they are asked for: they are larger than the model."""
        work = self.work
        return saved_medusa(
            work / f"medusa-{self.subject.merged.key[:12]}.safetensors",
            self.desk.parts,
            lambda: learned(self.subject, self.desk, TURBO, work),
            TURBO,
        )

    def contender(self, name: str) -> Write:
        desk = self.desk
        made: dict[str, Callable[[], Write]] = {
            GENERATE: desk.generate,
            STATIC: desk.static,
            LOOKUP: lambda: desk.generate(prompt_lookup_num_tokens=LOOKUP_TOKENS),
            ASSISTED: lambda: desk.generate(assistant_model=self.assistant),
            PLAIN: desk.loop,
            COPIES: lambda: desk.loop(lookup=True),
            HEADS: lambda: desk.loop(self.heads, lookup=True),
            HEADS_ALONE: lambda: desk.loop(self.heads),
            MEDUSA: lambda: desk.loop(self.medusa),
        }
        return made[name]()

    def names(self, batch: int) -> list[str]:
        single = [LOOKUP, *([ASSISTED] if self.assistant else [])] if batch == 1 else []
        compiled = [STATIC] if (self.task, batch) == COMPILED else []
        return [GENERATE, *compiled, *single, PLAIN, COPIES, HEADS_ALONE, HEADS, MEDUSA]

    def asked(self, batch: int, turns: int) -> list[list[list[int]]]:
        every = self.prompts
        return [
            [every[(turn * batch + row) % len(every)] for row in range(batch)]
            for turn in range(turns)
        ]

    def speeds(self, batch: int, turns: int) -> tuple[list[Result], float]:
        """Figures of one batch size, and the heads' speed beside none."""
        contenders = {name: self.contender(name) for name in self.names(batch)}
        clocks, alike = race(contenders, self.asked(batch, turns + WARM_UPS), WARM_UPS)
        rows, answers = [], (turns + WARM_UPS) * batch
        for name, clock in clocks.items():
            told = f"{self.title}, batch {batch}, {name}"
            ratio = median_ratio(clocks[GENERATE].each(), clock.each())
            latency = [quantile(clock.seconds, share) * 1e3 for share in (0.5, 0.95)]
            each = quantile(clock.each(), 0.5) * batch * 1e3
            rows += [
                Result(f"{told}: speed", round(clock.rate, 1), "tokens/s"),
                Result(f"{told}: to generate()", round(ratio.value, 3), span(ratio)),
                Result(f"{told}: p50 of a batch's answers", round(latency[0], 1), "ms"),
                Result(f"{told}: p95 of the same", round(latency[1], 1), "ms"),
                Result(f"{told}: p50 of a row's token", round(each, 2), "ms"),
                Result(f"{told}: answers as generate()'s", alike[name] / answers, "share"),
            ]
            if clock.account.passes:
                nodes = clock.account.nodes / sum(clock.account.lengths.values())
                rows += [
                    Result(f"{told}: tokens a pass", round(clock.account.tokens_per_pass, 3), ""),
                    Result(f"{told}: nodes a pass and row", round(nodes, 1), ""),
                ]
        told = f"{self.title}, batch {batch}"
        own = median_ratio(clocks[PLAIN].each(), clocks[HEADS].each())
        name = f"{told}, heads to none: speculation alone"
        bars = BARS.get(self.title, {}).get(batch, {})
        if "speculation" in bars:
            rows.append(at_least(name, own.value, f"x {span(own)}", bars["speculation"]))
        else:
            rows.append(Result(name, round(own.value, 3), f"x {span(own)}"))
        if "generate" in bars:
            ratio = median_ratio(clocks[GENERATE].each(), clocks[HEADS].each())
            name = f"{told}, heads to generate()"
            rows.append(at_least(name, ratio.value, f"x {span(ratio)}", bars["generate"]))
        return rows, own.value

    def lengths(self) -> list[Result]:
        """Tokens a pass on trees of as many nodes: Turbo's heads and Medusa-1's."""
        rows, batch = [], self.prompts[:COMPARED]
        config = self.heads.config
        for nodes in NODES:
            found = {}
            for name, heads in (("Turbo", self.heads), ("Medusa-1", self.medusa)):
                _, account = self.desk.loop(heads, pace=Fixed(nodes))(batch)
                assert account is not None
                found[name] = account.tokens_per_pass
                told = f"{self.title}, {nodes} nodes, {name}"
                rows.append(Result(f"{told}: tokens a pass", round(found[name], 3), ""))
                shares = [account.accepted[at] / account.drafted[at] for at in account.drafted]
                text = " ".join(f"{share:.3f}" for share in shares)
                rows.append(Result(f"{told}: right to each depth", text, "share of passes"))
            told = f"{self.title}, {nodes} nodes, tokens a pass to Medusa-1's"
            rows.append(at_least(told, found["Turbo"] / found["Medusa-1"], "x", 1.0))
        stored = sum(weight.numel() for weight in self.heads.state_dict().values())
        theirs = sum(weight.numel() for weight in self.medusa.state_dict().values())
        rows += [
            Result(
                f"{self.title}: shape of the heads",
                str((config.heads, config.rank, config.state)),
                "heads, rank, state",
            ),
            Result(f"{self.title}: parameters of Turbo's heads", stored / 1e6, "M, as stored"),
            Result(f"{self.title}: parameters of Medusa-1's", theirs / 1e6, "M"),
            at_most(f"{self.title}: parameters to Medusa-1's", stored / theirs, "x", 0.05),
        ]
        return rows

    def training(self) -> list[Result]:
        """What the heads cost to train, a token, beside the LoRA before them."""
        lora, heads = self.subject.lora.facts, self.entry.facts
        if self.title == TIMED:
            lora, heads = (entry.facts for entry in self.subject.trained_again(TURBO))
        share = lora["tokens_per_s"] / heads["tokens_per_s"]
        seconds = self.entry.manifest.provenance.seconds
        told = f"{self.title}, training"
        parameters = sum(weight.numel() for weight in self.model.parameters()) / 1e6
        name = f"{told}: heads' time to LoRA's, a token"
        beside = at_most(name, share, "x", 0.15) if self.title == TIMED else None
        return [
            Result(f"{told}: parameters of the model", round(parameters, 1), "M"),
            Result(f"{told}: loss of the LoRA at the end", lora["final_loss"], "nats"),
            Result(f"{told}: LoRA", round(lora["tokens_per_s"]), "tokens/s"),
            Result(f"{told}: heads", round(heads["tokens_per_s"]), "tokens/s"),
            beside or Result(name, round(share, 3), "x, not one after the other"),
            Result(f"{told}: heads, the whole stage", seconds, "s"),
        ]


def span(ratio: Interval) -> str:
    return f"[{ratio.low:.2f}, {ratio.high:.2f}]"


def spawn_peak(work: Path, *what: str) -> float:
    command = [sys.executable, __file__, "--work", str(work), "--peak", *what]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stderr[-3000:]}")
    return float(done.stdout.splitlines()[-1])


def peak(work: Path, size: str, task: str, name: str, batch: int) -> float:
    """MiB that one contender takes at most while it writes, beside an idle process that has
    loaded nothing: weights, heads, cache and what passes hold."""
    import speculation.material  # noqa: F401  # what is imported does not count

    floor = runtime.resident_mib()
    bench = Bench(size, task, work)
    bench.assistant = None
    write = bench.contender(name)
    write(bench.asked(batch, 1)[0])
    return runtime.peak_mib() - floor


if __name__ == "__main__":
    main()
