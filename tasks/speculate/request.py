"""What a call of transformers' `generate()` asks for, in the terms of our own loop.

transformers has by then read its configuration, defaults and special tokens; here is only what is
left to know, and what cannot be had with drafts: they are verified many at once, before it is
known which of them become the text, so nothing may depend on the text written so far.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import logits_process, stopping_criteria

from .choose import Choice, Greedy, NotBefore, Sampled

#: Settings that this loop does not have, each with the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0, 0.0),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "constraints": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "sequence_bias": (),
    "guidance_scale": (1, 1.0),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
    "watermarking_config": (),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "max_time": (),
    "stop_strings": (),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
}
#: What transformers makes of settings that this loop has.
SHAPERS = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
)
ENDS = (stopping_criteria.MaxLengthCriteria, stopping_criteria.EosTokenCriteria)
#: What generate() hands on besides, and this loop has by itself.
HANDED_ON = ("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")


class RequestError(ValueError):
    """What was asked for cannot be had with drafts, or makes no sense."""


@dataclass(frozen=True)
class Request:
    """prompts: without padding. stops: tokens that end an answer. pad: what shorter answers are
    filled up with."""

    prompts: list[list[int]]
    max_new_tokens: int
    stops: frozenset[int]
    pad: int
    choice: Choice


def read(
    input_ids: torch.Tensor,
    config: Any,
    processors: Iterable[Any],
    criteria: Iterable[Any],
    seed: int | None,
    given: dict[str, Any],
) -> Request:
    """What `generate()` asks for.

    input_ids: [B, T], padded on either side. config, processors, criteria: as transformers has
    prepared them. given: what goes to the model's forward.

    Raises:
        RequestError: settings that are not served here, all named; a padded row with a hole.
    """
    require_served(config, processors, criteria, given)
    rows, width = input_ids.shape
    longest = int(config.max_length) - width
    ends = config._eos_token_tensor
    stops = frozenset(() if ends is None else ends.tolist())
    pad = config._pad_token_tensor
    choice: Choice = Greedy()
    if config.do_sample:
        choice = Sampled(
            rows,
            longest,
            temperature=1.0 if config.temperature is None else config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            seed=seed,
        )
    shortest = (config.min_length or 0) - width
    if stops and shortest > 0:
        choice = NotBefore(choice, stops, shortest)
    prompts = unpadded(input_ids, given.get("attention_mask"), given.get("position_ids"))
    return Request(prompts, longest, stops, 0 if pad is None else int(pad), choice)


def require_served(
    config: Any, processors: Iterable[Any], criteria: Iterable[Any], given: dict[str, Any]
) -> None:
    asked = [
        f"{name}={value!r}"
        for name, nothing in REFUSED.items()
        if (value := getattr(config, name, None)) is not None and value not in nothing
    ]
    # Those of the settings above are named already.
    if not asked:
        asked += [
            f"logits_processor {type(p).__name__}" for p in processors if type(p) not in SHAPERS
        ]
        asked += [f"stopping_criteria {type(c).__name__}" for c in criteria if type(c) not in ENDS]
    asked += [name for name, part in given.items() if part is not None and name not in HANDED_ON]
    cache = given.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        asked.append("past_key_values that hold tokens")
    if asked:
        raise RequestError(
            f"drafts cannot be verified with {', '.join(asked)}; leave it out, or use the model's "
            "own generate()"
        )


def unpadded(
    input_ids: torch.Tensor, mask_BT: torch.Tensor | None, position_BT: torch.Tensor | None
) -> list[list[int]]:
    """Each row's tokens without its padding, left or right."""
    if mask_BT is None:
        mask_BT = torch.ones_like(input_ids)
    # A row's own tokens are one piece: the mask changes once on either side at most.
    seen_BT = torch.nn.functional.pad(mask_BT.bool().int(), (1, 1))
    whole_B = (seen_BT.diff(dim=1) != 0).sum(1) <= 2
    if not bool(whole_B.all()):
        row = int(whole_B.int().argmin())
        raise RequestError(f"attention_mask leaves out tokens within row {row}, not around it")
    if position_BT is not None:
        counted_BT = mask_BT.long().cumsum(1) - 1
        if not bool(((position_BT == counted_BT) | (mask_BT == 0)).all()):
            raise RequestError("position_ids other than 0, 1, … of each row are not served here")
    return [row[own].tolist() for row, own in zip(input_ids, mask_BT.bool(), strict=True)]
