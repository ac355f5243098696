"""Launch: which place this process has among those that were launched together.

Reads    the environment that accelerate launch, or torchrun, gives its processes
Gives    Launch, here, hidden_launch, refuse_other_launches, refuse_several
Source   -
Symbols  rank = this process's number, from 0; sharded = every process holds its part of the frozen weights alone
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from loraprune.errors import UserError
from loraprune.settings import PLAIN_BITS, Settings

OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_FSDP")
OTHER_PARALLELISM = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


@dataclass(frozen=True)
class Launch:
    """This process among those of one launch; alone where nothing launched it."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # on this machine
    sharded: bool = False

    @property
    def first(self) -> bool:
        return self.rank == 0


@cache
def here() -> Launch:
    """Return this process's place; read once, since the environment is hidden from libraries later."""
    rank, count, local_rank = (int(os.environ.get(name, one)) for name, one in zip(OF_LAUNCHERS, "010", strict=False))
    return Launch(rank, count, local_rank, sharded=count > 1 and _is_on("ACCELERATE_USE_FSDP"))


@contextmanager
def hidden_launch() -> Iterator[None]:
    """Have libraries inside this block take the process for a single one.

    Else transformers would leave the weights of all but the first process empty, and Trainer would lay its own
    parallelism over the run's.
    """
    here()  # while it can be seen
    kept = {name: os.environ.pop(name) for name in OF_LAUNCHERS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def refuse_other_launches(settings: Settings) -> None:
    """Raise UserError for a launch that a run cannot have: other parallelism than DDP's and FSDP2's, half precision."""
    for variable, name in OTHER_PARALLELISM.items():
        if _is_on(variable):
            raise UserError(
                f"the run was launched with {name}.",
                "scores and cuts read whole weights and gradients, which it takes out of the program's hands.",
                "use accelerate launch with --multi_gpu, or with --use_fsdp --fsdp_version 2 where a model does not "
                "fit one GPU.",
            )
    if _is_on("ACCELERATE_USE_FSDP"):
        _refuse_other_shards(settings)
    if (precision := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        raise UserError(
            f"the run was launched with mixed precision {precision}.",
            "the number format of a run is one of its settings, so that it is written with the run.",
            "use accelerate launch --mixed_precision no, and set --dtype.",
        )
    if (compiler := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")).lower() != "no":
        raise UserError(
            f"the run was launched with dynamo_backend {compiler}.",
            "masks and gates are hooks on a model that runs as it is.",
            "use accelerate launch --dynamo_backend no.",
        )
    if _is_on("ACCELERATE_USE_CPU") and settings.device != "cpu":
        raise UserError(
            f"the run was launched for the CPU, and device is {settings.device}.",
            "where a run works is one of its settings, so that it is written with the run.",
            "set --device cpu, or leave --cpu out of accelerate launch.",
        )


def _refuse_other_shards(settings: Settings) -> None:
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "the run was launched with version 1 of FSDP.",
            "it flattens the weights, and then no group is a row or a column any more.",
            "use accelerate launch --use_fsdp --fsdp_version 2.",
        )
    if _is_on("FSDP_OFFLOAD_PARAMS"):
        raise UserError(
            "the run was launched with FSDP's weights offloaded to the main memory.",
            "the run keeps the parts of the frozen weights on the devices.",
            "use accelerate launch with --fsdp_offload_params false.",
        )
    if _is_on("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError(
            "the run was launched with FSDP's activation checkpointing.",
            "whether activations are computed twice is one of the run's settings.",
            "use accelerate launch without it, and set --gradient-checkpointing.",
        )
    if settings.base_bits != PLAIN_BITS:
        raise UserError(
            f"base_bits is {settings.base_bits}, and the run was launched with FSDP.",
            "packed weights cannot be split by rows over processes.",
            "set --base-bits 16, or use accelerate launch --multi_gpu, where every process holds the quantised base.",
        )


def refuse_several(command: str) -> None:
    """Raise UserError where a command that works in one process was launched in several."""
    if here().count > 1:
        raise UserError(
            f"loraprune {command} was launched in {here().count} processes.",
            "it would do the same work in each of them and write the same files at once.",
            f"call loraprune {command} without a launcher; unlearn and prune are what several processes share.",
        )
