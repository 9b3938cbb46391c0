"""Tensors without numbers that say they are on a CPU.

What `torch._subclasses.FakeTensor` is, without the symbolic shapes, the cache and the compiler that
it imports: a plan asks for whole sizes alone, and its first answer was a second later for them.

Blocks of a model are alike, and so are most operations of a pass: what torch says of one on meta is
remembered by the operation and what it is given, sizes and all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

CPU, META = torch.device("cpu"), torch.device("meta")


class Room:
    """What stands for a storage: tensors that have the same one are views of each other."""

    __slots__ = ("__weakref__", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


class Hollow(torch.Tensor):
    """room: shared with those of which it is a view. form: size, strides, offset, dtype."""

    room: Room
    form: tuple[torch.Size, tuple[int, ...], int, torch.dtype]

    @staticmethod
    def __new__(cls, shapes: torch.Tensor, room: Room | None = None) -> Hollow:
        """shapes: a tensor of the same sizes, on meta. room: its own where none is given."""
        form = shapes.shape, shapes.stride(), shapes.storage_offset(), shapes.dtype
        made = hollow_of(form, room or Room(shapes.untyped_storage().nbytes()))
        made.requires_grad_(shapes.requires_grad)
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Hollow({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return answer(func, args, kwargs or {})


def hollow_of(form: Any, room: Room) -> Hollow:
    """form: as `Hollow.form` has it."""
    size, strides, offset, dtype = form
    # Its kernels are chosen as on a CPU: by autocast, by attention.
    made: Hollow = torch.Tensor._make_wrapper_subclass(
        Hollow, size, strides, offset, dtype=dtype, device=CPU
    )
    made.room, made.form = room, form
    return made


#: Of an operation's tensors, in their order, what it makes.
Make = Callable[[list[torch.Tensor]], Any]
#: By an operation and what it is given.
KNOWN: dict[Any, Make] = {}


def answer(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation makes of hollow tensors. Real ones beside them are taken for hollow."""
    given: list[torch.Tensor] = []
    key = func, _described(args, given), _described(tuple(kwargs.items()), given)
    make = KNOWN.get(key)
    if make is None:
        make = KNOWN[key] = _asked(func, args, kwargs)
    return make(given)


def _described(value: Any, given: list[torch.Tensor]) -> Any:
    """All that an answer depends on. Adds the tensors to those that are given. 1, 1.0 and True are
    the same to a dictionary and not to torch."""
    if isinstance(value, Hollow):
        given.append(value)
        return value.form
    if isinstance(value, (tuple, list)):
        return tuple([_described(part, given) for part in value])
    if isinstance(value, torch.Tensor):
        given.append(value)
        return value.shape, value.stride(), None, value.dtype
    return type(value), value


def _asked(func: Any, args: Any, kwargs: Any) -> Make:
    """The operation on meta: how each of its results is made again."""
    given: list[torch.Tensor] = []

    def on_meta(value: torch.Tensor | torch.device) -> Any:
        if isinstance(value, torch.device):
            return META
        given.append(_on_meta(value) if isinstance(value, Hollow) else value.to(META))
        return given[-1]

    there = torch.Tensor, torch.device
    out = func(*tree_map_only(there, on_meta, args), **tree_map_only(there, on_meta, kwargs))
    if func is torch.ops.aten.native_layer_norm.default:
        # On meta torch answers for a GPU. On a CPU moments have the dtype of what they are of.
        result, *moments = out
        out = result, *(part.to(result.dtype) for part in moments)
    return _again(out, given)


def _on_meta(value: Hollow) -> torch.Tensor:
    size, strides, offset, dtype = value.form
    whole = torch.empty(value.room.nbytes // dtype.itemsize, dtype=dtype, device=META)
    return whole.as_strided(size, strides, offset)


def _again(out: Any, given: list[torch.Tensor]) -> Make:
    """What makes such a result anew. given: what it was made of, on meta."""
    if isinstance(out, (tuple, list)):
        parts, kind = [_again(part, given) for part in out], type(out)
        return lambda given: kind([part(given) for part in parts])
    if not isinstance(out, torch.Tensor):
        return lambda given: out
    form = out.shape, out.stride(), out.storage_offset(), out.dtype
    storage = out.untyped_storage()
    whose = [x.untyped_storage()._cdata == storage._cdata for x in given]
    nbytes = storage.nbytes()
    if True not in whose:
        return lambda given: hollow_of(form, Room(nbytes))
    place, itself = whose.index(True), any(x is out for x in given)

    def shared(given: list[torch.Tensor]) -> Hollow:
        owner = given[place]
        if not isinstance(owner, Hollow):
            return hollow_of(form, Room(nbytes))
        # What is changed in place stays who it was.
        return owner if itself else hollow_of(form, owner.room)

    return shared
