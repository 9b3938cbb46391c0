"""A base as shapes without weights: of a directory's config.json, or given in the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from schemas.errors import UserError
from schemas.together import Candidate
from tasks.core.models import load_config, model_on_meta, unquantised_modules
from tasks.core.quantised import check_widths
from tasks.core.runtime import Dtype
from tasks.cost import four_bits
from tasks.methods.table import method_for

PLACE = "base.shape"


def config_of(base: Path | None, shape: dict[str, Any] | None, labels: int | None) -> Any:
    """The base's configuration, with as many classes as there are labels.

    Raises:
        UserError: a shape that transformers does not know.
    """
    if shape is None:
        assert base is not None
        config = load_config(base)
    else:
        given = dict(shape)
        kind = given.pop("model_type", None)
        try:
            config = AutoConfig.for_model(kind, **given)
        except (ValueError, TypeError) as error:
            summary = str(error).splitlines()[0][:200]
            raise UserError.at(
                PLACE, summary, "give model_type and the fields of its config"
            ) from error
    if labels is not None:
        config.num_labels = labels
    return config


def base_on_meta(config: Any, task: str, dtype: Dtype) -> nn.Module:
    """The base without its weights.

    Raises:
        UserError: a configuration of which no model for this task can be made.
    """
    model: nn.Module = model_on_meta(config, task, "base", dtype)
    return model


def candidate_on_meta(config: Any, task: str, candidate: Candidate, dtype: Dtype) -> nn.Module:
    """What a candidate trains: the base as its method builds it, in the dtypes of training."""
    method = method_for(candidate.method, task)
    base = base_on_meta(config, task, "float32" if method.trained_base else dtype)
    quantisation = method.quantises(candidate)
    if quantisation is not None:
        place = f"candidates[method={candidate.method}]"
        check_widths(base, unquantised_modules(base), place)
        four_bits.quantise(base, quantisation, place)
    with torch.device("meta"):
        return method.build(base, candidate, task)
