"""Launch: which place this process has among those that were launched together.

Reads    the environment that accelerate launch, or torchrun, gives its processes
Gives    Launch, here, refuse_other_launches, refuse_several
Source   -
Symbols  rank = this process's number, from 0; sharded = every process holds its part of the frozen weights alone
"""

import logging
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
    numbers = (int(os.environ.get(name, default)) for name, default in zip(OF_LAUNCHERS[:3], "010", strict=True))
    return Launch(*numbers, sharded=_is_on("ACCELERATE_USE_FSDP"))


@contextmanager
def hidden_launch() -> Iterator[None]:
    """Have libraries inside this block take the process for a single one.

    Else transformers would leave the weights of all but the first process empty, and Trainer would lay its own
    parallelism over the run's.
    """
    kept = {name: os.environ.pop(name) for name in OF_LAUNCHERS if name in os.environ}
    logger = logging.getLogger("transformers.training_args")  # it warns of what is hidden
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        os.environ.update(kept)
        logger.setLevel(level)


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
