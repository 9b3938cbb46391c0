"""The turbo stage: a finished model in, heads that draft its tokens ahead out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from schemas.errors import StageError, UserError
from schemas.stages import TurboSpec, keyed
from tasks.core import runtime
from tasks.core.checkpoint import Checkpoints
from tasks.core.files import sha256_file, sha256_json, write_atomic
from tasks.core.models import load_tokenizer, load_trained
from tasks.core.progress import say, warn
from tasks.core.stops import stop_ids
from tasks.core.store import SCRATCH
from tasks.core.tokens import TokenRows
from tasks.speculate.decode import Writer
from tasks.speculate.heads import WEIGHTS, TurboHeads
from tasks.speculate.identity import fingerprint, tokenizer_fingerprint
from tasks.speculate.parts import NotSpeculableError, Parts, parts_of
from tasks.speculate.trial import require_exact
from tasks.turbo import continuations
from tasks.turbo.distil import agreement, distil
from tasks.turbo.sizes import sized
from tasks.turbo.states import States, begun_with

TOKENS = "tokens/train.safetensors"
#: Share of the texts that are not learned, to say how often the heads are right.
HELD_OUT = 0.05


def run(spec: TurboSpec, paths: dict[str, Path], out_dir: Path) -> dict[str, Any]:
    """Distil the heads of one model. paths: base, prepared, subject. Writes heads/ and curve.json.

    Raises:
        UserError: a base whose drafts cannot be verified, heads that are too large, no prompts.
        StageError: the heads learned nothing.
    """
    rows = TokenRows.load(paths["prepared"] / TOKENS)
    whose = identity(spec, paths)
    directory = out_dir / SCRATCH / f"states-{whose[:12]}"
    if (begun := begun_with(directory)) is not None and begun != torch.get_num_threads():
        warn(f"the model's texts were begun with {begun} threads, with which it goes on")
        torch.set_num_threads(begun)
    checkpoints = Checkpoints(out_dir / SCRATCH, whose)
    runtime.seed_everything(spec.turbo.seed)
    torch.set_num_threads(checkpoints.threads)
    model: Any = load_trained(
        paths["base"], paths["subject"] / "model", spec.task, None, spec.dtype
    )
    parts = speculable(model.eval().requires_grad_(False).to(runtime.device()))
    config = sized(spec.turbo, parts.scored.shape[1], parts.scored.shape[0])
    tokenizer = load_tokenizer(paths["base"])
    longest = (parts.longest or spec.max_new_tokens + 2**20) - spec.max_new_tokens
    prompts = continuations.choose_prompts(rows, spec.turbo, longest)
    prompts = bounded(prompts, spec, parts)

    stops = stop_ids(model, tokenizer, rows)
    shards = continuations.write(prompts, parts, stops, spec.max_new_tokens, spec.turbo, directory)
    states = States(directory, shards)
    written = np.flatnonzero(states.lengths > 0)
    held = max(1, round(len(written) * HELD_OUT))
    if len(written) < 2:
        raise UserError.at(
            "finish.turbo",
            f"the model writes something after {len(written)} of {len(states)} prompts alone",
            "give more train rows, or more `prompts`",
        )
    made_for = {"model": fingerprint(parts), "tokenizer": tokenizer_fingerprint(tokenizer)}
    heads = TurboHeads(replace(config, made_for=made_for), spec.turbo.seed).to(parts.device)
    parameters, medusa = config.parameters, config.medusa_parameters
    say(
        f"turbo: {config.heads} heads of rank {config.rank}, a state of {config.state}: "
        f"{parameters:,} parameters, 1/{medusa // parameters} of Medusa-1's; "
        f"{len(written):,} texts, {int(states.lengths.sum()):,} tokens that the model wrote"
    )
    state = distil(heads, parts, states, written[:-held], spec.turbo, checkpoints)
    ahead = agreement(heads, parts, states, written[-held:])
    if max(ahead.alone + ahead.followed) == 0:
        raise StageError(
            "the heads are never right on texts that they have not learned; give more `prompts` "
            "or `epochs`, or take finish.turbo out where answers are a token or two"
        )
    target = out_dir / "heads"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    heads.save(target)
    write_atomic(out_dir / "curve.json", json.dumps([p.model_dump() for p in state.curve]))
    stored = (target / WEIGHTS).stat().st_size
    return {
        "heads": config.heads,
        "rank": config.rank,
        "state": config.state,
        "parameters": parameters,
        "medusa_parameters": medusa,
        "medusa_share": parameters / medusa,
        "stored_bytes": stored,
        "texts": len(written),
        "tokens": int(states.lengths.sum()),
        "steps": state.step,
        "distil_seconds": state.seconds,
        "tokens_per_s": state.tokens / max(state.seconds, 1e-9),
        "first_loss": state.curve[0].loss,
        "final_loss": state.curve[-1].loss,
        "right_alone": ahead.alone,
        "right_followed": ahead.followed,
        "threads": checkpoints.threads,
    }


def speculable(model: Any) -> Parts:
    """The parts of a model. Raises a UserError for one whose drafts cannot be verified."""
    try:
        parts = parts_of(model)
        require_exact(Writer(parts))
        return parts
    except NotSpeculableError as error:
        raise UserError.at(
            "finish.turbo", str(error), "remove `turbo`, or choose another base or candidate"
        ) from error


def bounded(prompts: continuations.Prompts, spec: TurboSpec, parts: Parts) -> continuations.Prompts:
    """As many prompts as have room on disk if every text were as long as it may be; aloud."""
    weight = parts.scored
    each = spec.max_new_tokens * (weight.shape[1] * weight.element_size() + 4)
    room = max(2, (spec.turbo.store_mib << 20) // each)
    if room < len(prompts.tokens):
        warn(
            f"finish.turbo.store_mib: {spec.turbo.store_mib} holds the hidden states of {room:,} "
            f"texts of {spec.max_new_tokens} tokens, so {len(prompts.tokens) - room:,} prompts are "
            "left out"
        )
    return continuations.Prompts(prompts.tokens[:room], prompts.sampled[:room])


def identity(spec: TurboSpec, paths: dict[str, Path]) -> str:
    """What a checkpoint must agree with. The store's key, of which it is part, adds the model."""
    own = keyed(spec.model_dump(mode="json"), spec.UNKEYED)
    return sha256_json([own, spec.VERSION, sha256_file(paths["prepared"] / TOKENS)])
