"""A pass through the layers of a Llama and its kin, in as few operations as it takes.

A decoding pass over a handful of tokens waits for the call of each small operation about as long
as for the weights. transformers' layers make some fifty a layer; here there are some thirty, with
the same roundings: modules are called only where an adapter sits in them, the mask is turned into
numbers once for all layers, and results are written in place.

Shapes: B rows, N nodes, M = B N, D width, H heads, G key-value heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .cache import SlotCache

#: Decoder layers of this one kind: two norms before, turned positions, a gated MLP, no scales.
#: By class name, as a name that is not here may do more than its attributes show.
KIN = frozenset({"Llama", "Mistral", "Qwen2", "Qwen3"})

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Norm:
    """x / RMS(x) * w, as transformers rounds it."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [.., width]."""
        wide = x.float()
        scale = (wide * wide).mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        return torch.mul(wide, scale, out=torch.empty_like(x)).mul_(self.weight)


@dataclass(frozen=True)
class Layer:
    """One layer's parts. of_q, of_k: norms of each head, where the model has them."""

    before: Norm
    q: Product
    k: Product
    v: Product
    of_q: Norm | None
    of_k: Norm | None
    o: Product
    after: Norm
    gate: Product
    up: Product
    act: Product
    down: Product
    width: int
    scale: float


class LeanLayers:
    """What `Parts.layers` does in a decoding pass, by itself."""

    def __init__(self, model: Any) -> None:
        """model: the decoder, of which `is_kin` is true."""
        self.embed, self.rotary = model.embed_tokens, model.rotary_emb
        self.layers = [layer_of(block) for block in model.layers]
        self.last = norm_of(model.norm)

    def __call__(
        self,
        cache: SlotCache,
        ids_BN: torch.Tensor,
        positions_BN: torch.Tensor,
        seen_B1NW: torch.Tensor,
    ) -> torch.Tensor:
        """x_BND. seen_B1NW: whether a node attends to a slot; every node to one at least."""
        x_MD = self._run(cache, ids_BN, positions_BN, seen_B1NW, None, None)
        return x_MD.view(*ids_BN.shape, -1)

    def read(
        self,
        cache: SlotCache,
        ids_BN: torch.Tensor,
        positions_BN: torch.Tensor,
        seen_B1NW: torch.Tensor,
        lengths: list[int],
    ) -> torch.Tensor:
        """x_BD at the last token of each row, of which the first `lengths` are real: what fills
        them up is left out of all products, and of the last layer all but those."""
        rows, nodes = ids_BN.shape
        device = ids_BN.device
        length_B1 = torch.tensor(lengths, device=device)[:, None]
        real_BN = torch.arange(nodes, device=device) < length_B1
        ends_B = torch.arange(rows, device=device) * nodes + length_B1[:, 0] - 1
        real_M = real_BN.flatten().nonzero()[:, 0]
        return self._run(cache, ids_BN, positions_BN, seen_B1NW, real_M, ends_B)

    def _run(
        self,
        cache: SlotCache,
        ids_BN: torch.Tensor,
        positions_BN: torch.Tensor,
        seen_B1NW: torch.Tensor,
        real_M: torch.Tensor | None,
        ends_B: torch.Tensor | None,
    ) -> torch.Tensor:
        """real_M: places of the tokens that count among all; None: all. ends_B: of those that are
        given back."""
        ids_M, positions_M = ids_BN.flatten(), positions_BN.flatten()
        if real_M is not None:
            ids_M, positions_M = ids_M[real_M], positions_M[real_M]
        x_1MD = self.embed(ids_M[None])
        cos_1ME, sin_1ME = self.rotary(x_1MD, positions_M[None])
        turn = cos_1ME[0][:, None], signed(sin_1ME)[0][:, None]
        mask_B1NW = torch.zeros(seen_B1NW.shape, dtype=x_1MD.dtype, device=x_1MD.device)
        mask_B1NW.masked_fill_(~seen_B1NW, -torch.inf)
        x_MD = x_1MD[0].clone()
        *first, last = self.layers
        spread = Spread(ids_BN.shape, real_M, real_M)
        for index, layer in enumerate(first):
            x_MD = self._layer(cache, index, layer, x_MD, spread, turn, mask_B1NW)
        if real_M is not None and ends_B is not None:
            spread = Spread(ids_BN.shape, real_M, ends_B)
        x_MD = self._layer(cache, len(first), last, x_MD, spread, turn, mask_B1NW)
        return self.last(x_MD)

    @staticmethod
    def _layer(
        cache: SlotCache,
        index: int,
        layer: Layer,
        x_MD: torch.Tensor,
        spread: Spread,
        turn: tuple[torch.Tensor, torch.Tensor],
        mask_B1NW: torch.Tensor,
    ) -> torch.Tensor:
        """x after the layer; x before it is written over."""
        read_MD = layer.before(x_MD)
        q_MHE, k_MGE, v_MGE = (
            product(read_MD).view(len(read_MD), -1, layer.width)
            for product in (layer.q, layer.k, layer.v)
        )
        if layer.of_q is not None and layer.of_k is not None:
            q_MHE, k_MGE = layer.of_q(q_MHE), layer.of_k(k_MGE)
        q_BHNE, k_BGNE, v_BGNE = (
            spread.out(part).transpose(1, 2)
            for part in (turned(q_MHE, *turn), turned(k_MGE, *turn), v_MGE)
        )
        k_BGWE, v_BGWE = cache.write(index, k_BGNE, v_BGNE)
        mixed_BHNE = F.scaled_dot_product_attention(
            q_BHNE,
            k_BGWE,
            v_BGWE,
            attn_mask=mask_B1NW,
            scale=layer.scale,
            enable_gqa=q_BHNE.shape[1] != k_BGWE.shape[1],
        )
        x_MD = spread.kept(x_MD)
        x_MD += layer.o(spread.back(mixed_BHNE.transpose(1, 2).flatten(0, 1).flatten(1)))
        read_MD = layer.after(x_MD)
        x_MD += layer.down(layer.act(layer.gate(read_MD)).mul_(layer.up(read_MD)))
        return x_MD


