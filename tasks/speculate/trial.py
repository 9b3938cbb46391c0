"""Whether drafts of a model can be verified at all: tried once, on a few tokens.

Models differ in how they read a mask, positions and a cache, and more of them come with each
version of transformers. So what decides is not a list of names but two small texts: a tree of
drafts behind a row of another length than its neighbour, against each path of it read alone.
"""

from __future__ import annotations

import torch

from .decode import Writer
from .parts import NotSpeculableError
from .tree import Tree

#: Difference over size that is rounding: of products in float32, and in half the bits.
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-6}
HALF_ROUNDING = 5e-2


@torch.inference_mode()
def require_exact(writer: Writer) -> None:
    """Raise a NotSpeculableError where a pass over a tree is not each of its paths alone."""
    parts = writer.parts
    device, known = parts.device, parts.config.vocab_size
    # Two rows, of 4 and 2 tokens. Behind each a root, its two children, and a child of the last.
    rows = [[token % known for token in row] for row in ([5, 6, 7, 8], [9, 3])]
    tokens = [[token % known for token in row] for row in ([4, 5, 6, 7], [3, 8, 9, 2])]
    tree = Tree(
        torch.tensor(tokens, device=device),
        torch.tensor([[0, 0, 0, 2]] * 2, device=device),
        torch.tensor([[0, 1, 1, 2]] * 2, device=device),
        torch.ones((2, 4), device=device),
        levels=2,
    )
    name = type(parts.model).__name__
    try:
        x_2ND = writer.read_tree(rows, tree)
        alone_2ND = torch.stack(
            [
                torch.stack([_last(writer, [*row, *(new[at] for at in path)]) for path in PATHS])
                for row, new in zip(rows, tokens, strict=True)
            ]
        )
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise NotSpeculableError(
            f"{name} does not take a mask and positions for each token: {error}"
        ) from error
    apart = float((x_2ND - alone_2ND).float().norm() / alone_2ND.float().norm())
    if not apart <= ROUNDING.get(alone_2ND.dtype, HALF_ROUNDING):
        raise NotSpeculableError(
            f"{name} reads a tree of drafts otherwise than each path alone (by {apart:.2g} of "
            "their size): its attention or its positions do not follow the mask they are given"
        )


#: From the root to each node of the tree above.
PATHS = ((0,), (0, 1), (0, 2), (0, 2, 3))


def _last(writer: Writer, tokens: list[int]) -> torch.Tensor:
    ids_1T = torch.tensor([tokens], device=writer.parts.device)
    return writer.parts.read(ids_1T)[0, -1]
