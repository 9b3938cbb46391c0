"""The configuration of an adapter in AdapterHub's words and in ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from schemas.errors import Problem, UserError
from tasks.methods.adapterhub.names import Family
from tasks.methods.tuners.bottleneck import BottleneckConfig, known_endings

#: Theirs as ours stands to it; `their_config` sets what differs from adapter to adapter.
THEIR_CONFIG: dict[str, Any] = {
    "original_ln_before": False,
    "original_ln_after": True,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "ln_before": False,
    "ln_after": False,
    "init_weights": "mam_adapter",
    "init_weights_seed": None,
    "use_gating": False,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "cross_adapter": False,
    "leave_out": [],
    "dropout": 0.0,
    "stochastic_depth": 0.0,
    "phm_layer": False,
    "phm_dim": 4,
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "phm_rank": 1,
    "phm_bias": True,
}
#: What each of these would add is nowhere in ours, so it has to be as above.
NEEDED = {
    "original_ln_after": "ours leaves the block's residual sum and norm where they are",
    "ln_before": "ours has no norm of its own",
    "ln_after": "ours has no norm of its own",
    "use_gating": "ours has no gate",
    "inv_adapter": "ours has no invertible adapter at the embeddings",
    "cross_adapter": "ours has no adapter after cross-attention",
    "leave_out": "ours has an adapter in every block",
    "phm_layer": "ours has plain linear layers",
}
#: Fields that are translated.
READ = {
    "mh_adapter",
    "output_adapter",
    "is_parallel",
    "reduction_factor",
    "non_linearity",
    "scaling",
    "architecture",
}
#: Their name, where it is not transformers' own.
NON_LINEARITIES = {"leakyrelu": "leaky_relu"}
#: In transformers 5 and not in the 4.57 that their package needs.
NEWER = {"hardswish", "sqrtsoftplus"}


def our_config(facts: dict[str, Any], family: Family, place: Path) -> BottleneckConfig:
    """What their adapter_config.json says, in our words.

    Raises:
        UserError: every field that has none.
    """
    theirs = facts.get("config")
    if not isinstance(theirs, dict) or theirs.get("architecture") is not None:
        kind = theirs.get("architecture") if isinstance(theirs, dict) else theirs
        raise UserError.at(
            f"{place} config", f"{kind!r}", "a bottleneck adapter: double_seq_bn, seq_bn or par_bn"
        )
    activation = str(theirs.get("non_linearity")).lower()
    activation = NON_LINEARITIES.get(activation, activation)
    refused = [
        *_unknown(theirs),
        *_without_counterpart(theirs),
        *_of_placement(theirs, facts, family),
        *_numbers(theirs),
        *_activation(activation),
    ]
    if refused:
        raise UserError(
            [
                Problem(f"{place} config.{field}", f"{theirs.get(field)!r}: {why}", fix)
                for field, why, fix in refused
            ]
        )
    return BottleneckConfig(
        placement=_placement(theirs),
        reduction_factor=int(theirs["reduction_factor"]),
        activation=activation,
        scaling=float(theirs["scaling"]),
        base_model_name_or_path=facts.get("model_name") or None,
        inference_mode=True,
    )


def their_config(config: BottleneckConfig) -> dict[str, Any]:
    """`BnConfig.to_dict()` of theirs."""
    return THEIR_CONFIG | {
        "mh_adapter": config.placement == "double_sequential",
        "output_adapter": True,
        "is_parallel": config.placement == "parallel",
        "original_ln_before": config.placement == "sequential_normed",
        "reduction_factor": config.reduction_factor,
        "non_linearity": config.activation,
        # They take a whole number for an unknown kind of scaling.
        "scaling": float(config.scaling),
    }


def check_ours(config: BottleneckConfig, model_type: str, family: Family, place: Path) -> None:
    """Raise a UserError with everything in our configuration that theirs cannot say."""
    found = [
        Problem(
            f"{place} {field}",
            f"{getattr(config, field)}: not where AdapterHub's adapters of {model_type} are",
            f"{list(endings)} converts",
        )
        for field, endings in known_endings(model_type, config.placement).items()
        if getattr(config, field) not in (None, list(endings))
    ]
    if config.placement == "parallel" and not family.parallel:
        found.append(
            Problem(
                f"{place} placement",
                f"parallel on {model_type}, whose blocks are pre-norm: par_bn reads the residual "
                "there, ours what the feed-forward reads",
                "sequential and double_sequential convert; parallel does for BERT's like",
            )
        )
    if config.activation in NEWER:
        found.append(
            Problem(
                f"{place} activation",
                f"{config.activation}: not in transformers 4.57, which adapters 1.3.0 needs",
                "another activation",
            )
        )
    if found:
        raise UserError(found)


#: A field, why it has no counterpart, and what would.
Refused = tuple[str, str, str]


def _unknown(theirs: dict[str, Any]) -> list[Refused]:
    return [
        (field, "not a field of adapters 1.3.0", "save it again with adapters 1.3.0")
        for field in sorted(set(theirs) - set(THEIR_CONFIG) - READ)
    ] + [
        (field, "missing", "save it again with adapters 1.3.0")
        for field in sorted((set(THEIR_CONFIG) | READ) - {"architecture"} - set(theirs))
    ]


def _without_counterpart(theirs: dict[str, Any]) -> list[Refused]:
    return [
        (field, why, f"{THEIR_CONFIG[field]!r} converts")
        for field, why in NEEDED.items()
        # An empty list and null are both none.
        if (theirs.get(field) or None) != (THEIR_CONFIG[field] or None)
    ]


def _of_placement(theirs: dict[str, Any], facts: dict[str, Any], family: Family) -> list[Refused]:
    found = []
    if not theirs.get("output_adapter"):
        found.append(("output_adapter", "ours always has one there", "True converts"))
    if theirs.get("is_parallel"):
        if theirs.get("mh_adapter"):
            found.append(("mh_adapter", "ours is never beside the attention", "False converts"))
        if not family.parallel:
            why = (
                f"{facts['model_type']} has pre-norm blocks, where it reads the residual; ours "
                "reads what the feed-forward reads"
            )
            fix = "double_seq_bn converts; par_bn does for BERT's like"
            found.append(("is_parallel", why, fix))
    # The parallel one looks at neither of these.
    elif theirs.get("original_ln_before"):
        if theirs.get("mh_adapter"):
            why = "after attention ours reads the sub-layer's own output"
            found.append(("original_ln_before", why, "False converts, or mh_adapter=False"))
        elif not family.normed:
            why = (
                f"{facts['model_type']} has pre-norm blocks, where it reads the sum with the "
                "residual; ours reads the feed-forward's own output"
            )
            found.append(("original_ln_before", why, "False converts"))
        if theirs.get("residual_before_ln") is not True:
            why = "ours adds to what the norm reads"
            found.append(("residual_before_ln", why, "True converts"))
    elif theirs.get("residual_before_ln") == "post_add":
        why = "only original_ln_before gives it something to read"
        found.append(("residual_before_ln", why, "True converts"))
    return found


def _placement(theirs: dict[str, Any]) -> str:
    if theirs["is_parallel"]:
        return "parallel"
    if theirs["mh_adapter"]:
        return "double_sequential"
    return "sequential_normed" if theirs["original_ln_before"] else "sequential"


def _numbers(theirs: dict[str, Any]) -> list[Refused]:
    reduction, scaling = theirs.get("reduction_factor"), theirs.get("scaling")
    found = []
    if not isinstance(reduction, int | float) or reduction < 1 or reduction != int(reduction):
        why = "ours is one for all blocks, and never widens"
        found.append(("reduction_factor", why, "a whole number from 1 on converts"))
    if not isinstance(scaling, int | float):
        found.append(("scaling", "ours is not learned", "a number converts"))
    return found


def _activation(activation: str) -> list[Refused]:
    try:
        BottleneckConfig(activation=activation)
    except ValueError as error:
        _, _, fix = str(error).partition("; ")
        return [("non_linearity", "not one of ours", fix)]
    return []
