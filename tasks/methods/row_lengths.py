"""What DoRA needs of the rows of a weight and of outputs, with no float32 copy of either.

A weight is taken a block of rows at a time: a block of float32 stays in a processor's cache, and
costs no memory and little time where the base is in bfloat16.

Shapes: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

#: Numbers of a block. On a GPU a kernel costs its start, so there are few.
BLOCK = {"cpu": 1 << 18, "cuda": 1 << 24}


def row_lengths(
    weight_OI: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, scaling: float
) -> torch.Tensor:
    """||W_j + scaling B_j A|| of each row j, [O] in float32.

    Of the sum itself. Its square is a sum that needs A W^T alone (||W_j||^2 + 2 s B_j A W_j^T +
    ...), but loses digits where W and B A nearly cancel, and takes about as long in bfloat16.
    """
    lengths_O = torch.empty(len(weight_OI), dtype=torch.float32, device=weight_OI.device)
    a_RI, b_OR = a_RI.float(), b_OR.float()
    for rows in _blocks(weight_OI):
        summed = torch.addmm(weight_OI[rows].float(), b_OR[rows], a_RI, alpha=scaling)
        torch.linalg.vector_norm(summed, dim=1, out=lengths_O[rows])
    return lengths_O


def scaled_rows(weight_OI: torch.Tensor, scale_O: torch.Tensor) -> torch.Tensor:
    """Each row times its float32 scale, rounded once to the weight's dtype."""
    scaled_OI = torch.empty_like(weight_OI)
    for rows in _blocks(weight_OI):
        scaled_OI[rows] = weight_OI[rows].float() * scale_O[rows, None]
    return scaled_OI


def sum_of_products(
    dy_TO: torch.Tensor, y_TO: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """The sum over tokens of dy (y - bias), [O] in float32.

    That is the gradient of the weight of a batch norm whose mean is the bias and whose variance
    is 1: one kernel that reads both once, where a product and its sum take two to four times as
    long.
    """
    ones_O = torch.ones(y_TO.shape[1], device=y_TO.device)
    mean_O = torch.zeros_like(ones_O) if bias_O is None else bias_O.float()
    wanted = [False, True, False]
    _, total_O, _ = torch.ops.aten.native_batch_norm_backward(
        dy_TO, y_TO, ones_O, mean_O, ones_O, None, None, False, 0.0, wanted
    )
    return torch.as_tensor(total_O)


def _blocks(weight_OI: torch.Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK[weight_OI.device.type] // weight_OI.shape[1])
    return (slice(start, start + rows) for start in range(0, len(weight_OI), rows))
