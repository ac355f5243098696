"""Groups: what can be cut out of an architecture, as data; what is not understood is refused by name.

Reads    a model's config, and the shapes of its weights (from the checkpoint's headers, before anything is loaded)
Gives    ModelGroups
Source   Grouped-query attention, arXiv 2305.13245: a key/value head goes with all query heads that share it
Symbols  a projection with axis 0 loses rows, with axis 1 columns
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from loraprune.errors import UserError
from loraprune.modeling_per_layer import CLASS, MODEL_TYPE
from loraprune.records import GroupKind, LayerGroups, ModelGroups, ProjectionGroups


@dataclass(frozen=True)
class Family:
    """Names of an architecture's modules; adding a family is adding one of these."""

    architecture: str
    layer: str = "model.layers.{}"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    heads_divide_hidden: bool = False  # the stock config refuses head counts that do not divide the hidden size
    stand_in: str | None = None  # a family whose stock class gives the same logits and takes any head count


FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", heads_divide_hidden=True, stand_in="mistral"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
}


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a config; raise UserError for an architecture that is not in the table."""
    family = FAMILIES.get(config.model_type.removeprefix(MODEL_TYPE))
    named = tuple(config.architectures or ())
    if family is not None and (not named or {family.architecture, CLASS + family.architecture} & set(named)):
        return family
    known = ", ".join(one.architecture for one in FAMILIES.values())
    raise UserError(
        f"the architecture {', '.join(named) or config.model_type} is not known to loraprune.",
        "cutting a model whose structure is guessed gives a broken one.",
        f"use a model of one of these: {known}.",
    )


def is_per_layer(config: PretrainedConfig) -> bool:
    """Say whether a config gives each layer its own widths, as `per_layer_config`."""
    return config.model_type.startswith(MODEL_TYPE)


def refuse_per_layer(config: PretrainedConfig) -> None:
    """Raise UserError for a model whose layers were cut to different widths: its groups form no table."""
    if is_per_layer(config):
        raise UserError(
            f"{(config.architectures or ['the model'])[0]}: its layers keep different numbers of groups.",
            "pruning lays one table of groups over all layers, as many in each; evaluate and attack take such a model.",
            "start from the model that it was cut from, or cut that one under --widths uniform first.",
        )


def head_dim_of(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def allowed_kv_groups(config: PretrainedConfig) -> frozenset[int]:
    """Return the numbers of kept kv_groups for which a stock class loads the result."""
    family, counts = family_of(config), range(1, config.num_key_value_heads + 1)
    if not family.heads_divide_hidden or stand_in_holds(config):
        return frozenset(counts)
    queries = config.num_attention_heads // config.num_key_value_heads
    return frozenset(n for n in counts if config.hidden_size % (n * queries) == 0)


def stand_in_holds(config: PretrainedConfig) -> bool:
    """Say whether the family's stand-in gives the same logits: it has no bias in attention or feed-forward."""
    family = family_of(config)
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    return family.stand_in is not None and not biased


def expected_shapes(config: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """Return the (out, in) shape of every projection that the config promises."""
    family, hidden, head_dim = family_of(config), config.hidden_size, head_dim_of(config)
    query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    inner = config.intermediate_size
    one = {
        family.query: (query, hidden),
        family.key: (key, hidden),
        family.value: (key, hidden),
        family.attention_output: (hidden, query),
        family.gate: (inner, hidden),
        family.up: (inner, hidden),
        family.down: (hidden, inner),
    }
    layers = [family.layer.format(index) for index in range(config.num_hidden_layers)]
    return {f"{layer}.{name}": shape for layer in layers for name, shape in one.items()}


def check_shapes(config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError where a weight's shape contradicts the config, or heads do not fall into kv_groups."""
    if config.num_attention_heads % config.num_key_value_heads:
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        _refuse_shape(config, f"{heads} query heads do not share {shared} key/value heads evenly")
    for module, expected in expected_shapes(config).items():
        found = shapes.get(f"{module}.weight")
        if found is None:
            _refuse_shape(config, f"{module}.weight is missing")
        elif tuple(found) != expected:
            _refuse_shape(
                config,
                f"{module}.weight is {' x '.join(map(str, found))}, the config says {expected[0]} x {expected[1]}",
            )


def _refuse_shape(config: PretrainedConfig, what: str) -> None:
    raise UserError(
        f"{family_of(config).architecture}: {what}.",
        "groups are found by the config; where the weights contradict it, the wrong ones would be cut.",
        "check that config.json belongs to these weights.",
    )


def meta_groups(config: PretrainedConfig) -> ModelGroups:
    """Return the prunable groups of an architecture from its config alone; no weights are made."""
    with torch.device("meta"):
        return find_groups(AutoModelForCausalLM.from_config(config), config)


def find_groups(model: nn.Module, config: PretrainedConfig) -> ModelGroups:
    """Return the prunable groups of a loaded model; raise UserError where its weights contradict its config."""
    refuse_per_layer(config)
    family = family_of(config)
    check_shapes(config, {name: tuple(weight.shape) for name, weight in model.named_parameters()})
    parameters = dict(model.named_parameters())
    kinds: dict[GroupKind, list[LayerGroups]] = {"kv_group": [], "ffn_channel": []}
    for index in range(config.num_hidden_layers):
        layer = family.layer.format(index)
        kinds["kv_group"].append(_attention_groups(family, config, layer, index, parameters))
        kinds["ffn_channel"].append(_feed_forward_groups(family, config, layer, index, parameters))
    total = sum(weight.numel() for weight in parameters.values())
    return ModelGroups(
        family.architecture, {kind: tuple(one) for kind, one in kinds.items()}, total, allowed_kv_groups(config)
    )


def _attention_groups(
    family: Family, config: PretrainedConfig, layer: str, index: int, parameters: Mapping[str, nn.Parameter]
) -> LayerGroups:
    head_dim, count = head_dim_of(config), config.num_key_value_heads
    queries = head_dim * (config.num_attention_heads // count)
    rows = {family.query: queries, family.key: head_dim, family.value: head_dim}
    producers = [ProjectionGroups(f"{layer}.{name}", "kv_group", 0, count, size) for name, size in rows.items()]
    consumer = ProjectionGroups(f"{layer}.{family.attention_output}", "kv_group", 1, count, queries)
    return _layer_groups(index, "kv_group", producers, consumer, parameters)


def _feed_forward_groups(
    family: Family, config: PretrainedConfig, layer: str, index: int, parameters: Mapping[str, nn.Parameter]
) -> LayerGroups:
    count = config.intermediate_size
    producers = [ProjectionGroups(f"{layer}.{name}", "ffn_channel", 0, count, 1) for name in (family.gate, family.up)]
    consumer = ProjectionGroups(f"{layer}.{family.down}", "ffn_channel", 1, count, 1)
    return _layer_groups(index, "ffn_channel", producers, consumer, parameters)


def _layer_groups(
    index: int,
    kind: GroupKind,
    producers: list[ProjectionGroups],
    consumer: ProjectionGroups,
    parameters: Mapping[str, nn.Parameter],
) -> LayerGroups:
    """Count a group's parameters from the weights themselves, biases of cut rows included."""
    cut = sum(one.size * parameters[f"{one.module}.weight"].shape[1] for one in producers)
    cut += sum(one.size for one in producers if f"{one.module}.bias" in parameters)
    cut += consumer.size * parameters[f"{consumer.module}.weight"].shape[0]
    return LayerGroups(index, kind, consumer.count, tuple(producers), consumer, cut)
