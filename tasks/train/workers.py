"""The micro-batches of a step on threads of one core each.

A small layer is many small kernels, and splitting each over all cores costs a barrier apiece.
One core works through its own micro-batch with no barrier at all; products of a few hundred
rows run at full speed on one core. PyTorch releases Python's lock inside its kernels.

Gradients are kept by worker and added in the workers' order, and which micro-batch goes to
which worker is decided before they start, so that the sum never depends on who was first.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
#: The summed loss of one micro-batch, divided by what the step says, as a scalar with a graph.
LossOf = Callable[[T], torch.Tensor]
Share = tuple[torch.Tensor, list[torch.Tensor | None]]


class Workers:
    """`count` threads that make gradients of `weights`, each on `threads` cores, while entered.

    One worker is the calling thread itself.
    """

    def __init__(self, count: int, weights: list[torch.nn.Parameter], threads: int = 1) -> None:
        self.count = count
        self.weights = weights
        self.threads = threads

    def __enter__(self) -> Workers:
        self._threads_before = torch.get_num_threads()
        # The calling thread's too: its idle OpenMP threads would spin on the workers' cores.
        torch.set_num_threads(self.threads)
        self._pool = ThreadPoolExecutor(
            self.count, initializer=torch.set_num_threads, initargs=(self.threads,)
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        torch.set_num_threads(self._threads_before)

    def backward(self, shares: list[list[T]], loss_of: LossOf[T]) -> torch.Tensor:
        """Set each weight's `grad` to that of the summed losses, and return their sum.

        shares: the micro-batches of each worker.
        """
        if self.count == 1:
            results = [self._share(shares[0], loss_of)]
        else:
            results = list(self._pool.map(lambda share: self._share(share, loss_of), shares))
        total, grads = results[0]
        for loss, more in results[1:]:
            total = total + loss
            grads = _add(grads, more)
        for weight, grad in zip(self.weights, grads, strict=True):
            weight.grad = grad
        return total

    def _share(self, share: list[T], loss_of: LossOf[T]) -> Share:
        total = torch.zeros(())
        grads: list[torch.Tensor | None] = [None] * len(self.weights)
        for item in share:
            loss = loss_of(item)
            total = total + loss.detach().cpu()
            grads = _add(grads, list(torch.autograd.grad(loss, self.weights, allow_unused=True)))
        return total, grads


def _add(
    grads: list[torch.Tensor | None], more: list[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """Sum in place; None is a weight that the loss did not depend on."""
    both = [(a, b) for a, b in zip(grads, more, strict=True) if a is not None and b is not None]
    if both:
        torch._foreach_add_([a for a, _ in both], [b for _, b in both])
    return [b if a is None else a for a, b in zip(grads, more, strict=True)]
