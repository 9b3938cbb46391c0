"""Loading: the frozen base, its tokenizer, and what a train or merge entry adds to it.

Only safetensors are read: a `.bin` or `.pt` checkpoint is a pickle, which runs code on loading
(`tasks/core/bases.py` refuses it).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from schemas.errors import StageError, UserError
from schemas.tasks import is_encoder_decoder, is_labelled, reads_images
from tasks.core import adapters, quantised
from tasks.core.bases import require_safetensors
from tasks.core.progress import warn
from tasks.core.quantised import Quantisation
from tasks.core.runtime import TORCH_DTYPES, Dtype
from tasks.core.shots import is_prompt

MODEL_CLASSES = {
    "causal-lm": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "image-classification": AutoModelForImageClassification,
}

#: What transformers calls the layers between a backbone and its classes.
HEADS = (
    "classifier",
    "score",
    "pre_classifier",
    "pooler",
    "classification_head",
    "sequence_summary",
    "logits_proj",
)


def head_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The classification head, by module name. It is new for each task: every method trains it.

    A pooler belongs to it, wherever it stands. RoBERTa's head has the same dense layer inside,
    and a sentence encoder's pooler was never trained for anything: with a low-rank update in its
    place LoRA is 1.9 points worse on banking77 (docs/log.md).
    """
    heads: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        within = any(name.startswith(f"{head}.") for head in heads)
        if (
            name.rsplit(".", 1)[-1] in HEADS
            and not within
            and any(True for _ in module.parameters())
        ):
            heads[name] = module
    return heads


def load_tokenizer(base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base, local_files_only=True)


def load_config(base: Path) -> Any:
    return AutoConfig.from_pretrained(base, local_files_only=True)


def model_on_meta(config: Any, task: str, place: object, dtype: Dtype | None = None) -> Any:
    """A base's shapes without its weights.

    Raises:
        UserError: a configuration of which no model for this task can be made.
    """
    require_kind(config, task, place)
    options = {} if dtype is None else {"dtype": TORCH_DTYPES[dtype]}
    # transformers looks for a kind's class among these where it has several, as for DeiT.
    config.architectures = config.architectures or []
    try:
        with torch.device("meta"):
            return MODEL_CLASSES[task].from_config(config, **options)
    except ValueError as error:
        summary = str(error).splitlines()[0][:200]
        raise UserError.at(place, summary, "choose another base, or another task") from error


def require_kind(config: Any, task: str, place: object) -> None:
    """Raise a UserError for a base of which transformers makes no model for a task, such as one
    that reads text where rows are images, or has no encoder where there should be one."""
    fitting = [name for name in MODEL_CLASSES if fits(config, name)]
    if task in fitting:
        return
    if is_labelled(task):
        such = "ViT or DeiT" if reads_images(task) else "BERT"
    else:
        such = "T5 or BART" if is_encoder_decoder(task) else "Llama"
    known = f"; this one is for {', '.join(fitting)}" if fitting else ""
    raise UserError.at(
        place,
        f"is a {config.model_type} model, of which there is none for {task}",
        f"choose a base such as {such}{known}",
    )


def fits(config: Any, task: str) -> bool:
    """Whether transformers makes a whole model of that kind for a task. Of an encoder and a
    decoder it would make a model of its decoder alone, for causal-lm, without a word."""
    if type(config) not in MODEL_CLASSES[task]._model_mapping:
        return False
    return is_labelled(task) or bool(config.is_encoder_decoder) == is_encoder_decoder(task)


def decoder_start(config: Any) -> int:
    """The token that a decoder begins every answer with.

    Raises:
        UserError: the configuration names none, so that nothing says how answers begin.
    """
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise UserError.at(
            "base.model",
            f"its config.json names no decoder_start_token_id ({config.model_type})",
            "set it to the token that its decoder was pretrained to begin with",
        )
    return int(start)


def read_labels(prepared: Path) -> list[str] | None:
    """The label names in the order of the head's outputs, or None for a causal task."""
    path = prepared / "labels.json"
    return json.loads(path.read_text()) if path.exists() else None


