"""Attack on the weights: does rounding them, or cutting small ones to zero, bring back what was hidden in them?

Reads    a checkpoint
Gives    quantise, prune_again
Source   quantisation brings back forgotten knowledge, arXiv 2410.16454; magnitude pruning, 1506.02626
Symbols  -
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from loraprune.attacked import AttackedModel, AttackResult, NotRun, Values, readings_of
from loraprune.model import device_of
from loraprune.progress import Advance
from loraprune.quantised import QUANTISED, Format, load_quantised, quietly


def quantise(attacked: AttackedModel, advance: Advance, number_format: Format) -> AttackResult:
    """Ask the model once more with the weights of its projections rounded to eight or four bits."""
    if find_spec("bitsandbytes") is None:
        raise NotRun("bitsandbytes is not installed: pip install 'loraprune[quantize]' brings it")
    rows = attacked.rows.forget
    plain = attacked.load()
    before, plain_bytes = attacked.answers(plain, rows), plain.get_memory_footprint()
    del plain
    with quietly():
        try:
            model = load_quantised(attacked.name, attacked.settings, number_format, device_of(attacked.settings))
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:  # formats differ by machine
            raise NotRun(f"bitsandbytes cannot load {number_format} here: {str(error).splitlines()[0]}") from error
        after = attacked.answers(model, rows)
    details: Values = {
        "quantised_modules": sum(type(one).__name__ == QUANTISED[number_format] for one in model.modules()),
        "bytes": {"plain": plain_bytes, "quantised": model.get_memory_footprint()},
    }
    advance(1)
    return AttackResult(readings_of(rows, before, after), details)


def prune_again(attacked: AttackedModel, advance: Advance) -> AttackResult:
    """Ask the model once more with the smallest single weights of every projection set to zero."""
    rows, share = attacked.rows.forget, attacked.settings.attack_sparsity
    model = attacked.load()
    before = attacked.answers(model, rows)
    zeros = zero_smallest(model, share)
    after = attacked.answers(model, rows)
    advance(1)
    return AttackResult(readings_of(rows, before, after), {"zero_weights": zeros})


@torch.no_grad()
def zero_smallest(model: Any, share: float) -> int:
    """Set the `share` smallest weights of every matrix of the layers to zero, in place; return how many these are.

    Embeddings and the output projection stay whole, as they do when groups are cut.
    """
    zeros = 0
    for module in model.get_decoder().layers.modules():
        if isinstance(module, nn.Linear):
            sizes = module.weight.abs().flatten()
            count = int(share * sizes.numel())
            module.weight.view(-1)[sizes.argsort(stable=True)[:count]] = 0
            zeros += count
    return zeros
