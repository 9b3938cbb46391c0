"""What each tensor of the merged checkpoint is made of, decided before a byte is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from schemas.errors import StageError
from tasks.merge.adapter import Adapter, LowRank
from tasks.merge.checkpoint import FLOATS, FORMAT_NAMES, Checkpoint, Shard, TensorRecord
from tasks.merge.names import Layout, Skeleton

MERGE_OFF = "set `finish: {merge: false}` to ship the adapter as it is"


@dataclass(frozen=True)
class Copy:
    """The bytes of a stored tensor, as they are."""

    shard: Shard
    tensor: TensorRecord


@dataclass(frozen=True)
class Fold:
    """A stored weight W as W + left @ right, or W * scale, rounded once.

    left: [rows, R]. right: [R, columns]. scale: [rows, 1] or [1, columns].
    lengths: [rows], the length that each row of the sum is given (DoRA).
    """

    shard: Shard
    tensor: TensorRecord
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    lengths: torch.Tensor | None = None


@dataclass(frozen=True)
class New:
    """A trained tensor that replaces or joins the base's, in its own dtype."""

    value: torch.Tensor


Origin = Copy | Fold | New


@dataclass(frozen=True)
class OutTensor:
    record: TensorRecord
    origin: Origin


@dataclass(frozen=True)
class OutShard:
    """One file to write. name: of the file. tensors: in the order of their bytes."""

    name: str
    tensors: tuple[OutTensor, ...]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """The merged checkpoint. untied: weights that were one with another and no longer are."""

    shards: tuple[OutShard, ...]
    untied: list[str]

    def tensors(self) -> Iterator[OutTensor]:
        for shard in self.shards:
            yield from shard.tensors


def make_plan(checkpoint: Checkpoint, adapter: Adapter, skeleton: Skeleton) -> Plan:
    """Match an adapter with a checkpoint.

    A weight that the base shares between two modules and the adapter changes in one of them
    gets a tensor of its own in the last shard; the caller has to untie the config.

    Raises:
        StageError: an update without a weight to fold it into, a shape that does not fit, a
            model weight that neither the base nor the adapter has.
    """
    sources = skeleton.sources(checkpoint.locations)
    matcher = Matcher(checkpoint, adapter, skeleton, sources.unchanged)
    changes = matcher.changes()
    untied = {name for group in skeleton.tied if group & changes.keys() for name in group}
    copies = {name: matcher.copy(name) for name in untied - changes.keys()}
    origins = {**changes, **copies}
    present = origins.keys() | sources.unchanged.keys()
    missing = sorted(
        name for name in skeleton.shapes if not present & ({name} | skeleton.sharing(name))
    )
    if missing and not sources.converted:
        raise StageError(
            f"neither the base nor the adapter holds {', '.join(missing)}: "
            "the merged model would have random weights there"
        )
    shards = lay_out(checkpoint, {sources.unchanged.get(n, n): o for n, o in origins.items()})
    return Plan(tuple(shards), sorted(untied))


