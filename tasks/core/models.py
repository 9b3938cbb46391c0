"""Loading: the frozen base, its tokenizer, and what a train or merge entry adds to it.

Only safetensors are read: a `.bin` or `.pt` checkpoint is a pickle, which runs code on loading
(`tasks/core/bases.py` refuses it).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from schemas.errors import UserError
from tasks.core.bases import require_safetensors
from tasks.core.runtime import TORCH_DTYPES, Dtype

MODEL_CLASSES = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
}


def load_tokenizer(base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base, local_files_only=True)


def load_config(base: Path) -> Any:
    return AutoConfig.from_pretrained(base, local_files_only=True)


def read_labels(prepared: Path) -> list[str] | None:
    """The label names in the order of the head's outputs, or None for a causal task."""
    path = prepared / "labels.json"
    return json.loads(path.read_text()) if path.exists() else None


def load_base(
    base: Path, task: str, labels: list[str] | None, dtype: Dtype, *, head_seed: int = 0
) -> PreTrainedModel:
    """The pretrained model on the CPU, in evaluation mode.

    A classification head that the checkpoint lacks is drawn with `head_seed`, always in float32.

    Raises:
        UserError: no safetensors in the directory, or a checkpoint that is not for this task.
    """
    require_safetensors(base)
    extra: dict[str, Any] = {}
    if labels is not None:
        extra = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
            "ignore_mismatched_sizes": True,
        }
    torch.manual_seed(head_seed)
    try:
        model = MODEL_CLASSES[task].from_pretrained(
            base,
            dtype=TORCH_DTYPES[dtype],
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            **extra,
        )
    except ValueError as error:
        raise UserError.at(
            base, f"cannot be loaded for {task}: {error}", "choose another base"
        ) from error
    model.eval()
    return cast(PreTrainedModel, model)


def load_trained(
    base: Path, model_dir: Path, task: str, labels: list[str] | None, dtype: Dtype
) -> torch.nn.Module:
    """What a train or merge entry holds in `model/`: an adapter on its base, or a whole model."""
    if (model_dir / "adapter_config.json").exists():
        from peft import PeftModel

        model = load_base(base, task, labels, dtype)
        return cast(torch.nn.Module, PeftModel.from_pretrained(model, model_dir).eval())
    return cast(torch.nn.Module, load_base(model_dir, task, labels, dtype))
