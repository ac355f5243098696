"""Rescale: what keeps the size of a layer's output when groups of the layer go.

Reads    a model with adapters and the mask before, the mask after, batches of the retain set
Gives    rescaled: the mask after, with a factor for each kind and layer
Source   energy compensation after pruning, arXiv 2602.07375; differs: one measured factor for all outputs of a layer
Symbols  consumer = attention output or down projection; its inputs are multiplied by the factor
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from loraprune.mask import LiveMask
from loraprune.objectives import logits_of
from loraprune.processes import dealt, summed
from loraprune.records import GroupKind, Mask
from loraprune.sensitivity import base_of

Energies = dict[GroupKind, Tensor]  # (L,) each, float64: summed squares of the consumers' outputs


@torch.no_grad()
def rescaled(model: PeftModel, live: LiveMask, after: Mask, batches: Sequence[Mapping[str, Tensor]]) -> Mask:
    """Return `after` with factors under which the layers that lose groups give outputs of the size they had.

    A factor is the one that the live mask had, times root mean square before / after over the batches' tokens, the
    output's bias left aside; it is one of bfloat16, so that a mask and cut weights of any format hold the same. Where
    the survivors say nothing the factor stays. The live mask is left as it was.
    """
    before, training = live.value, model.training
    model.eval()
    sizes = _energies(model, live, batches)
    live.set(replace(after, factors=before.factors))
    left = _energies(model, live, batches)
    live.set(before)
    model.train(training)
    factors: dict[GroupKind, Tensor] = {}
    for kind, kept in after.kept.items():
        changed = (kept != before.kept[kind]).any(1).cpu() & (left[kind] > 0)
        old = torch.tensor([before.factor(kind, layer) for layer in range(len(kept))], dtype=torch.float64)
        grown = old * (sizes[kind] / left[kind]).sqrt()
        factors[kind] = torch.where(changed, grown, old).to(torch.bfloat16).float()
    return replace(after, factors=factors)


def _energies(model: PeftModel, live: LiveMask, batches: Sequence[Mapping[str, Tensor]]) -> Energies:
    """Return the summed squares of what the consumers give, their biases aside, over the tokens of all batches."""
    energies: Energies = {
        kind: torch.zeros(len(layers), dtype=torch.float64) for kind, layers in live.groups.layers.items()
    }
    base, handles = model.get_base_model(), []
    there: dict[str, Any] = {}

    def watch(kind: GroupKind, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            bias = base_of(module).bias
            linear = (output if bias is None else output - bias).float()
            energies[kind][layer] += (
                there["weight"] * linear.square().sum(-1)[there["mask"]].sum(dtype=torch.float64).cpu()
            )

        return hook

    for kind, layers in live.groups.layers.items():
        for one in layers:
            handles.append(base.get_submodule(one.consumer.module).register_forward_hook(watch(kind, one.layer)))
    try:
        for batch, weight in dealt(batches):
            there.update(mask=batch["attention_mask"].bool(), weight=weight)
            logits_of(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    summed(energies.values())
    return energies
