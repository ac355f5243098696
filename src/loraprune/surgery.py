"""Surgery: the decision cut into the weights, and the config made true again.

Reads    a merged model's weights, a mask, the groups
Gives    smaller weights and their config
Source   -
Symbols  -
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig

from loraprune.groups import stock_config, widths_left
from loraprune.records import GroupKind, Mask, ModelGroups, ProjectionGroups


def cut_weights(weights: Mapping[str, Tensor], groups: ModelGroups, mask: Mask) -> dict[str, Tensor]:
    """Return the weights without the removed groups, the factors of the others in the weights that read them.

    Weights that lose nothing are returned as they are.

    Raises ValueError where kv_groups keep different numbers of q_heads: heads would read another's keys and values.
    """
    cut = dict(weights)
    for kind, layers in groups.layers.items():
        for one in layers:
            kept = mask.kept[kind][one.layer]
            if len(set(kept.reshape(one.divisions, -1).sum(1).tolist())) > 1:
                raise ValueError(f"layer {one.layer} keeps unequal numbers of {kind}s in its kv_groups")
            if not kept.all():
                for module, parts in one.by_module.items():
                    _cut_module(cut, module, parts, kept)
                consumer, factor = f"{one.consumer.module}.weight", mask.factor(kind, one.layer)
                cut[consumer] = cut[consumer] * factor if factor != 1.0 else cut[consumer]
    return cut


def _cut_module(weights: dict[str, Tensor], module: str, parts: Sequence[ProjectionGroups], kept: Tensor) -> None:
    """Cut rows (with their biases) or columns of all parts of one module at once: one by one, places would shift."""
    weight, bias, axis = f"{module}.weight", f"{module}.bias", parts[0].axis
    stays = torch.ones(weights[weight].shape[axis], dtype=torch.bool)
    for one in parts:
        stays[one.span] = kept.repeat_interleave(one.size).cpu()
    indices = stays.nonzero()[:, 0]
    weights[weight] = weights[weight].index_select(axis, indices.to(weights[weight].device))
    if axis == 0 and bias in weights:
        weights[bias] = weights[bias].index_select(0, indices.to(weights[bias].device))


def uniform_widths(mask: Mask) -> dict[GroupKind, int]:
    """Return how many groups of each kind every layer keeps; raise ValueError where layers differ."""
    widths = {}
    for kind, kept in mask.kept.items():
        counts = sorted(set(kept.sum(1).tolist()))
        if len(counts) != 1:
            raise ValueError(
                f"layers keep {counts[0]} to {counts[-1]} groups of kind {kind}: no stock config says that"
            )
        widths[kind] = counts[0]
    return widths


def cut_config(config: PretrainedConfig, groups: ModelGroups, mask: Mask) -> PretrainedConfig:
    """Return the config of the cut model, of the family's stand-in where its own class refuses the head count.

    Raises ValueError where no stock class has the model's form.
    """
    widths, unit = uniform_widths(mask), groups.attention
    left = (unit, widths[unit], widths["ffn_channel"])
    small = stock_config(config, *left)
    if small is None:
        heads = widths_left(config, *left)["num_attention_heads"]
        raise ValueError(f"{groups.family} has no stock form with {heads} heads")
    return small
