"""Last layers: the top blocks and the final norm learn whole, all below them is frozen.

Lee, Tang & Lin 2019, arXiv:1911.03090. Every weight of those blocks is trained; for
classification the head learns too. The backward pass ends at the lowest of them. What learns is a
copy of each layer inside a block, held by PEFT's layer-norm tuner, which asks nothing of a layer
but that it can be copied; blocks as a whole stay in place, since models read attributes of theirs.
"""

from __future__ import annotations

from peft import LNTuningConfig
from torch import nn

from schemas.candidates import LastLayers
from schemas.errors import UserError
from tasks.core.models import head_modules
from tasks.methods.method import Method, count_parameters, head_parameters, task_settings

PLACE = "candidates[method=last_layers]"


def config(model: nn.Module, candidate: LastLayers, task: str) -> LNTuningConfig:
    """What PEFT is told.

    Raises:
        UserError: more blocks than the base has, or blocks that cannot be taken apart.
    """
    targets = sorted(top_layers(model, candidate))
    return LNTuningConfig(**task_settings(model, task), target_modules=targets)


def trainable_parameters(model: nn.Module, candidate: LastLayers, task: str) -> int:
    """All weights of the top blocks, of the final norm, and of the head."""
    own = sum(count_parameters(layer) for layer in top_layers(model, candidate).values())
    return own + head_parameters(model, task)


def top_layers(model: nn.Module, candidate: LastLayers) -> dict[str, nn.Module]:
    """The layers to train by full name: those inside the top blocks, and the final norm.

    Raises:
        UserError: more blocks than the base has; no blocks; weights that belong to no layer alone.
    """
    name, blocks = stack(model)
    if candidate.layers > len(blocks):
        raise UserError.at(
            f"{PLACE}.layers",
            f"{candidate.layers}, but this base has {len(blocks)} blocks ({name})",
            f"choose at most {len(blocks)}, or method: full",
        )
    chosen = final_norms(model, name)
    for number in range(len(blocks) - candidate.layers, len(blocks)):
        for path, module in blocks[number].named_modules(prefix=f"{name}.{number}"):
            if module._parameters and next(module.children(), None) is None:
                chosen[path] = module
            elif module._parameters:
                raise UserError.at(
                    PLACE,
                    f"{path} holds weights beside the layers in it "
                    f"({', '.join(module._parameters)}), which cannot be trained apart",
                    "use method: lora or method: full",
                )
    return chosen


def stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The blocks of the backbone: of the outermost lists of modules the heaviest, and of two that
    weigh the same the last, which is a decoder's where there is an encoder too."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside:
            lists[name] = module
    if not lists:
        raise UserError.at(PLACE, "this base has no list of blocks", "use method: lora or full")
    return max(reversed(lists.items()), key=lambda item: count_parameters(item[1]))


def final_norms(model: nn.Module, blocks: str) -> dict[str, nn.Module]:
    """The norm that reads the last block, where there is one: it is made after the blocks, in a
    module that they are in too. One beside embeddings is theirs, wherever it stands."""
    heads = tuple(f"{head}." for head in head_modules(model))
    names = [name for name, _ in model.named_modules()]
    after = set(names[names.index(blocks) :])
    return {
        name: module
        for name, module in model.named_modules()
        if name in after
        and not name.startswith((f"{blocks}.", *heads))
        and f".{blocks}".startswith(f".{name}".rpartition(".")[0])
        and type(module).__name__.lower().endswith("norm")
        and "embed" not in name
        and next(module.parameters(), None) is not None
    }


METHOD = Method(
    name="last_layers",
    paper="arXiv:1911.03090",
    family="selective",
    merges=True,
    trained_base=False,
    format="peft-adapter",
    config=config,
    trainable_parameters=trainable_parameters,
    replaces=True,
)
