"""Quantised: a base whose projections are held in eight or four bits; it is read and trained on, never written.

Reads    a checkpoint in its own format, a loaded module
Gives    load_quantised, quietly, refuse_without_bitsandbytes; weight_rows, weight_bytes of any model
Source   LLM.int8, arXiv 2208.07339; NF4: the four-bit normal float of QLoRA, arXiv 2305.14314
Symbols  block = the weights, one after the other in a row-major matrix, that share one scale in NF4
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from math import gcd
from typing import Any, Literal

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from loraprune.errors import UserError
from loraprune.forms import read_model
from loraprune.processes import unsharded
from loraprune.settings import Settings

Format = Literal["int8", "nf4"]
FORMATS: dict[int, Format] = {8: "int8", 4: "nf4"}
QUANTISED = {"int8": "Linear8bitLt", "nf4": "Linear4bit"}  # the module that holds a weight of the format
LARGEST_INT8 = 127


def refuse_without_bitsandbytes(settings: Settings) -> None:
    """Raise UserError when the run asks for a quantised base and nothing here can hold one."""
    if settings.base_bits in FORMATS and find_spec("bitsandbytes") is None:
        raise UserError(
            f"base_bits is {settings.base_bits}, and bitsandbytes is not installed.",
            "it is what holds weights in eight or four bits and computes with them.",
            "pip install 'loraprune[quantize]', or set --base-bits 16.",
        )


@contextmanager
def quietly() -> Iterator[None]:
    """Leave out what bitsandbytes says of every module, and the minute in which it would have its CPU code compiled."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        logger.setLevel(level)


def load_quantised(name: str, settings: Settings, number_format: Format, device: torch.device) -> Any:
    """Return a causal language model in eval mode whose projections are rounded while they are read."""
    ways = {"int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
    config = BitsAndBytesConfig(**ways[number_format])
    model = read_model(name, settings, quantization_config=config, device_map={"": device})
    for module in model.modules():
        if type(module).__name__ == QUANTISED["nf4"]:
            # Its packed format for some processors takes widths in multiples of 32 and 64 only, which a cut has not.
            module.support_avx512bf16_for_cpu = False
    return model


@dataclass(frozen=True)
class WeightRows:
    """A projection's weight by its rows: `of` gives those of a slice that begins at a multiple of `step`, (rows, i)."""

    of: Callable[[slice], Tensor]
    step: int = 1


def weight_rows(module: nn.Module) -> WeightRows:
    """Return a projection's weight by rows, so that of a quantised one no plain copy of its size is made.

    Quantised formats other than ours are dequantised whole.
    """
    weight: Any = module.weight
    if type(weight).__name__ == "Int8Params":
        return _int8_rows(module)
    if type(weight).__name__ == "Params4bit" and not weight.quant_state.nested:
        return _nf4_rows(weight)
    plain = unsharded(dequantize_module_weight(module).detach())  # a plain weight comes back as it is
    return WeightRows(lambda rows: plain[rows])


def _int8_rows(module: Any) -> WeightRows:
    # Dequantised here, since PEFT's own way makes a module on the CPU lose its scales.
    values, scales = module.weight.data, module.state.SCB if module.state.SCB is not None else module.weight.SCB
    return WeightRows(lambda rows: values[rows] * (scales[rows, None] / LARGEST_INT8))


def _nf4_rows(weight: Any) -> WeightRows:
    """Return rows of a packed weight; a slice of them begins where a block begins."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    whole = weight.quant_state
    height, width = whole.shape
    packed, block = weight.data.view(-1), whole.blocksize

    def of(rows: slice) -> Tensor:
        begin, end = rows.start * width, min(rows.stop, height) * width
        scales = whole.absmax[begin // block : -(-end // block)]
        shape = torch.Size(((end - begin) // width, width))
        state = QuantState(scales, shape, whole.code, block, whole.quant_type, whole.dtype)
        return dequantize_4bit(packed[begin // 2 : -(-end // 2), None], state)

    return WeightRows(of, block // gcd(block, width))


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights, the scales of quantised ones included."""
    scales = (_scales(module) for module in model.modules())
    return sum(one.nbytes for one in model.parameters()) + sum(one.nbytes for one in scales if one is not None)


def _scales(module: Any) -> Tensor | None:
    kind = type(getattr(module, "weight", None)).__name__
    if kind == "Params4bit":
        return module.weight.quant_state.absmax
    if kind == "Int8Params":
        return module.state.SCB if module.state.SCB is not None else module.weight.SCB
    return None
