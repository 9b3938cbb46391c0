"""One greedy token after another: what is kept between them, by kind of model.

A writer reads a batch of prompts, then goes on token by token with what it keeps of them. A
decoder's prompt and answer are one sequence, padded on the left; an encoder's is padded on the
right, read once, and looked at by a decoder whose rows all begin in the same place.

Shapes: B rows, T prompt positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from tasks.evaluate.batches import (
    Inputs,
    Row,
    context_limit,
    is_pair_model,
    left_padded,
    right_padded,
    run_on,
)
from tasks.evaluate.pairs import start_id_of


def padded_prompts(model: torch.nn.Module, prompts: Sequence[Row], pad_id: int) -> Inputs:
    """Prompts as the model's writer reads them."""
    pad = right_padded if is_pair_model(model) else left_padded
    return pad(prompts, pad_id)


def writer_of(model: torch.nn.Module, inputs: Inputs) -> Continuing | Encoding:
    """A writer over `padded_prompts`."""
    return Encoding(model, inputs) if is_pair_model(model) else Continuing(model, inputs)


def room_of(model: torch.nn.Module, prompts: Sequence[Row], max_new_tokens: int) -> list[int]:
    """The tokens that each answer may have, within the positions that the model knows."""
    limit = context_limit(model)
    if limit is None:
        return [max_new_tokens] * len(prompts)
    apart = is_pair_model(model)
    return [min(max_new_tokens, limit if apart else limit - len(prompt)) for prompt in prompts]


class Writer:
    """What both kinds keep. PER_ROW: the names of tensors with an entry for each row."""

    PER_ROW: tuple[str, ...]
    cache: Any

    def __init__(self, model: torch.nn.Module, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs
        self.device = next(model.parameters()).device
        self.mask_BT = inputs["attention_mask"].to(self.device)

    def keep(self, places: list[int]) -> bool:
        """Go on with some rows alone. False: this kind of cache cannot."""
        if not hasattr(self.cache, "batch_select_indices"):
            return False
        kept = torch.tensor(places, device=self.device)
        self.cache.batch_select_indices(kept)
        for name in self.PER_ROW:
            setattr(self, name, getattr(self, name)[kept])
        return True

    def _run(self, inputs: Inputs, **options: Any) -> Any:
        output = run_on(self.model, inputs, use_cache=True, **options)
        self.cache = output.past_key_values
        return output


class Continuing(Writer):
    """A decoder that goes on where its prompts end."""

    PER_ROW = ("mask_BT", "position_B")

    def read(self) -> torch.Tensor:
        """The logits of each row's first token, [B, V]."""
        self.position_B = self.inputs["position_ids"][:, -1].to(self.device)
        self.limit = context_limit(self.model)
        return last(self._run(self.inputs, logits_to_keep=1))

    def write(self, token_B: torch.Tensor) -> torch.Tensor:
        """Go on with a token for each row; the logits of the next."""
        mask_BT = self.mask_BT
        self.mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1)
        # A row that has ended but not left writes on unread, and stays within the known positions.
        position_B = self.position_B + 1
        self.position_B = position_B if self.limit is None else position_B.clamp(max=self.limit - 1)
        step = {
            "input_ids": token_B[:, None],
            "attention_mask": self.mask_BT,
            "position_ids": self.position_B[:, None],
        }
        return last(self._run(step, past_key_values=self.cache, logits_to_keep=1))


class Encoding(Writer):
    """An encoder that has read its prompts, and a decoder that looks at what it made of them."""

    PER_ROW = ("mask_BT", "read_BTH")

    def read(self) -> torch.Tensor:
        """The logits of each row's first token, [B, V]."""
        start_B1 = torch.full((len(self.mask_BT), 1), start_id_of(self.model))
        output = self._run({**self.inputs, "decoder_input_ids": start_B1})
        self.read_BTH: torch.Tensor = output.encoder_last_hidden_state
        return last(output)

    def write(self, token_B: torch.Tensor) -> torch.Tensor:
        """Go on with a token for each row; the logits of the next."""
        step = {"attention_mask": self.mask_BT, "decoder_input_ids": token_B[:, None]}
        read = BaseModelOutput(last_hidden_state=self.read_BTH)
        return last(self._run(step, encoder_outputs=read, past_key_values=self.cache))


def last(output: Any) -> torch.Tensor:
    """The logits of a batch's last position, [B, V]."""
    logits_BV: torch.Tensor = output.logits[:, -1]
    return logits_BV
