"""Processes: what several processes of one run do together; alone, each of these does the obvious.

Reads    torch.distributed
Gives    working_as_one; first_does, all_do, refuse_different; dealt, collected, rows_each; summed, sum_gradients;
         shard, unsharded, whole_gradient
Source   FSDP2: torch's fully_shard, here of the frozen weights alone
Symbols  dealt = item j is for process j mod count; all get equally many, the last ones again with weight 0
"""

import atexit
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from loraprune.errors import UserError
from loraprune.launch import here, hidden_launch, refuse_other_launches
from loraprune.settings import Settings

Item = TypeVar("Item")
PATIENCE = timedelta(hours=6)  # while the first one cuts and writes; sums wait as long as torch waits by default


@contextmanager
def working_as_one(settings: Settings) -> Iterator[None]:
    """Let the processes that were launched together work as one inside this block; alone, nothing happens.

    Raises UserError for a launch that a run cannot have.
    """
    refuse_other_launches(settings)
    if here().count > 1 and not distributed.is_initialized():
        _begin(settings)
    with hidden_launch():
        yield


def _begin(settings: Settings) -> None:
    """Join the others for as long as the process lives: another run in it would begin while this one still ends."""
    on_gpu = settings.device != "cpu" and torch.cuda.is_available()
    if on_gpu and here().local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {here().local_rank} of this machine has no GPU: torch sees {torch.cuda.device_count()}.",
            "each process works on a GPU of its own.",
            "lower --num_processes of accelerate launch.",
        )
    if on_gpu:
        torch.cuda.set_device(here().local_rank)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    atexit.register(distributed.destroy_process_group)


@cache
def _waiting() -> Any:
    """Return the group in which processes wait for what the first one does, and may wait long."""
    return distributed.new_group(backend="gloo", timeout=PATIENCE)


# --- one for all ------------------------------------------------------------------------------------------------------


def first_does(make: Callable[[], Item]) -> Item:
    """Have the first process alone do something while the others wait; all get what it gave, or its UserError."""
    if here().count == 1:
        return make()
    found: list[Any] = [None, None]
    if here().first:
        try:
            found = [make(), None]
        except UserError as error:
            found = [None, error]
    distributed.broadcast_object_list(found, src=0, group=_waiting())
    return _unless_failed(*found)


def all_do(make: Callable[[], Item]) -> Item:
    """Have every process do something for itself; where one meets a UserError, all raise the first of them."""
    if here().count == 1:
        return make()
    result, failed = None, None
    try:
        result = make()
    except UserError as error:
        failed = error
    return _unless_failed(cast(Item, result), next((one for one in _gathered(failed) if one is not None), None))


def refuse_different(value: Any, what: str) -> None:
    """Raise UserError in all processes where one of them has another value: they would not work on the same run."""
    first, *others = _gathered(value) if here().count > 1 else [value]
    if any(one != first for one in others):
        raise UserError(
            f"{what}: not all processes of the launch have the same.",
            "their gradients would be of different runs, and what they share would not fit together.",
            "give all machines the same files, or one folder that they share.",
        )


def _unless_failed(result: Item, failed: UserError | None) -> Item:
    if failed is not None:
        raise failed
    return result


def _gathered(value: Any) -> list[Any]:
    found: list[Any] = [None] * here().count
    distributed.all_gather_object(found, value, group=_waiting())
    return found


# --- shares -----------------------------------------------------------------------------------------------------------


def dealt(items: Sequence[Item]) -> list[tuple[Item, float]]:
    """Return this process's items, each with its weight: 1, or 0 where it only fills up.

    As many for every process: passes over sharded weights are made by all of them or by none.
    """
    count, rank = here().count, here().rank
    rounds = -(-len(items) // count)
    places = [turn * count + rank for turn in range(rounds)]
    return [(items[place], 1.0) if place < len(items) else (items[-1], 0.0) for place in places]


def collected(own: Sequence[Item], total: int) -> list[Item]:
    """Return what all processes made of their dealt items, in the order of the `total` items."""
    if here().count == 1:
        return list(own)
    return [one for turn in zip(*_gathered(list(own)), strict=True) for one in turn][:total]


def rows_each(rows: int, most: int | None) -> int:
    """Return how many rows a pass over a batch has, when every process takes its share, at most `most` at once."""
    share = -(-rows // here().count)
    return share if most is None else min(share, most)


def summed(tensors: Iterable[Tensor]) -> None:
    """Add each tensor up over the processes, in place."""
    if here().count > 1:
        for one in tensors:
            distributed.all_reduce(one)


def sum_gradients(model: nn.Module) -> None:
    """Add the adapters' gradients up over the processes, in one message; a process without one counts as zeros."""
    if here().count == 1:
        return
    trained = [one for one in model.parameters() if one.requires_grad]
    flat = torch.cat([(torch.zeros_like(one) if one.grad is None else one.grad).flatten() for one in trained])
    distributed.all_reduce(flat)
    for one, total in zip(trained, flat.split([one.numel() for one in trained]), strict=True):
        one.grad = total.view_as(one)


# --- sharded weights --------------------------------------------------------------------------------------------------


def shard(model: Any, device: torch.device) -> Any:
    """Split a model's frozen weights over the processes, layer by layer and in place; adapters stay whole in each.

    Outside of a forward or backward pass a process then holds its part alone, on its device.
    """
    mesh = init_device_mesh(device.type, (here().count,))
    trained = {one for one in model.parameters() if one.requires_grad}
    layers = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, ignored_params=trained, reshard_after_forward=True)
    for one in trained:
        one.data = one.data.to(device)
    return model


def unsharded(tensor: Tensor) -> Tensor:
    """Return a weight as every process would hold it alone; a sharded one is put together by all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_gradient(weight: Tensor) -> Tensor | None:
    """Return the sum over the processes of the gradient that lies on a frozen weight; None where there is none."""
    gradient = weight.grad
    if gradient is None or here().count == 1:
        return gradient
    if isinstance(gradient, DTensor):
        return gradient.full_tensor() * here().count  # FSDP leaves the mean
    total = gradient.float()  # before it is summed: bfloat16 would round every process's part
    total = total.clone() if total is gradient else total
    distributed.all_reduce(total)
    return total
