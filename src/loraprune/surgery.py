"""Surgery: the decision cut into the weights, and the config made true again.

Reads    a merged model's weights, a mask, the groups
Gives    smaller weights and their config
Source   -
Symbols  -
"""

from collections.abc import Mapping

from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig

from loraprune.groups import family_of, stand_in_holds
from loraprune.records import KINDS, GroupKind, Mask, ModelGroups, ProjectionGroups


def cut_weights(weights: Mapping[str, Tensor], groups: ModelGroups, mask: Mask) -> dict[str, Tensor]:
    """Return the weights without the removed groups; weights that lose nothing are returned as they are."""
    cut = dict(weights)
    for kind in KINDS:
        for one in groups.layers[kind]:
            kept = mask.kept[kind][one.layer]
            if not kept.all():
                for projection in one.projections:
                    _cut_projection(cut, projection, kept)
    return cut


def _cut_projection(weights: dict[str, Tensor], projection: ProjectionGroups, kept: Tensor) -> None:
    """Cut rows (with their biases) or columns of one projection."""
    indices = kept.repeat_interleave(projection.size).nonzero()[:, 0]
    weight, bias = f"{projection.module}.weight", f"{projection.module}.bias"
    weights[weight] = weights[weight].index_select(projection.axis, indices.to(weights[weight].device))
    if projection.axis == 0 and bias in weights:
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
    """Return the config of the cut model; of the family's stand-in where its own class refuses the head count.

    Llama demands that the head count divides the hidden size; MistralForCausalLM without a sliding window computes the
    same and does not.
    """
    widths, family = uniform_widths(mask), family_of(config)
    queries = config.num_attention_heads // config.num_key_value_heads
    heads = widths["kv_group"] * queries
    values = config.to_dict() | {
        "num_key_value_heads": widths["kv_group"],
        "num_attention_heads": heads,
        "intermediate_size": widths["ffn_channel"],
        "head_dim": groups.layers["kv_group"][0].producers[1].size,
    }
    kind = config.model_type
    if family.heads_divide_hidden and config.hidden_size % heads:
        if not stand_in_holds(config) or family.stand_in is None:
            raise ValueError(f"{family.architecture} has no stock form with {heads} heads")
        kind = family.stand_in
        values |= {"model_type": kind, "architectures": ["MistralForCausalLM"], "sliding_window": None}
    return CONFIG_MAPPING[kind].from_dict(values)
