"""QLoRA: LoRA on a base in 4 bits. Dettmers et al. 2023, arXiv:2305.14314.

The base is quantised as it is loaded (`tasks/core/quantised.py`) and frozen; A and B learn in
float32 beside it, as many as LoRA's. The adapter says that its base is quantised, so that it is
measured and served on the very weights that it learned beside. A merge folds it into the base as
it was before: the model is then as large as the base, and a little off from what was trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedModel

from schemas.candidates import QLora
from schemas.errors import StageError
from tasks.core import quantised
from tasks.core.adapters import own_name
from tasks.core.models import unquantised_modules
from tasks.core.progress import say
from tasks.methods import lora
from tasks.methods.course import Course
from tasks.methods.method import Method

PLACE = "candidates[method=qlora]"


def quantisation(candidate: QLora) -> quantised.Quantisation:
    return quantised.Quantisation(candidate.quant_type, candidate.double_quantisation)


def config(model: PreTrainedModel, candidate: QLora, task: str) -> LoraConfig:
    """As LoRA's, beside a base that was quantised as it was loaded, or on its shapes alone.

    Raises:
        UserError: bitsandbytes is not there or cannot quantise this base, and what LoRA raises.
    """
    quantised.require_bitsandbytes(PLACE)
    if next(model.parameters()).is_meta:
        quantised.check_widths(model, unquantised_modules(model), PLACE)
    return lora.config(model, candidate, task)


class QLoraCourse(Course):
    """Proves in the end that the base is what was asked for, and has the adapter say so."""

    def finish(self) -> dict[str, Any]:
        """Raises a StageError where an adapted layer is not in 4 bits, though transformers does
        quantise it in this kind of base."""
        layers = quantised.quantised_layers(self.model)
        adapted = [
            name.rpartition(".lora_A")[0]
            for name, _ in self.model.named_modules()
            if name.endswith(".lora_A")
        ]
        # The layer itself, or one with a bias that is learned too, around it.
        packed = {own_name(f"{name}.") for name in layers}
        others = {own_name(f"{name}.") for name in adapted} - packed
        kinds = quantised.of_model(self.model).unquantised if layers else ()
        ends = tuple(f".{name}." for name in kinds)
        kept = {name for name in others if name.endswith(ends)}
        whole = sorted(others - kept)
        if whole or len(kept) == len(adapted):
            raise StageError(f"QLoRA trained beside {whole[:1] or 'nothing'}, not in 4 bits")
        say(f"{len(layers)} layers of the base are {self.candidate.quant_type}")
        if kept:
            say(f"{len(kept)} adapted ones are not: transformers leaves them whole in this kind")
        return {"quantised_layers": len(layers)}

    def export(self, adapter: Path) -> None:
        quantised.write(quantised.of_model(self.model), adapter)


METHOD = Method(
    name="qlora",
    paper="arXiv:2305.14314",
    family="reparameterisation",
    merges=True,
    trained_base=False,
    format="peft-adapter",
    config=config,
    trainable_parameters=lora.trainable_parameters,
    rate_of=lora.rate_of,
    course=QLoraCourse,
    quantises=quantisation,
)
