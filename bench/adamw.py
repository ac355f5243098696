"""AdamW steps on a loss of one's own, for models that neither the product nor its small models' training makes.

Reads    weights, a loss by step, a learning rate for every step
Gives    take_steps
Source   -
Symbols  -
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def take_steps(
    weights: Iterable[Tensor], loss: Callable[[int], Tensor], rates: Sequence[float], max_gradient_norm: float
) -> None:
    """Take one step for each learning rate; no weight decay, gradients cut at `max_gradient_norm`."""
    trained = list(weights)
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_(trained, max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
