"""A base of the same kind, so many times as large: wider and deeper by as much.

Widths of a head, the vocabulary and the context stay as they are, as they do from one size of a
published family to the next.
"""

from __future__ import annotations

from typing import Any

from tasks.core.runtime import Dtype
from tasks.cost.shapes import base_on_meta
from tasks.methods.method import count_parameters

#: What configurations call the widths inside a block, the numbers of heads, and of blocks.
INNER = (
    "intermediate_size",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "d_ff",
    "n_inner",
    "hidden_dim",
    "word_embed_proj_dim",
)
HEADS = ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads")
BLOCKS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")
#: Packed weights come in blocks of so many: a width that was a multiple stays one.
MULTIPLE = 64


def larger(config: Any, task: str, dtype: Dtype, times: float) -> Any:
    """A configuration whose model for the task has about `times` the parameters.

    About, since widths are whole heads and depth whole blocks: what came of it is counted by the
    plan. Depth makes up for what the width leaves over.
    """
    base = base_on_meta(config, task, dtype)
    total = count_parameters(base)
    outside = _outside_blocks(base)
    factor = _growth(outside, total - outside, times)

    heads = config.num_attention_heads
    groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
    step = _smallest_step(config.hidden_size, heads, groups)
    units = max(1, round(factor * heads / step))
    wider = units * step / heads
    deeper = (times * total - outside * wider) / ((total - outside) * wider**2)

    values = {name: value for name, value in config.to_dict().items() if name != "layer_types"}
    grown = type(config).from_dict(values)
    grown.hidden_size = round(config.hidden_size * wider)
    for name in [*HEADS, "num_key_value_heads"]:
        if getattr(config, name, None):
            setattr(grown, name, round(getattr(config, name) * wider))
    for name in INNER:
        if inner := getattr(config, name, None):
            multiple = MULTIPLE if inner % MULTIPLE == 0 else 1
            setattr(grown, name, max(1, round(inner * wider / multiple)) * multiple)
    for name in BLOCKS:
        if blocks := getattr(config, name, None):
            setattr(grown, name, max(1, round(blocks * deeper)))
    # Anew, for what a configuration works out from these.
    return type(config).from_dict(
        {name: value for name, value in grown.to_dict().items() if name != "layer_types"}
    )


def _outside_blocks(base: Any) -> int:
    """Parameters of the embeddings and of a head over the vocabulary, which grow with the width
    alone. A tied head is one with them; what reads images has neither, and few outside its blocks.
    """
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    weights = {weight for end in ends if (weight := getattr(end, "weight", None)) is not None}
    return sum(weight.numel() for weight in weights)


def _growth(outside: int, inside: int, times: float) -> float:
    """f with outside * f + inside * f**3 = times * (outside + inside): width and depth alike."""
    low, high = 1.0, times
    for _ in range(60):
        middle = (low + high) / 2
        if outside * middle + inside * middle**3 < times * (outside + inside):
            low = middle
        else:
            high = middle
    return high


def _smallest_step(hidden: int, heads: int, groups: int) -> int:
    """Heads that are added at a time: whole groups of them, and widths of whole packed blocks."""
    step, per_head = groups, hidden // heads
    if hidden % MULTIPLE == 0:
        while step * per_head % MULTIPLE:
            step += groups
    return step