@dataclass(frozen=True)
class Matcher:
    """Finds what each changed weight is made of. stored: model tensor name: stored name."""

    checkpoint: Checkpoint
    adapter: Adapter
    skeleton: Skeleton
    stored: dict[str, str]

    def changes(self) -> dict[str, Origin]:
        """Model tensor name: what it becomes, for every weight that the adapter changes."""
        whole = {
            name: value
            for name, value in self.adapter.whole.items()
            if not self.is_base_own(name, value)
        }
        updated = {
            f"{module}.weight": module for module in {**self.adapter.updates, **self.adapter.scales}
        }
        unknown = sorted((whole.keys() | updated.keys()) - self.skeleton.shapes.keys())
        if unknown:
            raise StageError(f"the adapter changes {', '.join(unknown)}: the model has none such")
        both = sorted(whole.keys() & updated.keys())
        if both:
            raise StageError(
                f"{', '.join(both)}: both replaced and updated by the adapter (was the "
                f"vocabulary resized?), which is not folded; {MERGE_OFF}"
            )
        return {
            **{name: self.new(name, value) for name, value in whole.items()},
            **{name: self.fold(name, module) for name, module in updated.items()},
            **self.scaled_biases(),
        }

    def scaled_biases(self) -> dict[str, Origin]:
        """Where outputs are scaled, so is the bias that was added to them."""
        found: dict[str, Origin] = {}
        for module, scale in self.adapter.scales.items():
            name = f"{module}.bias"
            if scale.shape[1] == 1 and name in self.skeleton.shapes:
                bias = self.checkpoint.read(self.stored[name])
                found[name] = New((bias.float() * scale[:, 0]).to(bias.dtype))
        return found

    def new(self, name: str, value: torch.Tensor) -> New:
        wanted = self.skeleton.shapes[name]
        if tuple(value.shape) != wanted:
            raise StageError(
                f"{name} is {list(value.shape)} in the adapter and {list(wanted)} in the model"
            )
        # In the dtype of what it replaces; a new head keeps its own.
        own = self.checkpoint.locations[self.stored[name]][1] if name in self.stored else None
        dtype = value.dtype if own is None else FLOATS.get(own.dtype, value.dtype)
        return New(value.to(dtype).contiguous())

    def fold(self, name: str, module: str) -> Fold:
        origin = self.copy(name)
        shard, tensor = origin.shard, origin.tensor
        layout = self.skeleton.layouts.get(module)
        if layout is None or tensor.dtype not in FLOATS:
            kind = type(self.skeleton.model.get_submodule(module)).__name__
            raise StageError(f"cannot fold into {name} ({kind}, {tensor.dtype}); {MERGE_OFF}")
        if module in self.adapter.scales:
            scale = self.adapter.scales[module]
            scale = scale if layout == "out_in" else scale.T.contiguous()
            shape = tuple(
                a if b == 1 else b for a, b in zip(tensor.shape, scale.shape, strict=True)
            )
            made = Fold(shard, tensor, scale=scale)
        else:
            update = self.adapter.updates[module]
            if update.lengths_O is not None and layout != "out_in":
                raise StageError(
                    f"cannot fold DoRA into {name}, whose columns are its outputs; {MERGE_OFF}"
                )
            left, right = factors(update, layout)
            shape = (left.shape[0], right.shape[1])
            made = Fold(shard, tensor, left, right, lengths=update.lengths_O)
        if shape != tensor.shape:
            raise StageError(
                f"the adapter's update of {name} is {list(shape)}, the weight "
                f"{list(tensor.shape)}: this adapter was trained on another base"
            )
        return made

    def copy(self, name: str) -> Copy:
        """The stored tensor that loads as this weight, or as one that the base ties to it."""
        for candidate in [name, *sorted(self.skeleton.sharing(name))]:
            if candidate in self.stored:
                return Copy(*self.checkpoint.locations[self.stored[candidate]])
        raise StageError(
            f"the checkpoint holds no tensor that loads as {name} unchanged (transformers "
            f"builds it from others on loading), so nothing can be folded; {MERGE_OFF}"
        )

    def is_base_own(self, name: str, value: torch.Tensor) -> bool:
        """Whether a whole tensor is the base's: PEFT also saves embeddings that it only updates."""
        held = sorted(self.skeleton.sharing(name) & self.stored.keys())
        if not held:
            return False
        base = self.checkpoint.read(self.stored[held[0]])
        return base.shape == value.shape and torch.equal(base.float(), value.float())


def factors(update: LowRank, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """left @ right = scaling * B A in the layout of the stored weight, both float32."""
    b_OR = update.b_OR * update.scaling
    if layout == "out_in":
        return b_OR.contiguous(), update.a_RI.contiguous()
    return update.a_RI.T.contiguous(), b_OR.T.contiguous()


def lay_out(checkpoint: Checkpoint, origins: dict[str, Origin]) -> Iterator[OutShard]:
    """The files as they will be: the base's order, new tensors at the end of the last one.

    origins: by stored name; a tensor that is not named here is copied.
    """
    new = sorted(origins.keys() - checkpoint.locations.keys())
    for number, shard in enumerate(checkpoint.shards):
        items = [(item.name, origins.get(item.name, Copy(shard, item))) for item in shard.tensors]
        if number == len(checkpoint.shards) - 1:
            items += [(name, origins[name]) for name in new]
        position, tensors = 0, []
        for name, origin in items:
            record = placed(name, origin, position)
            tensors.append(OutTensor(record, origin))
            position = record.end
        yield OutShard(shard.path.name, tuple(tensors), shard.metadata)


def placed(name: str, origin: Origin, position: int) -> TensorRecord:
    if isinstance(origin, New):
        value = origin.value
        dtype, shape, size = FORMAT_NAMES[value.dtype], tuple(value.shape), value.nbytes
    else:
        dtype, shape, size = origin.tensor.dtype, origin.tensor.shape, origin.tensor.nbytes
    return TensorRecord(name, dtype, shape, position, position + size)


def index_of(plan: Plan, index: dict[str, object] | None) -> dict[str, object] | None:
    """The index json of a sharded checkpoint, with the new tensors and the new size."""
    if index is None:
        return None
    size = sum(tensor.record.nbytes for tensor in plan.tensors())
    metadata = {**dict(index.get("metadata") or {}), "total_size": size}  # type: ignore[call-overload]
    weight_map = {
        tensor.record.name: shard.name for shard in plan.shards for tensor in shard.tensors
    }
    return {"metadata": metadata, "weight_map": weight_map}
