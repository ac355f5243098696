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

TRIES = 4  # lengths of a step, each half of the one before


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
def moved(
    model: nn.Module, gradients: Sequence[Tensor | None], radius: float, teaches: Callable[[], bool]
) -> Iterator[None]:
    """Run the model inside this block with every trained weight moved by `radius` the way its gradient points.

    Or by half of it, a quarter and so on, TRIES lengths in all, the first of which `teaches`: it runs the model and
    says whether what the gradients are of has become likelier. Too long a step leads where nobody relearns; where none
    of these teaches, nothing is moved.
    differs: the source moves along the gradient by a given length in all; a step of Adam, with which people fine-tune,
    moves every weight alike, and a radius of so many learning rates then fits models of any size. Afterwards the
    weights are back bit for bit.
    """
    trained = _trained(model)
    kept = [one.detach().clone() for one in trained]
    try:
        for length in [*(radius / 2**number for number in range(TRIES)), 0.0]:
            _place(trained, kept, gradients, length)
            if length == 0.0 or teaches():
                break
        yield
    finally:
        _place(trained, kept, gradients, 0.0)


@torch.no_grad()
def _place(
    trained: Sequence[Tensor], kept: Sequence[Tensor], gradients: Sequence[Tensor | None], length: float
) -> None:
    for one, before, gradient in zip(trained, kept, gradients, strict=True):
        one.copy_(before)
        if gradient is not None and length:
            one.add_(gradient.sign(), alpha=length)


def _trained(model: nn.Module) -> list[Tensor]:
    return [one for one in model.parameters() if one.requires_grad]
