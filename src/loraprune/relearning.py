"""Relearning ahead: a step of the adapters towards what is to be forgotten; the forget loss is taken from there.

Reads    gradients of how likely the answers are, on the adapters
Gives    gradients_of, moved
Source   sharpness-aware minimisation, arXiv 2010.01412; against relearning, arXiv 2502.05374; differs: see `moved`, and
         balance.py, where the gradients are of other rows than those that are pushed
Symbols  radius = how far each weight of the adapters moves
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loraprune.processes import sum_gradients


def gradients_of(model: nn.Module, losses: Iterable[Callable[[], Tensor]]) -> list[Tensor | None]:
    """Return the gradient of the sum of some losses on every trained weight, of all processes; each is run by itself.

    What lies on the weights already stays there.
    """
    trained = _trained(model)
    kept = [one.grad for one in trained]
    model.zero_grad(set_to_none=True)
    for loss in losses:
        loss().backward()
    sum_gradients(model)
    found = [one.grad for one in trained]
    for one, gradient in zip(trained, kept, strict=True):
        one.grad = gradient
    return found


@contextmanager
def moved(model: nn.Module, gradients: Sequence[Tensor | None], radius: float) -> Iterator[None]:
    """Run the model inside this block with every trained weight moved by `radius` the way its gradient points.

    differs: the source moves along the gradient by a given length in all; a step of Adam, with which people fine-tune,
    moves every weight alike, and a radius of so many learning rates then fits models of any size. Afterwards the
    weights are back bit for bit.
    """
    trained = _trained(model)
    kept = [one.detach().clone() for one in trained]
    with torch.no_grad():
        for one, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                one.add_(gradient.sign(), alpha=radius)
    try:
        yield
    finally:
        with torch.no_grad():
            for one, before in zip(trained, kept, strict=True):
                one.copy_(before)


def _trained(model: nn.Module) -> list[Tensor]:
    return [one for one in model.parameters() if one.requires_grad]
