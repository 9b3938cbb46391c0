"""Turbo heads in the layouts that servers have for Medusa's.

    h_k = x + SiLU(W_k x + b_k), then the model's own lm_head

is a Medusa head of one layer with a shared lm_head. Of a Turbo head W_k = B_k A_k, multiplied out
in float32 and rounded once to the dtype in which the version is served. The state over drafted
tokens has no place there and is left out. What each server reads: docs/export.md.

Shapes: D hidden width, R rank, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from schemas.errors import UserError
from tasks.core.models import load_config
from tasks.core.runtime import TORCH_DTYPES
from tasks.export.adapter import only_adapter, read_config, write_adapter
from tasks.export.merged import write_merged
from tasks.export.version import Version
from tasks.merge.checkpoint import Checkpoint
from tasks.merge.names import Skeleton
from tasks.speculate.heads import HeadsConfig, TurboHeads

#: In the export: the model that the heads draft for, where no name stands for it.
MODEL = "model"

#: What LoRAX leaves out of an adapter without a word: fields of adapter_config.json, and the value
#: with which they change nothing.
LORAX_LACKS: dict[str, Any] = {
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "lora_bias": False,
}


@dataclass(frozen=True)
class Layout:
    """One server's files.

    file: of the tensors. tensor: a tensor's name, of `head` (from 0) and `part` (weight or bias).
    lm_head: the name under which a copy of the model's own is kept; None: the server takes it from
    the model. config: config.json, from the heads' own and the model's name.
    adapter: whether the server takes an adapter beside the heads; the others get it merged.
    """

    file: str
    tensor: str
    lm_head: str | None
    config: Callable[[HeadsConfig, str], dict[str, Any]]
    adapter: bool


def vllm_config(heads: HeadsConfig, model: str) -> dict[str, Any]:
    return {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": heads.hidden_size,
        "vocab_size": heads.vocab_size,
        "num_heads": heads.heads,
        "num_hidden_layers": 1,
        "medusa_fc_bias": True,
        "original_lm_head": True,
    }


def medusa_config(heads: HeadsConfig, model: str) -> dict[str, Any]:
    # No `architectures`: TGI takes a speculator that has some for one of another kind.
    return {
        "base_model_name_or_path": model,
        "medusa_num_heads": heads.heads,
        "medusa_num_layers": 1,
        "version": "2",
    }


VLLM = Layout(
    "model.safetensors",
    "blocks.{head}.layers.0.{part}",
    "lm_head.weight",
    vllm_config,
    adapter=False,
)
LORAX = Layout(
    "medusa_lm_head.safetensors", "{head}.0.linear.{part}", None, medusa_config, adapter=True
)
TGI = Layout(
    "medusa_lm_head.safetensors", "{head}.0.linear.{part}", None, medusa_config, adapter=False
)


def write_medusa(version: Version, work: Path, out: Path, layout: Layout) -> list[str]:
    """Write a version's heads, and what they draft for where no name stands for it: its adapter
    beside them, or the whole model in `model/`. Returns what is to be said of them.

    out: where the export will lie.

    Raises:
        UserError: no heads, heads of another shape than the model, or an adapter that can neither
            lie beside them nor be merged.
    """
    heads, config = version.heads, version.heads.config
    require_same_shape(version, config)
    dtype = TORCH_DTYPES[version.dtype]
    said = []
    if config.state:
        said.append(
            f"the state over drafted tokens (width {config.state}) has no place in this format: "
            "the heads go alone, and fewer of their drafts are accepted than were measured"
        )
    model, place = model_of(version, work, out, layout, said)
    tensors = {
        layout.tensor.format(head=head, part=part): tensor
        for head in range(config.heads)
        for part, tensor in folded(heads, head, dtype).items()
    }
    if layout.lm_head is not None:
        assert place is not None
        tensors[layout.lm_head] = lm_head_of(place, version.name).to(dtype)
    save_file(tensors, work / layout.file, metadata={"format": "pt"})
    written = layout.config(config, model)
    (work / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    return said


def require_same_shape(version: Version, heads: HeadsConfig) -> None:
    """Raise for heads that do not fit the model beside them."""
    config = load_config(version.base or version.model).get_text_config(decoder=True)
    if (config.vocab_size, config.hidden_size) != (heads.vocab_size, heads.hidden_size):
        raise UserError.at(
            version.name,
            f"its heads are for a vocabulary of {heads.vocab_size} and a width of "
            f"{heads.hidden_size}, and its model has {config.vocab_size} and {config.hidden_size}",
            "train heads on this model",
        )


def model_of(
    version: Version, work: Path, out: Path, layout: Layout, said: list[str]
) -> tuple[str, Path | None]:
    """The name of the model that a server is to load, and where its weights lie now; None where an
    adapter lies beside the heads."""
    if version.is_prompt:
        return version.base_name, version.base
    if layout.adapter and not version.is_whole:
        refuse_for_lorax(version)
        said += write_adapter(version, work)
        return version.base_name, None
    (work / MODEL).mkdir()
    said += write_merged(version, work / MODEL)
    return str(out.resolve() / MODEL), work / MODEL


def folded(heads: TurboHeads, head: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """weight [D, D] and bias [D] of one head."""
    weight_DD = heads.up_KDR[head].float() @ heads.down_KRD[head].float()
    return {"weight": weight_DD.to(dtype), "bias": heads.bias_KD[head].to(dtype).clone()}


def lm_head_of(model: Path, name: str) -> torch.Tensor:
    """The lm_head's weight, [V, D], of a transformers directory; where it is the embedding's too,
    that one."""
    checkpoint = Checkpoint.open(model)
    settings = json.loads((model / "config.json").read_text())
    skeleton = Skeleton.build(settings, "causal-lm")
    lm_head: Any = skeleton.model.get_output_embeddings()
    [module] = [at for at, found in skeleton.model.named_modules() if found is lm_head]
    if lm_head.bias is not None:
        raise UserError.at(name, f"{module} has a bias, which vLLM's Medusa has not", "use tgi")
    stored = skeleton.sources(checkpoint.locations).unchanged
    [held, *_] = sorted(skeleton.sharing(f"{module}.weight") & stored.keys())
    return checkpoint.read(stored[held])


def refuse_for_lorax(version: Version) -> None:
    """Raise for an adapter that LoRAX would take for another one."""
    config = read_config(only_adapter(version))
    lacks = [
        f"{field}={config[field]!r}"
        for field, plain in LORAX_LACKS.items()
        if config.get(field) and config[field] != plain
    ]
    if config["peft_type"] != "LORA":
        lacks.insert(0, f"peft_type={config['peft_type']!r}")
    if lacks:
        raise UserError.at(
            version.name,
            f"LoRAX has plain LoRA alone, and would leave out {', '.join(lacks)}",
            "run its recipe with `finish: {merge: true}` and export that version; or choose "
            "--format tgi or --format vllm-medusa, which get the adapter merged",
        )
