"""Whether heads and a model belong together: a hash of what the model computes with.

Heads foresee one model. On another one, or with another adapter in its layers, their drafts are
only ever refused, and nothing but the speed would say so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch

from .heads import HeadsConfig, HeadsError
from .parts import Parts

#: Values of each tensor that are hashed, evenly spread: a model that was trained on differs in
#: nearly all, and reading whole weights would take as long as loading them.
SAMPLE = 257


def fingerprint(parts: Parts) -> str:
    """SHA-256 of name, shape, dtype and a sample of the values of every tensor of a model, of its
    adapters those that act, by whatever name they were loaded and each with its scaling, and of a
    soft prompt."""
    digest = hashlib.sha256()
    before = {
        f"{kind} {layer} of virtual tokens": tensor
        for layer, both in enumerate(parts.before)
        for kind, tensor in zip(("keys", "values"), both, strict=True)
    }
    for name, tensor in sorted([*_acting(parts.model), *before.items()], key=lambda one: one[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        if (last := flat.numel() - 1) >= SAMPLE:
            # In integers: float32 has none of the odd ones beyond 2^24.
            places = torch.arange(SAMPLE, device=flat.device) * last // (SAMPLE - 1)
            flat = flat[places]
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    for path, module in parts.model.named_modules():
        if (switched := _switched(module)) is None:
            continue
        active, disabled, _ = switched
        for kind, by in sorted(_scalings(module).items()):
            if acting := [] if disabled else [by[name] for name in active if name in by]:
                digest.update(f"{path}.{kind} {acting}".encode())
    return digest.hexdigest()


def _acting(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of all that takes part in a pass."""
    # PEFT keeps adapters in dicts under a layer that knows which of them are active.
    adapters: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if (switched := _switched(module)) is not None:
            active, disabled, _ = switched
            for kind, child in module.named_children():
                if hasattr(child, "keys"):
                    adapters[f"{path}.{kind}"] = [] if disabled else active
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        words = name.split(".")
        at = next((n for n in range(1, len(words)) if ".".join(words[:n]) in adapters), None)
        if at is not None:
            active = adapters[".".join(words[:at])]
            if words[at] not in active:
                continue
            words[at] = str(active.index(words[at]))
        # Where its weight stands in a layer that an adapter is for, whether that acts or not.
        yield ".".join(word for word in words if word != "base_layer"), tensor


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what each token is called and its number."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def require_same(config: HeadsConfig, parts: Parts) -> None:
    """Raise a HeadsError for heads of another shape, or of another model."""
    embedded, width = parts.model.get_output_embeddings().weight.shape
    if (config.vocab_size, config.hidden_size) != (embedded, width):
        raise HeadsError(
            f"the heads are for {config.vocab_size} tokens and a width of {config.hidden_size}, "
            f"and this model has {embedded} and {width}: its vocabulary was resized since, or it "
            "is another base; train heads for it"
        )
    wanted = config.made_for.get("model")
    if wanted is not None and (found := fingerprint(parts)) != wanted:
        raise HeadsError(
            f"the heads were trained for another model ({wanted[:12]}, and this one is "
            f"{found[:12]}): another base, another adapter in its layers, or another dtype; load "
            "that one, or train heads for this"
        )


class Guard:
    """Notices, before each answer, that a model is no longer the one that its heads are for, or
    that it has another soft prompt than the one whose keys and values were taken.

    Hashing takes as long as a few passes, so it is done only where something was touched: a
    weight replaced or written to, an adapter switched, scaled, merged or turned off.
    """

    def __init__(self, config: HeadsConfig | None, parts: Parts) -> None:
        """config: None for a writer without heads, which may go on with any adapter."""
        if config is not None:
            require_same(config, parts)
        self.config, self.parts = config, parts
        self.prompt = _prompt(parts.prompted)
        self.seen = [] if config is None else _touched(parts.model)

    def require(self) -> None:
        """Raise a HeadsError where it is another model by now."""
        if not _same(_prompt(self.parts.prompted), self.prompt):
            raise HeadsError(
                "the soft prompt is another one than when this writer was made (another adapter "
                "set, turned off, loaded over or trained on): set that one again, or take the "
                "model apart again and make a new Writer, with heads for it"
            )
        if self.config is None:
            return
        now = _touched(self.parts.model)
        replaced = self.parts.model.get_output_embeddings() is not self.parts.lm_head
        if not replaced and _same(now, self.seen):
            return
        require_same(self.config, self.parts)
        if replaced:
            raise HeadsError(
                "the model's lm_head was replaced since (its vocabulary was resized, or weights "
                "were tied anew): take the model apart again, and make a new Writer"
            )
        self.seen = now


#: Things that decide what a model computes, each with what shows that it changed.
Marks = list[tuple[Any, Any]]


def _same(now: Marks, seen: Marks) -> bool:
    """By identity: what is seen is held, so that no other tensor can take its address."""
    return len(now) == len(seen) and all(
        one is other and mark == before
        for (one, mark), (other, before) in zip(now, seen, strict=True)
    )


def _prompt(prompted: Any) -> Marks:
    """Of PEFT's model with a soft prompt the one that is active."""
    if prompted is None:
        return []
    active = prompted.active_adapter
    encoders = prompted.prompt_encoder
    acts = active in encoders and not prompted._adapters_disabled
    return _touched(encoders[active]) if acts else []


def _touched(model: Any) -> Marks:
    """Everything whose change changes what a model computes."""
    found: Marks = []
    for module in model.modules():
        for tensor in module._parameters.values():
            if tensor is not None:
                # Written to in place, or, as resizing does, given other data by the same name.
                version = None if tensor.is_inference() else tensor._version
                found.append((tensor, (version, tensor.data_ptr(), tensor.shape)))
        if (switched := _switched(module)) is not None:
            found.append((module, (switched, _scalings(module))))
    return found


def _switched(module: Any) -> tuple[list[str], bool, list[str]] | None:
    """Of one of PEFT's layers the adapters that are active, whether all are off, and those that
    are folded into its weight; None for any other layer."""
    if not hasattr(type(module), "_active_adapter") and "_active_adapter" not in vars(module):
        return None
    active = module._active_adapter
    merged = list(getattr(module, "merged_adapters", ()))
    off = bool(getattr(module, "_disable_adapters", False))
    return [active] if isinstance(active, str) else list(active), off, merged


def _scalings(module: Any) -> dict[str, dict[str, float]]:
    """Of one of PEFT's layers the numbers that its adapters' updates are multiplied by (LoRA's
    alpha / rank), by kind and by adapter. No tensor holds them."""
    return {
        kind: dict(by)
        for kind, by in vars(module).items()
        if kind.endswith("scaling") and isinstance(by, dict)
    }