@dataclass(frozen=True)
class Spread:
    """Between tokens in one line, as products take them, and rows of one length, as attention
    does. shape: [B, N]. real_M: places of the tokens in the line, None where all are. wanted:
    places of those that go on behind attention."""

    shape: tuple[int, ...]
    real_M: torch.Tensor | None
    wanted: torch.Tensor | None

    def out(self, part_MHE: torch.Tensor) -> torch.Tensor:
        """[B, N, H, E]; zeros where no token is."""
        if self.real_M is None:
            return part_MHE.view(*self.shape, *part_MHE.shape[1:])
        whole = part_MHE.new_zeros((self.shape[0] * self.shape[1], *part_MHE.shape[1:]))
        whole.index_copy_(0, self.real_M, part_MHE)
        return whole.view(*self.shape, *part_MHE.shape[1:])

    def back(self, mixed_AD: torch.Tensor) -> torch.Tensor:
        """Of all A = B N places the wanted ones."""
        return mixed_AD if self.wanted is None else mixed_AD.index_select(0, self.wanted)

    def kept(self, x_MD: torch.Tensor) -> torch.Tensor:
        """Of the line the wanted ones."""
        if self.wanted is None or self.real_M is None or self.wanted is self.real_M:
            return x_MD
        return x_MD.index_select(0, torch.searchsorted(self.real_M, self.wanted))


def signed(sin: torch.Tensor) -> torch.Tensor:
    """The sines as `turned` wants them: the first half negative."""
    half = sin.shape[-1] // 2
    return torch.cat([-sin[..., :half], sin[..., half:]], -1)


def turned(x_MHE: torch.Tensor, cos_M1E: torch.Tensor, signed_M1E: torch.Tensor) -> torch.Tensor:
    """Rotary positions: each half times the cosine, and the other half times the signed sine."""
    half = x_MHE.shape[-1] // 2
    return (x_MHE * cos_M1E).add_(x_MHE.roll(half, -1).mul_(signed_M1E))


def is_kin(model: Any) -> bool:
    """Whether every layer of a decoder is one of those that are known here, with nothing between
    its parts: no wrapper, no hook."""
    blocks = getattr(model, "layers", None)
    if not blocks or getattr(model, "embed_tokens", None) is None:
        return False
    name = type(blocks[0]).__name__.removesuffix("DecoderLayer")
    if name not in KIN or getattr(model.config, "_attn_implementation", None) != "sdpa":
        return False
    whole = [model, model.norm, *(module for block in blocks for module in block.modules())]
    known = [(model.norm, "RMSNorm")]
    for block in blocks:
        known += [(block, "DecoderLayer"), (block.self_attn, "Attention"), (block.mlp, "MLP")]
        known += [(norm, "RMSNorm") for norm in norms_of(block)]
    return not any(map(is_changed, whole)) and all(
        type(module).__name__ == f"{name}{kind}" for module, kind in known
    )


def norms_of(block: Any) -> list[nn.Module]:
    """A layer's, with those of its heads where it has them."""
    attention = block.self_attn
    of_heads = [getattr(attention, part, None) for part in ("q_norm", "k_norm")]
    both = [block.input_layernorm, block.post_attention_layernorm, *of_heads]
    return [norm for norm in both if norm is not None]


def is_changed(module: nn.Module) -> bool:
    """Whether something watches a module's calls, or took its `forward` over (accelerate does for
    layers on several devices)."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or "forward" in vars(module)


def layer_of(block: Any) -> Layer:
    attention, mlp = block.self_attn, block.mlp
    return Layer(
        before=norm_of(block.input_layernorm),
        q=product_of(attention.q_proj),
        k=product_of(attention.k_proj),
        v=product_of(attention.v_proj),
        of_q=norm_of(attention.q_norm) if hasattr(attention, "q_norm") else None,
        of_k=norm_of(attention.k_norm) if hasattr(attention, "k_norm") else None,
        o=product_of(attention.o_proj),
        after=norm_of(block.post_attention_layernorm),
        gate=product_of(mlp.gate_proj),
        up=product_of(mlp.up_proj),
        act=mlp.act_fn,
        down=product_of(mlp.down_proj),
        width=attention.head_dim,
        scale=attention.scaling,
    )


def norm_of(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def product_of(module: nn.Module) -> Product:
    """A plain layer without the calls around it; another one (an adapter, packed weights) as it
    is."""
    if type(module) is not nn.Linear:
        return module
    return lambda x: F.linear(x, module.weight, module.bias)
