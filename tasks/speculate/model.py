"""A model that generates with drafts, in the shape of transformers' own `generate()`.

    turbo = TurboModel(model, heads)
    turbo.generate(**tokenizer(texts, return_tensors="pt", padding=True), max_new_tokens=100)
    model.generate(**inputs, max_new_tokens=100, custom_generate=turbo.custom_generate)

Both are the same: transformers reads its settings, and calls our loop in place of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation import GenerateDecoderOnlyOutput

from .decode import Account, Writer
from .heads import HeadsError, TurboHeads, is_heads
from .pace import Pace
from .parts import parts_of
from .request import RequestError, read
from .trial import require_exact

log = logging.getLogger(__name__)


class TurboModel:
    """A causal language model, plain or with adapters, and what drafts for it.

    account: of the last call: time, passes, tokens per pass.
    """

    def __init__(
        self,
        model: Any,
        heads: TurboHeads | None = None,
        *,
        lookup: bool = True,
        pace: Pace | None = None,
    ) -> None:
        """model: put into evaluation mode, since dropout would verify nothing. lookup: draft what
        followed the last tokens where they stood before.

        Raises:
            NotSpeculableError: a model of which drafts cannot be verified exactly.
            HeadsError: heads of other widths than the model.
        """
        self.model = model.eval()
        self.writer = Writer(parts_of(model), heads, lookup=lookup, pace=pace)
        require_exact(self.writer)
        self.account = Account()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        heads: str | Path | None = None,
        *,
        lookup: bool = True,
        **kwargs: Any,
    ) -> TurboModel:
        """model: what `AutoModelForCausalLM.from_pretrained` takes, and so its kwargs. heads: the
        directory that holds them; None: the model's own."""
        directory = Path(model if heads is None else heads)
        if not is_heads(directory):
            raise HeadsError(f"{directory} holds no heads: name their directory")
        loaded = AutoModelForCausalLM.from_pretrained(model, **kwargs)
        return cls(loaded, TurboHeads.load(directory), lookup=lookup)

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *,
        streamer: Any = None,
        assistant_model: Any = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate()`, faster: [B, T + new], what is shorter filled up with the
        padding token; with `return_dict_in_generate` an output that has `sequences`.

        Greedy, it gives the same tokens; sampling, it draws from the same distribution by other
        numbers. `seed=` draws from a generator of its own, else they are torch's. Prompts are
        padded on either side. An answer ends at the last position that the model knows, aloud.

        Raises:
            RequestError: a setting that needs the text written so far, or is not served here.
            PromptError: a prompt that is empty, or longer than the model's positions.
        """
        if assistant_model is not None:
            raise RequestError("assistant_model: the heads draft here; leave it out")
        decode: Callable[..., Any] = partial(self.custom_generate, listening=streamer)
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if ids is None or not ids.numel():
            raise RequestError("no input_ids: prompts are token ids, [B, T]")
        return self.model.generate(ids, custom_generate=decode, streamer=streamer, **kwargs)

    def custom_generate(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        seed: int | None = None,
        listening: Any = None,
        **given: Any,
    ) -> Any:
        """For `model.generate(..., custom_generate=turbo.custom_generate)`; see `generate`.

        listening: the streamer. transformers 5.23 hands none on to a custom function, so give it
        to `TurboModel.generate`, or here by the name `listening`.
        """
        if model is not self.writer.parts.model:
            raise RequestError("custom_generate was called by another model than it was made for")
        if model.get_output_embeddings() is not self.writer.parts.lm_head:
            raise HeadsError(
                "the model's lm_head was replaced since (a vocabulary resized?): make a TurboModel "
                "of it anew"
            )
        request = read(
            input_ids, generation_config, logits_processor, stopping_criteria, seed, given
        )
        if listening is not None and len(request.prompts) > 1:
            raise RequestError("a streamer listens to one prompt alone")
        answers, self.account = self.writer.write(
            request.prompts,
            request.max_new_tokens,
            request.stops,
            request.choice,
            None if listening is None else lambda _, new: listening.put(torch.tensor(new)),
        )
        if listening is not None:
            listening.end()
        self._tell_short(request.prompts, answers, request.max_new_tokens, request.stops)
        longest = max(map(len, answers))
        new_BN = torch.full((len(answers), longest), request.pad)
        for row, answer in enumerate(answers):
            new_BN[row, : len(answer)] = torch.tensor(answer)
        sequences = torch.cat([input_ids, new_BN.to(input_ids.device)], dim=1)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)
        return sequences

    def _tell_short(
        self,
        prompts: list[list[int]],
        answers: list[list[int]],
        max_new_tokens: int,
        stops: frozenset[int],
    ) -> None:
        short = [
            row
            for row, answer in enumerate(answers)
            if len(answer) < max_new_tokens and answer[-1] not in stops
        ]
        if short:
            log.warning(
                "answers to prompts %s end at the last of the model's %s positions, before the "
                "%d tokens asked for",
                short,
                self.writer.parts.longest,
                max_new_tokens,
            )
