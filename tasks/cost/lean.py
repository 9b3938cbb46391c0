"""What the libraries import at their start and a plan has no use for is kept out of its process.

A plan compiles and distributes nothing, computes nothing on a GPU, and its sizes are whole numbers.
transformers, PEFT and torch's shapes import a compiler, distributed tensors, sympy and scipy for
these all the same, which is half of the time to a first answer. What is asked of a module that was
put off, beyond the few names that it is given here, imports the real one: nothing is ever missing.

For the process of the plan alone, before anything of ours imports torch: `tasks/cost/__main__.py`.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

Given = dict[str, Any]


class PutOff(ModuleType):
    """A module that runs when it is first asked for a name that it was not given."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        assert spec is not None
        assert spec.loader is not None
        if name == "__path__" and spec.submodule_search_locations is None:
            raise AttributeError(name)
        self.__class__ = ModuleType  # type: ignore[assignment]
        if spec.submodule_search_locations is not None:
            self.__path__ = spec.submodule_search_locations
        spec.loader.exec_module(self)
        # Some put another in their place.
        return getattr(sys.modules[self.__name__], name)


def put_off(name: str, given: Given, inner: str | None = None) -> None:
    """Put a module off. inner: a module inside of it that is imported now, without it; a package
    whose `__path__` is given lets all of those be."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, name
    module = importlib.util.module_from_spec(spec)
    if inner is not None:
        sys.modules[name] = module
        importlib.import_module(f"{name}.{inner}")
    if "__path__" not in given:
        # Else what is inside would run before what it is inside of.
        vars(module).pop("__path__", None)
    module.__class__ = PutOff
    vars(module).update(given)
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)


def unchanged(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """As a decorator, with options or without: what it decorates."""
    return unchanged if function is None else function


#: Torch's compiler: what marks functions for it.
MARKS: Given = dict.fromkeys(("disable", "allow_in_graph", "assume_constant_result"), unchanged)
#: What torch asks of sizes that may be symbols, as it is for numbers.
NUMBERS: Given = {
    "expect_true": bool,
    "guard_or_false": bool,
    "guard_or_true": bool,
    "guard_size_oblivious": bool,
    "statically_known_true": bool,
    "guarding_hint_or_throw": lambda size: size,
    "has_guarding_hint": lambda size: True,
    "is_nested_int": lambda size: False,
    "free_unbacked_symbols": lambda of: set(),
    "sym_and": lambda *terms: all(terms),
    "sym_or": lambda *terms: any(terms),
    "sym_eq": lambda x, y: tuple(x) == tuple(y) if isinstance(x, Sequence) else x == y,
}
LARGEST: Given = {"Max": max}
#: Models whose names transformers has from the start: a plan asks for all by those of `auto`, and
#: PEFT, as it is imported, for one of Bloom's.
NAMED = ("auto", "bloom")
#: What torch asks whether something is one of: a number of sympy's, a tensor of the other.
NO_SYMBOL: Given = {"Basic": type("Basic", (), {})}
NO_SHARD: Given = {"DTensor": type("DTensor", (), {})}


def without_names() -> None:
    """Import transformers without the names that its 2,000 files of models define, but for a few.
    Whoever asks for another has them all read then."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    module.__version__ = metadata.version("transformers")
    sys.modules[spec.name] = module
    names: Any = importlib.import_module("transformers.utils.import_utils")
    read, lazy = names.define_import_structure, names._LazyModule
    models = Path(module.__file__).with_name("models")

    def few(path: Any, prefix: str | None = None) -> Any:
        if path != models:
            return read(path, prefix)
        found: dict[Any, dict[str, set[str]]] = {}
        for kind in NAMED:
            for backends, files in read(path / kind, f"{prefix}.{kind}").items():
                found.setdefault(backends, {}).update(files)
        return found

    class Few(lazy):  # type: ignore[misc, valid-type]
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                # A file that is not imported yet is no name.
                if importlib.util.find_spec(f"{self.__name__}.{name}") is not None:
                    raise
            self.__class__ = lazy
            whole = lazy(self.__name__, self.__file__, read(models, "models"))
            for held in ("_modules", "_class_to_module", "_object_missing_backend"):
                getattr(self, held).update(getattr(whole, held))
            return getattr(self, name)

    names.define_import_structure = few
    spec.loader.exec_module(module)
    sys.modules[spec.name].__class__ = Few
    # It would read its 2,000 files a second time.
    put_off("transformers.models", {"__path__": [str(models)]})
    # It imports transformers a second time, in the place of the first.
    importlib.import_module("transformers.processing_utils")
    sys.modules[spec.name].__class__ = Few
    names.define_import_structure = read


def start() -> None:
    """Import the libraries without what a plan has no use for."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Nothing of what is imported is garbage.
    gc.disable()
    for absent in ("scipy", "sklearn"):
        # A module that is None is absent to Python, and so to transformers.
        sys.modules[absent] = None  # type: ignore[assignment]
    put_off("sympy", NO_SYMBOL)
    import torch
    import torch.distributed

    torch.distributed.is_available = lambda: False
    put_off("torch.distributed.tensor", NO_SHARD)
    torch.compile = unchanged  # type: ignore[assignment]
    put_off("torch.fx.experimental.symbolic_shapes", NUMBERS)
    put_off("torch.utils._sympy.functions", LARGEST)
    put_off("torch._dynamo", MARKS, "_trace_wrapped_higher_order_op")
    without_names()
    for needed in ("numpy.random", "transformers.modeling_utils", "transformers.models.auto"):
        importlib.import_module(needed)


def started() -> None:
    """All that a plan needs is imported."""
    gc.freeze()
    gc.enable()


def end() -> NoReturn:
    """End this process, which has done all that it was to do. Python would first take apart all
    that was imported, which is a fifth of a second to a first answer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
