"""BitFit as a PEFT tuner: the model's own biases learn and nothing else.
Ben Zaken et al. 2022, arXiv:2106.10199.

    y = f(x; W, b)   becomes   y = f(x; W, b'),   b' = b at the start, W and b frozen

Each adapter trains a whole copy b' of the bias, not a difference, so that nothing is rounded
twice: the first step, a disabled adapter, a merge and what it restores are all exact. PEFT keeps
b' in float32 over a half-precision base; every pass casts it to the base's dtype, and a merge
stores that same cast, so that outputs do not move and only the bits below that dtype are dropped.

A bias is a parameter called `bias` of a module without children: linear and convolution layers,
GPT-2's Conv1D, norms. Biases under other names (`in_proj_bias` of `nn.MultiheadAttention`, those
of some expert layers) are not covered.

The file needs torch and peft alone: it travels inside a registered model.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    check_adapters_to_merge,
    check_target_module_exists,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.func import functional_call

NAME = "BITFIT"
PREFIX = "bitfit_"


@dataclass
class BitFitConfig(PeftConfig):  # type: ignore[misc]
    """What of a model BitFit trains.

    target_modules: None for every bias but those of the output head (`get_output_embeddings()`)
        and of `modules_to_save`; or name endings; or a regular expression for the whole name.
    exclude_modules: modules to leave out, named in the same two ways.
    modules_to_save: modules to train whole beside the biases, such as a classifier.
    """

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NAME


class BitFitLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A module whose bias is swapped for the active adapter's.

    base_layer: the module as it was, frozen.
    bitfit_bias: the trained bias of each adapter, in the shape of the module's own.
    bitfit_unmerged: the module's own bias while an adapter's is merged in its place.
    """

    adapter_layer_names = ("bitfit_bias",)
    base_layer: Any
    bitfit_unmerged: torch.Tensor | None

    def __init__(self, base_layer: nn.Module, adapter_name: str, inference_mode: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bitfit_bias = nn.ParameterDict()
        # A buffer, so that it moves with the model; not persistent, so that no file holds it.
        self.register_buffer("bitfit_unmerged", None, persistent=False)
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, inference_mode)

    def update_layer(self, adapter_name: str, inference_mode: bool) -> None:
        """Add an adapter; it starts at the module's own bias, whatever is merged now."""
        own = self.base_layer.bias if self.bitfit_unmerged is None else self.bitfit_unmerged
        self.bitfit_bias[adapter_name] = nn.Parameter(own.detach().clone())
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @property
    def bias(self) -> torch.Tensor:
        """The bias that applies now. Modules that read it past `forward` (the output layer of
        `nn.MultiheadAttention`) get the trained one, too."""
        own: torch.Tensor = self.base_layer.bias
        active = [name for name in self.active_adapters if name in self.bitfit_bias]
        if self.disable_adapters or self.merged or not active:
            return own
        if len(active) > 1:
            raise ValueError(
                f"{', '.join(active)} are active at once, but a module has one bias: "
                "call set_adapter with one of them"
            )
        trained: torch.Tensor = self.bitfit_bias[active[0]]
        # A view: bitsandbytes gives the bias that it reads the dtype of the input, for good.
        return trained.view_as(trained).to(own.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters and self.merged:
            self.unmerge()
        bias = self.bias
        if bias is self.base_layer.bias:
            return self.base_layer(*args, **kwargs)
        if "forward" in vars(self.base_layer):  # accelerate's hooks, bound to this very module
            return functional_call(self.base_layer, {"bias": bias}, args, kwargs)
        return _with_bias(self.base_layer, bias)(*args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put an adapter's bias in place of the module's own, in the dtype of that.

        safe_merge: refuse a bias that holds NaN or infinity.

        Raises:
            ValueError: more than one adapter, or one while another is merged.
        """
        wanted = check_adapters_to_merge(self, adapter_names)
        names = [name for name in wanted if name in self.bitfit_bias]
        if not names:
            return
        if len(names) + len(self.merged_adapters) > 1:
            raise ValueError(
                f"{', '.join([*self.merged_adapters, *names])} cannot be merged together: "
                "a module has one bias. Merge one, and unmerge it before the next"
            )
        bias = self.bitfit_bias[names[0]].detach()
        if safe_merge and not torch.isfinite(bias).all():
            raise ValueError(f"the bias of adapter {names[0]} holds NaN or infinity")
        own = self.base_layer.bias
        self.bitfit_unmerged = own.data
        # A copy: the adapter may go on learning. The parameter itself stays, and so does a tie.
        own.data = bias.to(own.dtype, copy=True)
        self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        """Put the module's own bias back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer.bias.data = self.bitfit_unmerged
        self.bitfit_unmerged = None
        self.merged_adapters.clear()

    def __getattr__(self, name: str) -> Any:
        """What the module has beside weight and bias (`eps`, `kernel_size`), for code that reads
        it there."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # while a copy or a pickle is being filled
                raise
            return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        return "bitfit." + super().__repr__()


class BitFitModel(BaseTuner):  # type: ignore[misc]
    """A model whose biases are `BitFitLayer`s. Made by `get_peft_model(model, BitFitConfig())`.

    Raises:
        ValueError: the model has no bias to train, a name of `target_modules` matches none, or
            a bias belongs to two modules.
    """

    prefix = PREFIX
    tuner_layer_cls = BitFitLayer
    # Which modules have a bias is read from the model, not from a table of architectures.
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        # None stays None: the file then says "every bias", not a set in the order of its hashes.
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Find the biases and refuse what cannot be, before anything is replaced."""
        self.biases = _biases(model)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        head_ids = {id(weight) for weight in head.parameters()} if head is not None else set()
        self.head = {name for name, bias in self.biases.items() if id(bias) in head_ids}
        chosen = [
            name for name in self.biases if self._check_target_module_exists(peft_config, name)
        ]
        _check_chosen(peft_config, model, self.biases, chosen)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:
        wanted = peft_config.target_modules
        found = _matches(peft_config, ".*" if wanted is None else wanted, key)
        if found and (key not in self.biases or (wanted is None and key in self.head)):
            return False
        return found  # falsy, yet not False, where excluded: PEFT tells the two apart

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, BitFitLayer):
            target.update_layer(adapter_name, peft_config.inference_mode)
            return
        layer = BitFitLayer(target, adapter_name, peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's moves the new weights to the old one's device, where these copies are already.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT's makes new parameters, which unfreezes those of an adapter that is not active.
        for layer in self.model.modules():
            if isinstance(layer, BitFitLayer) and adapter_name in layer.bitfit_bias:
                bias = layer.bitfit_bias[adapter_name]
                if autocast_adapter_dtype and bias.dtype.itemsize < 4:
                    bias.data = bias.data.to(torch.float32)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT would drop the argument in silence and use the active adapter for every row.
        if kwargs.get("adapter_names") is not None:
            raise ValueError("BitFit has no adapter for each row: call set_adapter instead")
        yield


def register() -> None:
    """Make BitFit known to PEFT, for what is loaded from now on: of two versions of this file in
    one process the last one registered counts. `register_peft_method` takes only names of PEFT's
    own enum."""
    PEFT_TYPE_TO_CONFIG_MAPPING[NAME] = BitFitConfig
    PEFT_TYPE_TO_TUNER_MAPPING[NAME] = BitFitModel
    PEFT_TYPE_TO_PREFIX_MAPPING[NAME] = PREFIX


def _with_bias(module: nn.Module, bias: torch.Tensor) -> nn.Module:
    """A module that shares all with this one but the bias.

    Made for each pass: `functional_call` changes the module itself meanwhile, which a second
    thread would see.
    """
    twin = object.__new__(type(module))
    twin.__dict__ = {**module.__dict__, "_parameters": {**module._parameters, "bias": bias}}
    return twin


def _biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """The biases that can be trained, by the name of their module."""
    biases = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        if not name or name.startswith(tuple(inside)):
            continue
        base = module.base_layer if isinstance(module, BitFitLayer) else module
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside.append(f"{name}.")
        bias = base._parameters.get("bias")
        if bias is not None and next(base.children(), None) is None:
            biases[name] = bias
    return biases


def _matches(peft_config: Any, wanted: Any, key: str) -> Any:
    return check_target_module_exists(
        SimpleNamespace(**{**vars(peft_config), "target_modules": wanted}), key
    )


def _check_chosen(
    peft_config: Any, model: nn.Module, biases: dict[str, nn.Parameter], chosen: list[str]
) -> None:
    wanted, kind = peft_config.target_modules, type(model).__name__
    if not biases or (wanted is None and not chosen):
        where = " outside its output head and what the config leaves out" if biases else ""
        raise ValueError(
            f"{kind} has no bias{where}, so BitFit has nothing to train; "
            "layer-norm tuning (LNTuningConfig) and LoRA (LoraConfig) need no bias"
        )
    # A regular expression is one name; those of a list each have to match.
    names = [wanted] if isinstance(wanted, str) else [[name] for name in wanted or []]
    unmatched = [
        name if isinstance(name, str) else name[0]
        for name in names
        if not any(_matches(peft_config, name, key) for key in chosen)
    ]
    if unmatched or not chosen:
        # Names without what every layer has in common; a bare number says nothing by itself.
        endings = {re.sub(r"^.*\.(?=[^.]*[^.\d])", "", key) for key in biases}
        raise ValueError(
            f"target_modules: {', '.join(unmatched) or 'an empty list'} matches no module of "
            f"{kind} that has a bias and is not left out; choose from {', '.join(sorted(endings))}"
        )
    owners = defaultdict(list)
    for name, weight in model.named_parameters(remove_duplicate=False):
        owners[id(weight)].append(name)
    for key in chosen:
        if len(owners[id(biases[key])]) > 1:
            raise ValueError(
                f"{' and '.join(owners[id(biases[key])])} are one bias, and BitFit would train "
                f"it for {key} alone: put {key} in exclude_modules"
            )
        if getattr(getattr(model.get_submodule(key), "_hf_hook", None), "offload", False):
            raise ValueError(
                f"{key} is offloaded by accelerate, which puts its own bias back at every pass: "
                "load the model without offloading"
            )


register()