def load_base(
    base: Path,
    task: str,
    labels: list[str] | None,
    dtype: Dtype,
    *,
    head_seed: int = 0,
    quantisation: Quantisation | None = None,
) -> PreTrainedModel:
    """The pretrained model on the CPU (a quantised one where it runs), in evaluation mode.

    A classification head that the checkpoint lacks, or has for other labels, is drawn with
    `head_seed`: the same numbers in every dtype but for its rounding.

    Raises:
        UserError: no safetensors in the directory, or a checkpoint that is not for this task.
    """
    options: dict[str, Any] = {"ignore_mismatched_sizes": labels is not None}
    if quantisation is not None:
        options |= _quantised_options(base, task, dtype, quantisation)
    torch.manual_seed(head_seed)
    model, loading = _load(base, task, labels, dtype, **options)
    if quantisation is not None:
        quantised.settle(model)
    missing = sorted(loading["missing_keys"])
    if labels is None and missing:
        raise UserError.at(
            base,
            f"holds no weights for {len(missing)} tensors of a {task} model, e.g. {missing[0]}",
            "choose a base that was trained for this task",
        )
    known = tuple(f"{head}." for head in head_modules(model))
    unknown = [name for name in missing if not name.startswith(known)]
    if unknown:
        warn(
            f"{base} lacks {', '.join(unknown)}: drawn at random, and trained whole by `full` "
            "alone; choose a base that has them, or method: full"
        )
    return model


def unquantised_modules(model: Any) -> tuple[str, ...]:
    """The heads by name, which stay in the base's dtype where all else is quantised, and what
    transformers never quantises in this kind (`wo` of a T5)."""
    output = model.get_output_embeddings()
    kept = set(model._keep_in_fp32_modules or ())
    names = [
        name
        for name, module in model.named_modules()
        if module is output or kept.intersection(name.split(".")[-1:])
    ]
    return (*names, *head_modules(model))


def _quantised_options(
    base: Path, task: str, dtype: Dtype, quantisation: Quantisation
) -> dict[str, Any]:
    """What loads a base quantised but for its heads. Raises a UserError for one that is already."""
    config = load_config(base)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError.at(
            base, "is quantised already", "choose a base in float32, float16 or bfloat16"
        )
    with torch.device("meta"):
        shapes: Any = MODEL_CLASSES[task].from_config(config)
    if not quantisation.unquantised:
        quantisation = replace(quantisation, unquantised=unquantised_modules(shapes))
    quantised.check_widths(shapes, quantisation.unquantised, str(base))
    return quantised.options(quantisation, dtype)


def _load(
    place: Path, task: str, labels: list[str] | None, dtype: Dtype, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model and transformers' account of which tensors were found."""
    require_safetensors(place)
    require_kind(load_config(place), task, place)
    extra: dict[str, Any] = {}
    if labels is not None:
        extra = {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
        }
    try:
        model, loading = MODEL_CLASSES[task].from_pretrained(
            place,
            output_loading_info=True,
            dtype=TORCH_DTYPES[dtype],
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            **extra,
            **options,
        )
    except ValueError as error:
        raise UserError.at(
            place, f"cannot be loaded for {task}: {error}", "choose another base"
        ) from error
    if labels is not None and not reads_images(task) and model.config.pad_token_id is None:
        # A decoder finds a text's last token by what is padding. The registered model's code
        # (tasks/register/served_model.py) has the same rule.
        model.config.pad_token_id = load_tokenizer(place).pad_token_id or 0
    return cast(PreTrainedModel, model.eval()), loading


def load_trained(
    base: Path,
    model_dir: Path,
    task: str,
    labels: list[str] | None,
    dtype: Dtype,
    *,
    quantised_base: bool = True,
) -> torch.nn.Module:
    """What a train or merge entry holds in `model/`: adapters on their base, or a whole model.

    Of a prompt it is the base: what stands before a question is no part of the model.

    quantised_base: false for the base as it is, even if the adapter learned beside a quantised one.

    Raises:
        StageError: tensors are missing.
    """
    if is_prompt(model_dir):
        return cast(torch.nn.Module, load_base(base, task, labels, dtype))
    if adapters.is_adapter(model_dir):
        quantisation = quantised.read(model_dir) if quantised_base else None
        model = load_base(base, task, labels, dtype, quantisation=quantisation)
        return adapters.put_on(model, {adapters.FIRST: model_dir})
    whole, loading = _load(model_dir, task, labels, dtype)
    if loading["missing_keys"]:
        raise StageError(f"{model_dir} lacks {', '.join(sorted(loading['missing_keys']))}")
    return cast(torch.nn.Module, whole)
