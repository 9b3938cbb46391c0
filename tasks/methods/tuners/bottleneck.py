"""Bottleneck adapters: h + s * up(act(down(h))), small layers put into a frozen model.

Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021, arXiv:2005.00247; parallel: He et al.
2022, arXiv:2110.04366. A tuner for PEFT, which has none of them. This file needs torch, peft and
transformers alone, as it travels inside registered models; importing it registers the method.

    down: Linear(d, b), kaiming weight, zero bias      b = max(1, d // reduction_factor)
    up:   Linear(b, d), zero, so that training starts from the base exactly
    trained weights of one adapter: 2 d b + b + d

Four placements, F the sub-layer (attention or feed-forward), h its output, x its input:

    double_sequential  h + s f(h) in place of h = F(x), after attention and after the feed-forward
    sequential         the same after the feed-forward alone
    sequential_normed  N(v + s f(N(v))) in place of N(v), N the norm over the feed-forward's
                       residual sum v; in post-norm blocks (BERT, RoBERTa) alone
    parallel           h + s f(x), x the input of the feed-forward

The block's own residual sum and norm follow, as they did. Against AdapterHub's `adapters` 1.3.0,
outputs compared on tiny models with the same weights (tests/reference/adapterhub.py):

    double_seq_bn  the same function, with its non_linearity (swish, "silu" here) as `activation`.
                   While training with dropout it differs: there h is dropped out before the
                   adapter; here after it, but for GPT-2's feed-forward.
    seq_bn         sequential_normed in post-norm blocks, dropout included; in pre-norm blocks it
                   reads h + residual, which nothing here does. With `original_ln_before=False`
                   sequential in both, dropout as above.
    par_bn         the same function in post-norm blocks, dropout included, with scaling 4 and
                   reduction_factor 2, its defaults. In pre-norm blocks it reads the residual;
                   here it reads what the feed-forward reads, after the norm.

AdapterHub draws `up` (its "bert" start), for all but par_bn, which starts as here. As there, the
decoder's cross-attention has no adapter unless `attention_modules` names it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers.activations import ACT2FN

PEFT_TYPE = "BOTTLENECK"
PREFIX = "bottleneck_"
PLACEMENTS = ("double_sequential", "sequential", "sequential_normed", "parallel")
NO_MERGE = (
    "bottleneck adapters do not merge: there is a nonlinearity between down and up, so no weight "
    "of the base can hold them; serve them unmerged"
)


class Blocks(NamedTuple):
    """The endings of the modules to wrap; `*` stands for one part of a dotted name.

    attention: the attention's output projection.
    feed_forward: the module whose output is the feed-forward's.
    parallel: the feed-forward as one module, d wide in and out; or, where a block splits it, the
        module that gets the feed-forward's input as `input_tensor` and adds it to the output.
    normed: the norm over that sum; none in pre-norm blocks.
    """

    attention: tuple[str, ...]
    feed_forward: tuple[str, ...]
    parallel: tuple[str, ...]
    normed: tuple[str, ...] = ()


LLAMA = Blocks(("self_attn.o_proj",), ("mlp",), ("mlp",))
# "output.dense" alone would be the attention's too.
BERT = Blocks(
    ("attention.output.dense",),
    ("layer.*.output.dense",),
    ("layer.*.output",),
    ("layer.*.output.LayerNorm",),
)
T5 = Blocks(("SelfAttention.o",), ("DenseReluDense",), ("DenseReluDense",))
VIT = Blocks(("attention.o_proj",), ("mlp",), ("mlp",))
GPT2 = Blocks(("attn.c_proj",), ("mlp",), ("mlp",))

BLOCKS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"), LLAMA),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), BERT),
    **dict.fromkeys(("t5", "mt5"), T5),
    **dict.fromkeys(("vit", "deit"), VIT),
    "gpt2": GPT2,
}


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]
    """What PEFT is told.

    Raises:
        ValueError: an unknown placement or activation, or a reduction below 1.
    """

    # PEFT reads it from every config; the two lists of modules below say what it would.
    target_modules: ClassVar[None] = None

    placement: str = field(
        default="double_sequential", metadata={"help": f"One of {', '.join(PLACEMENTS)}."}
    )
    reduction_factor: int = field(
        default=16, metadata={"help": "Width of the model over width of the bottleneck."}
    )
    activation: str = field(default="relu", metadata={"help": "A name of transformers' ACT2FN."})
    scaling: float = field(
        default=1.0, metadata={"help": "s of the formula; 4.0 is usual for parallel."}
    )
    attention_modules: list[str] | None = field(
        default=None, metadata={"help": "Endings of module names, in place of the map's."}
    )
    feed_forward_modules: list[str] | None = field(
        default=None, metadata={"help": "Endings of module names, in place of the map's."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules of the base that learn and are saved too."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement {self.placement!r}; choose from {', '.join(PLACEMENTS)}")
        if self.reduction_factor < 1:
            raise ValueError(f"reduction_factor {self.reduction_factor}; it must be at least 1")
        if self.activation not in ACT2FN:
            raise ValueError(f"activation {self.activation!r}; choose from {', '.join(ACT2FN)}")
        # Its weights would be trained by nobody and saved nowhere.
        if any(True for _ in ACT2FN[self.activation].parameters()):
            raise ValueError(f"activation {self.activation!r} has weights; choose one without")
        for name in ("attention_modules", "feed_forward_modules"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])

    def endings(self) -> list[str]:
        """The endings of the modules to wrap, once they are known."""
        attention = self.attention_modules if self.placement == "double_sequential" else None
        return [*(attention or []), *(self.feed_forward_modules or [])]


class BottleneckLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A sub-layer of the base with its adapters; those of one layer may differ in everything.

    Of several active ones the parallel ones are added first, then each sequential one reads what
    the last one left.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("activations", "scalings", "placements")

    # What is used of BaseTunerLayer, which has no types.
    disable_adapters: bool
    active_adapters: list[str]
    get_base_layer: Callable[[], nn.Module]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, width: int
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adds_residual = _adds_residual(base_layer)
        # The name of the adapter has to be the last part of a key but one: PEFT cuts it out there
        # and nowhere else when it saves. So two dicts of layers, not one of adapters.
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.activations: dict[str, nn.Module] = {}
        self.scalings: dict[str, float] = {}
        self.placements: dict[str, str] = {}
        self._active_adapter = [adapter_name]
        self.update_layer(adapter_name, config, width)

    def update_layer(self, adapter_name: str, config: BottleneckConfig, width: int) -> None:
        """Add an adapter that starts as nothing."""
        weight = next(self.get_base_layer().parameters())
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
        narrow = bottleneck_width(width, config.reduction_factor)
        down, up = nn.Linear(width, narrow, dtype=dtype), nn.Linear(narrow, width, dtype=dtype)
        # nn.Linear has drawn the kaiming weight.
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        self.bottleneck_down[adapter_name] = down
        self.bottleneck_up[adapter_name] = up
        self.activations[adapter_name] = ACT2FN[config.activation]
        self.scalings[adapter_name] = config.scaling
        self.placements[adapter_name] = config.placement
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base's output with the active adapters in it, in the base's dtype."""
        names = [] if self.disable_adapters else self.active_adapters
        placed = [(name, self.placements[name]) for name in names if name in self.placements]
        parallel = [name for name, placement in placed if placement == "parallel"]
        normed = [name for name, placement in placed if placement == "sequential_normed"]
        sequential = [name for name, _ in placed if name not in (*parallel, *normed)]
        if normed:
            # N(v) becomes N(v + s f(N(v))).
            y, v = self.base_layer(*args, **kwargs), args[0]
            v = v + sum(self._update(name, y, v.dtype) for name in normed)
            h: torch.Tensor = self.base_layer(v, *args[1:], **kwargs)
        elif parallel and self.adds_residual:
            # F(z) + x becomes F(z) + (x + s f(x)): the block hands x over, nothing is remembered.
            z, x, *rest = args
            update = sum(self._update(name, x, x.dtype) for name in parallel)
            h = self.base_layer(z, x + update, *rest, **kwargs)
        else:
            h = self.base_layer(*args, **kwargs)
            if parallel:
                h = h + sum(self._update(name, args[0], h.dtype) for name in parallel)
        for name in sequential:
            h = h + self._update(name, h, h.dtype)
        return h

    def _update(self, name: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """s * up(act(down(x))), computed in the adapter's dtype, which may be finer."""
        down, up = self.bottleneck_down[name], self.bottleneck_up[name]
        narrow = self.activations[name](down(x.to(next(down.parameters()).dtype)))
        update: torch.Tensor = self.scalings[name] * up(narrow)
        return update.to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises NotImplementedError, always."""
        raise NotImplementedError(NO_MERGE)

    def unmerge(self) -> None:
        """Raises NotImplementedError, always."""
        raise NotImplementedError(NO_MERGE)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        # PEFT looks for `weight`, which a whole feed-forward has not. And no dtype: it would round
        # loaded float32 weights to the base's.
        return next(base_layer.parameters()).device, None


class BottleneckModel(BaseTuner):  # type: ignore[misc]
    """A model of transformers with bottleneck adapters in it."""

    prefix = PREFIX
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(
        self, peft_config: BottleneckConfig, model_config: dict[str, Any]
    ) -> BottleneckConfig:
        # The choice needs the model itself, for the candidates of its error.
        return peft_config

    def _prepare_model(self, peft_config: BottleneckConfig, model: nn.Module) -> None:
        # Everything that can be wrong is found here, before the model is touched.
        self._widths = target_widths(model, peft_config)

    @staticmethod
    def _check_target_module_exists(peft_config: BottleneckConfig, key: str) -> bool:
        return _is_target(key, peft_config, peft_config.endings())

    def _create_and_replace(
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        width = self._widths[current_key]
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config, width)
        else:
            layer = BottleneckLayer(target, adapter_name, peft_config, width)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's would also hand over `weight`, which a whole feed-forward has not.
        setattr(parent, child_name, new_module)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was active, the first of the others by name is active next."""
        active = list(self.active_adapters)
        super().delete_adapter(adapter_name)
        # PEFT lets each layer choose, and asks the first one: wrong where they hold different ones.
        if adapter_name in active and self.peft_config:
            others = [name for name in active if name != adapter_name]
            self.set_adapter(others or min(self.peft_config))


def bottleneck_width(width: int, reduction_factor: int) -> int:
    """b of the formula."""
    return max(1, width // reduction_factor)


def count(widths: Iterable[int], reduction_factor: int) -> int:
    """The trained weights of adapters on modules of these widths; see `target_widths`."""
    narrow = [(d, bottleneck_width(d, reduction_factor)) for d in widths]
    return sum(2 * d * b + b + d for d, b in narrow)


def target_widths(model: nn.Module, config: BottleneckConfig) -> dict[str, int]:
    """The modules that the config wraps, and the width of the adapter of each. It needs shapes
    alone, so the model may be on the meta device.

    Fills in the config's endings where they are not given, by the model's `model_type`.

    Raises:
        ValueError: no map for this model, an ending that matches nothing, a module that cannot
            have such an adapter, or one inside another.
    """
    _fill_endings(model, config)
    modules = dict(model.named_modules())
    # A wrapped module is there twice: as the wrapper, and as its base_layer.
    plain = {key: _plain(key) for key in modules if not key.endswith(".base_layer")}
    for ending in config.endings():
        if not any(_is_target(name, config, [ending]) for name in plain.values()):
            raise ValueError(f"no module of this model ends in {ending!r}; {_candidates(model)}")
    names = [key for key, name in plain.items() if _is_target(name, config, config.endings())]
    _check_not_nested(modules, names)
    return {name: _width(name, modules[name], config) for name in names}


def known_endings(model_type: str, placement: str) -> dict[str, tuple[str, ...]]:
    """The map's endings for a model, by the name of the config's field."""
    blocks = BLOCKS[model_type]
    other = {"parallel": blocks.parallel, "sequential_normed": blocks.normed}
    feed_forward = other.get(placement, blocks.feed_forward)
    return {"attention_modules": blocks.attention, "feed_forward_modules": feed_forward}


def register() -> None:
    """Make the method known to PEFT, once or often. `register_peft_method` would refuse a name
    that is not in PEFT's own list."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = BottleneckConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = BottleneckModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PREFIX


def _fill_endings(model: nn.Module, config: BottleneckConfig) -> None:
    needed = ["feed_forward_modules"]
    if config.placement == "double_sequential":
        needed.append("attention_modules")
    missing = [name for name in needed if getattr(config, name) is None]
    if not missing:
        return
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in BLOCKS:
        raise ValueError(
            f"no module map for model_type {model_type!r} (there is one for "
            f"{', '.join(sorted(BLOCKS))}); set {' and '.join(missing)}; {_candidates(model)}"
        )
    known = known_endings(model_type, config.placement)
    if not known["feed_forward_modules"]:
        raise ValueError(
            f"{config.placement} on {model_type}, which has no norm over the feed-forward's "
            "residual sum; choose another placement"
        )
    for name in missing:
        setattr(config, name, list(known[name]))


def _is_target(key: str, config: BottleneckConfig, endings: list[str]) -> bool:
    """Whether a module's name has one of these endings, part by part, and no trained copy."""
    saved = config.modules_to_save or []
    if any(f".{name}." in f".{key}." for name in saved):
        return False
    parts = key.split(".")
    return any(
        len(wanted) <= len(parts)
        and all(
            want in ("*", part)
            for want, part in zip(wanted, parts[len(parts) - len(wanted) :], strict=True)
        )
        for wanted in (ending.split(".") for ending in endings)
    )


def _check_not_nested(modules: dict[str, nn.Module], names: list[str]) -> None:
    """A module inside a wrapped one would change its name, and saved adapters lose their place."""
    wrapped = {name for name, module in modules.items() if isinstance(module, BottleneckLayer)}
    wrapped.update(names)
    for name in wrapped:
        parts = name.split(".")
        above = {".".join(parts[:end]) for end in range(1, len(parts))} & wrapped
        if above:
            raise ValueError(
                f"{_plain(name)} lies inside {_plain(above.pop())}, and both would have bottleneck "
                "adapters; load adapters of such placements into a model each"
            )


def _width(name: str, module: Any, config: BottleneckConfig) -> int:
    """How wide a module's output is: as wide as that of the last linear layer in it, or a norm."""
    base: Any = module.get_base_layer() if isinstance(module, BottleneckLayer) else module
    shapes = _linear_shapes(base)
    if config.placement == "sequential_normed":
        if shapes or getattr(base, "weight", None) is None or base.weight.ndim != 1:
            raise ValueError(f"{name} is no norm, which {config.placement} adapters are put around")
        return int(base.weight.numel())
    if not shapes:
        raise ValueError(f"{name} holds no linear layer, so its width is unknown")
    width = shapes[-1][1]
    if config.placement == "parallel" and not _adds_residual(base) and shapes[0][0] != width:
        raise ValueError(
            f"{name} reads {shapes[0][0]} features and writes {width}; a parallel adapter needs "
            "the whole feed-forward, as wide in as out"
        )
    return width


def _linear_shapes(module: nn.Module) -> list[tuple[int, int]]:
    """(in, out) of every linear layer; GPT-2's Conv1D is one under other names."""
    shapes: list[tuple[int, int]] = []
    layers: Iterable[Any] = module.modules()
    for layer in layers:
        if isinstance(layer, nn.Linear):
            shapes.append((layer.in_features, layer.out_features))
        elif hasattr(layer, "nx") and hasattr(layer, "nf"):
            shapes.append((layer.nx, layer.nf))
    return shapes


def _adds_residual(module: nn.Module) -> bool:
    """Whether it is the second half of a split feed-forward, as BERT's `output` is."""
    return list(inspect.signature(module.forward).parameters)[1:2] == ["input_tensor"]


def _plain(key: str) -> str:
    return ".".join(part for part in key.split(".") if part != "base_layer")


def _candidates(model: nn.Module) -> str:
    """What an ending could be: the modules with linear layers, layer numbers as `*`."""
    endings: set[str] = set()
    for key, module in model.named_modules():
        below = [part for name, _ in module.named_modules() for part in name.split(".")]
        parts = _plain(key).split(".")
        # A list of blocks, what holds one, and a block itself are no sub-layers; nor are adapters.
        if any(part.isdigit() for part in below) or parts[-1].isdigit() or PREFIX in key:
            continue
        if key and _linear_shapes(module):
            numbers = [i for i, part in enumerate(parts) if part.isdigit()]
            start = max(0, numbers[-1] - 1) if numbers else 0
            endings.add(".".join("*" if part.isdigit() else part for part in parts[start:]))
    return f"choose from {', '.join(sorted(endings))}"


register()
