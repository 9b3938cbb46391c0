"""A larger model that computes what a small Llama does, to be tuned further.

Decoding is bound by memory traffic only where the weights are many, and a model of random weights
drafts and writes nothing that means anything. So the embedded base is grown (Net2Net: Chen et al.
2016, arXiv:1511.05641): every hidden unit, attention head and feed-forward unit is there `times`
times, and what reads hidden units has its weights divided by `times`, so that sums stay. RMSNorm's
mean does not change when all it averages is repeated. The lm_head is tied to the embeddings, which
are not divided, so that the last norm's weight is. Further blocks have outputs of zero: they add
nothing. With `noise` 0 the logits are the small model's up to rounding.

The copies would learn the same thing for ever. Noise tells them apart, and zeros start to learn.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

#: What a block adds to the residual stream comes out of these.
OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def sources(layers: int, small: int) -> list[tuple[int, bool]]:
    """Of each new block: which block of the small model it is made of, and whether it is the
    one that does its work (the first of those that are made of it)."""
    made_of = [place * small // layers for place in range(layers)]
    return [(block, block not in made_of[:place]) for place, block in enumerate(made_of)]


def grow(small: Any, times: int, layers: int, noise: float = 0.0, seed: int = 0) -> Any:
    """A Llama `times` as wide and `layers` deep that gives the same logits, in float32.

    noise: of every weight, in standard deviations of its matrix.

    Raises:
        ValueError: no Llama with tied embeddings and without biases, or fewer layers than it has.
    """
    config = small.config
    biased = config.attention_bias or config.mlp_bias
    if config.model_type != "llama" or not config.tie_word_embeddings or biased:
        raise ValueError("a Llama with tied embeddings and without biases can be grown")
    if layers < config.num_hidden_layers:
        raise ValueError(f"{layers} layers are fewer than the {config.num_hidden_layers} it has")
    changed = {
        "hidden_size": config.hidden_size * times,
        "intermediate_size": config.intermediate_size * times,
        "num_attention_heads": config.num_attention_heads * times,
        "num_key_value_heads": config.num_key_value_heads * times,
        "num_hidden_layers": layers,
        "head_dim": config.head_dim,
        "dtype": "float32",
    }
    large = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), **changed}))
    random = torch.Generator().manual_seed(seed)
    given = {name: tensor.float() for name, tensor in small.state_dict().items()}
    grown = {
        "model.embed_tokens.weight": given["model.embed_tokens.weight"].repeat(1, times),
        "model.norm.weight": given["model.norm.weight"].repeat(times) / times,
    }
    for place, (block, works) in enumerate(sources(layers, config.num_hidden_layers)):
        prefix = f"model.layers.{block}."
        for name in (name.removeprefix(prefix) for name in given if name.startswith(prefix)):
            weight = given[prefix + name]
            if weight.ndim == 1:
                tiled = weight.repeat(times)
            else:
                tiled = weight.repeat(times, times) / times
                jitter = torch.randn(tiled.shape, generator=random) * (noise * tiled.std())
                tiled = tiled + jitter if works or name not in OUTPUTS else jitter
            grown[f"model.layers.{place}.{name}"] = tiled
    grown["lm_head.weight"] = grown["model.embed_tokens.weight"]
    large.load_state_dict(grown)
    return large


def save_grown(base: Path, out: Path, times: int, layers: int, noise: float) -> None:
    """A grown base in bfloat16 beside the small one's tokenizer; what is there already is kept."""
    if (out / "model.safetensors").is_file():
        return
    small = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    work = out.with_name(f".{out.name}")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base, work, ignore=shutil.ignore_patterns("*.safetensors"))
    grow(small, times, layers, noise).to(torch.bfloat16).save_pretrained(work)
    work.rename(out)
