"""A base in 4 bits through bitsandbytes: how it is loaded, and what says so beside an adapter.

Dettmers et al. 2023, arXiv:2305.14314. Blocks of 64 weights share a scale; with double
quantisation the scales are quantised too, in blocks of 256. The weights are quantised as they are
loaded, from the base that the user has, and computed with in the recipe's dtype.

On CPUs with AVX-512 bitsandbytes would pack weights anew at the first pass in evaluation mode: with
rounded scales, for widths of whole blocks alone, and without gradients ever after, which training
would never notice. That is turned off: every pass reads the same weights. And where a layer reads
a number of features that is no multiple of 64, bitsandbytes 0.50 on a CPU takes scales of other
blocks than it made, and weights are off by as much as they are large: such a base is refused.
"""

from __future__ import annotations

import importlib.util
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from schemas.errors import StageError, UserError
from tasks.core.files import write_atomic
from tasks.core.runtime import TORCH_DTYPES, Dtype, device

#: Weights that share a scale.
BLOCK = 64

#: Beside an adapter whose base is quantised.
FILE = "quantisation.json"


@dataclass(frozen=True)
class Quantisation:
    """How a base is quantised. `served_model.py` reads the same fields.

    unquantised: full names of linear layers that stay as they are, the heads.
    """

    quant_type: str
    double_quantisation: bool
    unquantised: tuple[str, ...] = ()


def require_bitsandbytes(place: str) -> None:
    """Raise a UserError where bitsandbytes is not there."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError.at(
            place,
            f"bitsandbytes is not installed (this machine is {platform.machine()})",
            "pip install bitsandbytes, which has builds for x86_64, or use method: lora",
        )


def check_widths(model: nn.Module, unquantised: tuple[str, ...], place: str) -> None:
    """Raise a UserError for a layer that is not made of whole blocks."""
    for name, layer in model.named_modules():
        stays = any(f"{name}.".startswith(f"{head}.") for head in unquantised)
        if isinstance(layer, nn.Linear) and not stays and layer.in_features % BLOCK:
            raise UserError.at(
                place,
                f"{name} of this base reads {layer.in_features} features, no multiple of {BLOCK}, "
                "which bitsandbytes does not quantise rightly on a CPU",
                "use method: lora, or another base",
            )


def options(quantisation: Quantisation, dtype: Dtype) -> dict[str, Any]:
    """What `from_pretrained` is told. A quantised model is loaded where it runs."""
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantisation.quant_type,
            bnb_4bit_use_double_quant=quantisation.double_quantisation,
            bnb_4bit_compute_dtype=TORCH_DTYPES[dtype],
            llm_int8_skip_modules=list(quantisation.unquantised),
        ),
        "device_map": {"": str(device())},
    }


def settle(model: nn.Module) -> None:
    """Make a model that was just loaded one like any other: it stays where it is put, its weights
    stay as they are, and of the file that they were made from nothing stays in memory.

    What stays unquantised (embeddings, heads, norms) may lie in the mapped file, where that is in
    the dtype asked for. One of them would keep the pages that every packed weight was read from.
    """
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    for layer in quantised_layers(model).values():
        layer.support_avx512bf16_for_cpu = False
    for weight in model.parameters():
        if weight.is_floating_point() and weight.device.type == "cpu":
            weight.data = weight.detach().clone()


def quantised_layers(model: nn.Module) -> dict[str, Any]:
    """The layers whose weights are 4 bits each, two to a byte, by name.

    Raises:
        StageError: one of them is of that kind, and its weights are not.
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        layer: Any = module
        if type(layer).__module__.startswith("bitsandbytes.") and hasattr(layer, "weight"):
            state = getattr(layer.weight, "quant_state", None)
            packed = layer.weight.dtype == torch.uint8 and layer.weight.numel() == -(
                -layer.in_features * layer.out_features // 2
            )
            if state is None or not packed:
                raise StageError(f"{name} should be quantised to 4 bits, and is not")
            found[name] = layer
    return found


def of_model(model: Any) -> Quantisation:
    """How a loaded model is quantised."""
    config = model.config.quantization_config
    return Quantisation(
        config.bnb_4bit_quant_type,
        config.bnb_4bit_use_double_quant,
        tuple(config.llm_int8_skip_modules),
    )


def write(quantisation: Quantisation, adapter: Path) -> None:
    write_atomic(adapter / FILE, json.dumps(asdict(quantisation), indent=2, sort_keys=True) + "\n")


def read(adapter: Path) -> Quantisation | None:
    """What an adapter, or one of several together, says of its base, or None: it is as it is."""
    path = next(iter([*adapter.glob(FILE), *adapter.glob(f"*/{FILE}")]), None)
    if path is None:
        return None
    record = json.loads(path.read_text())
    return Quantisation(**{**record, "unquantised": tuple(record["unquantised"])})
