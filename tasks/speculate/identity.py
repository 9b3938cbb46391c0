"""Whether heads and a model belong together: a hash of what the model computes with.

Heads foresee one model. On another one, or with another adapter in its layers, their drafts are
only ever refused, and nothing but the speed would say so.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

from .heads import HeadsConfig, HeadsError

#: Values of each tensor that are hashed, evenly spread: a model that was trained on differs in
#: nearly all, and reading whole weights would take as long as loading them.
SAMPLE = 257


def fingerprint(model: Any) -> str:
    """SHA-256 of name, shape, dtype and a sample of the values of every tensor of a model, of its
    adapters too."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        if flat.numel() > SAMPLE:
            flat = flat[torch.linspace(0, flat.numel() - 1, SAMPLE, device=flat.device).long()]
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what each token is called and its number."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def require_same(config: HeadsConfig, parts: Any) -> None:
    """Raise a HeadsError for heads of another shape, or of another model."""
    embedded, width = parts.scored.shape
    if (config.vocab_size, config.hidden_size) != (embedded, width):
        raise HeadsError(
            f"the heads are for {config.vocab_size} tokens and a width of {config.hidden_size}, "
            f"and this model has {embedded} and {width}: its vocabulary was resized since, or it "
            "is another base; train heads for it"
        )
    wanted = config.made_for.get("model")
    if wanted is not None and (found := fingerprint(parts.model)) != wanted:
        raise HeadsError(
            f"the heads were trained for another model ({wanted[:12]}, and this one is "
            f"{found[:12]}): another base, another adapter in its layers, or another dtype; load "
            "that one, or train heads for this"
        )
