"""What the model itself writes after the train rows' prompts: what its heads learn to foresee.

Answers of the data are not taken: where the model would write something else, a draft of the
given answer is refused. Greedy and sampled continuations both are, since both are served.

Shapes: B texts of a shard, T tokens of the longest, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.errors import UserError
from schemas.turbo import Turbo
from tasks.core.progress import bar, warn
from tasks.core.tokens import TokenRows
from tasks.speculate.choose import Choice, Greedy, Sampled
from tasks.speculate.decode import Writer
from tasks.speculate.parts import Parts
from tasks.turbo import states
from tasks.turbo.states import Texts

#: Prompts that are continued together, and whose texts are one shard.
SHARD = 64


@dataclass(frozen=True)
class Prompts:
    """Prompts to continue: each once, in an order that the seed alone decides. sampled: whether
    its continuation is."""

    tokens: list[NDArray[np.int32]]
    sampled: NDArray[np.bool_]


def choose_prompts(rows: TokenRows, turbo: Turbo, longest: int) -> Prompts:
    """The prompts of the train rows that are continued, the longest ones left out aloud.

    longest: tokens that a prompt may have, so that there is room to write.

    Raises:
        UserError: none is left.
    """
    assert rows.answer_start is not None, "rows of a causal task"
    known: dict[bytes, NDArray[np.int32]] = {}
    for index, start in enumerate(rows.answer_start.tolist()):
        prompt = rows.row(index)[:start]
        known.setdefault(prompt.tobytes(), prompt)
    fitting = [prompt for prompt in known.values() if 0 < len(prompt) <= longest]
    if len(fitting) < len(known):
        warn(f"{len(known) - len(fitting)} prompts leave no room to write: not continued")
    if not fitting:
        raise UserError.at(
            "finish.turbo",
            "no train row's prompt leaves room to write in the base's context",
            "give train rows with shorter prompts, or lower evaluate.max_new_tokens",
        )
    random = np.random.default_rng(turbo.seed)
    order = random.permutation(len(fitting))[: turbo.prompts]
    sampled = random.random(len(order)) < turbo.sampled
    return Prompts([fitting[index] for index in order], sampled)


def write(
    prompts: Prompts,
    parts: Parts,
    stops: frozenset[int],
    max_new_tokens: int,
    turbo: Turbo,
    directory: Path,
) -> int:
    """Write the shards of all prompts that are not there yet. Returns how many there are."""
    writer = Writer(parts)
    shards = list(states.shards_of(len(prompts.tokens), SHARD))
    missing = [one for one in shards if not states.is_whole(directory, one[0])]
    done = len(prompts.tokens) - sum(part.stop - part.start for _, part in missing)
    with bar("continue", len(prompts.tokens), "prompts", done=done) as progress:
        for number, part in missing:
            texts = continued(prompts, part, writer, stops, max_new_tokens, turbo, number)
            states.save(texts, directory, number)
            progress.advance(part.stop - part.start)
    return len(shards)


def continued(
    prompts: Prompts,
    part: slice,
    writer: Writer,
    stops: frozenset[int],
    max_new_tokens: int,
    turbo: Turbo,
    number: int,
) -> Texts:
    """The texts of one shard. What is sampled depends on the seed and the shard's number."""
    asked = [prompt.tolist() for prompt in prompts.tokens[part]]
    sampled = prompts.sampled[part]
    answers: list[list[int]] = [[] for _ in asked]
    seed = int(np.random.default_rng([turbo.seed, number]).integers(2**31))
    for drawn in (False, True):
        mine = [index for index in range(len(asked)) if sampled[index] == drawn]
        if not mine:
            continue
        choice: Choice = Greedy()
        if drawn:
            choice = Sampled(len(mine), max_new_tokens, temperature=turbo.temperature, seed=seed)
        written, _ = writer.write([asked[index] for index in mine], max_new_tokens, stops, choice)
        for index, answer in zip(mine, written, strict=True):
            answers[index] = answer
    return thoughts(writer.parts, asked, answers)


@torch.inference_mode()
def thoughts(parts: Parts, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Texts:
    """What the lm_head read where each token of each answer was written."""
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, rows))
    ids_BT = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        ids_BT[index, : len(row)] = torch.tensor(row)
    # Padding is behind, where causal attention never looks.
    hidden_BTD = parts.read(ids_BT.to(parts.device)).cpu()
    found = [
        hidden_BTD[index, len(prompt) - 1 : len(prompt) - 1 + len(answer)]
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    tokens = [token for answer in answers for token in answer]
    ends = np.cumsum([0, *map(len, answers)])
    return Texts(torch.cat(found), torch.tensor(tokens, dtype=torch.int32), torch.from_numpy(ends))
