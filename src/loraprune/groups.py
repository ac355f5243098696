"""Groups: what can be cut out of an architecture, as data; what is not understood is refused by name.

Reads    a model's config, and the shapes of its weights (from the checkpoint's headers, before anything is loaded)
Gives    ModelGroups; the config of the model when groups are gone
Source   Grouped-query attention, arXiv 2305.13245: a key/value head goes with all query heads that share it, or every
         key/value head stays with as many query heads as the others
Symbols  a projection with axis 0 loses rows, with axis 1 columns
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from loraprune.errors import UserError
from loraprune.modeling_per_layer import CLASS, MODEL_TYPE, WIDTHS
from loraprune.records import AttentionUnit, GroupKind, LayerGroups, ModelGroups, ProjectionGroups


@dataclass(frozen=True)
class Family:
    """Names of an architecture's modules; adding a family is adding one of these (docs/new-family.md).

    A fused module is named once for each of its parts, which lie on each other in the order of the fields.
    """

    architecture: str
    layer: str = "model.layers.{}"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    attention_output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    query_norm: str | None = None  # a norm over all heads together; one over each head alone loses nothing
    key_norm: str | None = None
    stand_in: str | None = None  # a family whose stock class gives the same logits where its own refuses a head count

    @property
    def attention(self) -> tuple[str, ...]:
        """Return the modules of attention that are cut, each once."""
        return _each_once(self.query, self.key, self.value, self.attention_output)

    @property
    def feed_forward(self) -> tuple[str, ...]:
        return _each_once(self.gate, self.up, self.down)


def _each_once(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


FUSED_ATTENTION, FUSED_FEED_FORWARD = "self_attn.qkv_proj", "mlp.gate_up_proj"
FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", stand_in="mistral"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
    "gemma": Family("GemmaForCausalLM"),
    "gemma2": Family("Gemma2ForCausalLM"),
    "phi3": Family(
        "Phi3ForCausalLM",
        query=FUSED_ATTENTION,
        key=FUSED_ATTENTION,
        value=FUSED_ATTENTION,
        gate=FUSED_FEED_FORWARD,
        up=FUSED_FEED_FORWARD,
    ),
    "olmo2": Family("Olmo2ForCausalLM", query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
}


def known_architectures() -> str:
    """Return the architectures of the table in words."""
    return ", ".join(one.architecture for one in FAMILIES.values())


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a config; raise UserError for an architecture that is not in the table."""
    family = FAMILIES.get(config.model_type.removeprefix(MODEL_TYPE))
    named = tuple(config.architectures or ())
    if family is not None and (not named or {family.architecture, CLASS + family.architecture} & set(named)):
        return family
    raise UserError(
        f"the architecture {', '.join(named) or config.model_type} is not known to loraprune.",
        "cutting a model whose structure is guessed gives a broken one.",
        f"use a model of one of these: {known_architectures()}.",
    )


def projections_of(config: PretrainedConfig) -> tuple[str, ...]:
    """Return the last names of the family's projections: those that carry an adapter unless the settings name some."""
    family = family_of(config)
    return tuple(name.rpartition(".")[2] for name in (*family.attention, *family.feed_forward))


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


def queries_per_group(config: PretrainedConfig) -> int:
    """Return how many query heads share one key/value head."""
    return config.num_attention_heads // config.num_key_value_heads


# --- what a stock class takes -----------------------------------------------------------------------------------------


def allowed_attention(config: PretrainedConfig, unit: AttentionUnit) -> frozenset[int]:
    """Return the numbers of kept attention groups for which a stock class loads the result: the configs say so."""
    shared, heads = config.num_key_value_heads, config.num_attention_heads
    counts = range(1, shared + 1) if unit == "kv_group" else range(shared, heads + 1, shared)
    return frozenset(n for n in counts if stock_config(config, unit, n, config.intermediate_size) is not None)


def widths_left(config: PretrainedConfig, unit: AttentionUnit, attention: int, channels: int) -> dict[str, int]:
    """Return the widths of a layer that keeps so many groups of attention and channels, as a config names them."""
    shared = attention if unit == "kv_group" else config.num_key_value_heads
    heads = attention * queries_per_group(config) if unit == "kv_group" else attention
    return dict(zip(WIDTHS, (heads, shared, channels), strict=True))


def stock_config(
    config: PretrainedConfig, unit: AttentionUnit, attention: int, channels: int
) -> PretrainedConfig | None:
    """Return the config of the model with so many groups in every layer; None where stock transformers refuses it.

    Of the family's stand-in where its own class refuses: Llama demands that the head count divides the hidden size,
    MistralForCausalLM without a sliding window computes the same and does not.
    """
    values = config.to_dict() | widths_left(config, unit, attention, channels) | {"head_dim": head_dim_of(config)}
    values.pop("auto_map", None)  # the stock class is meant, and modelling files of the model's own are not copied
    own, stand_in = _accepted(config.model_type, values), family_of(config).stand_in
    if own is not None or stand_in is None or not stand_in_holds(config):
        return own
    architectures = [FAMILIES[stand_in].architecture]
    return _accepted(
        stand_in, values | {"model_type": stand_in, "architectures": architectures, "sliding_window": None}
    )


def _accepted(model_type: str, values: Mapping[str, Any]) -> PretrainedConfig | None:
    """Return the config with these values; None where its own check of the whole refuses them."""
    try:
        return CONFIG_MAPPING[model_type].from_dict(dict(values))
    except StrictDataclassClassValidationError:
        return None


def stand_in_holds(config: PretrainedConfig) -> bool:
    """Say whether the family's stand-in gives the same logits: it has no bias in attention or feed-forward."""
    family = family_of(config)
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    return family.stand_in is not None and not biased


# --- what the weights must look like ----------------------------------------------------------------------------------


def expected_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight that is cut, as the config promises it: (out, in), of a norm (width,)."""
    family, hidden, head_dim = family_of(config), config.hidden_size, head_dim_of(config)
    query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    inner = config.intermediate_size
    rows: Counter[str] = Counter()
    for name, size in (
        (family.query, query),
        (family.key, key),
        (family.value, key),
        (family.gate, inner),
        (family.up, inner),
    ):
        rows[name] += size  # the parts of a fused module lie on each other
    one: dict[str, tuple[int, ...]] = {name: (size, hidden) for name, size in rows.items()}
    one |= {family.attention_output: (hidden, query), family.down: (hidden, inner)}
    one |= {name: (size,) for name, size in ((family.query_norm, query), (family.key_norm, key)) if name}
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
                f"{module}.weight is {' x '.join(map(str, found))}, the config says {' x '.join(map(str, expected))}",
            )


def _refuse_shape(config: PretrainedConfig, what: str) -> None:
    raise UserError(
        f"{family_of(config).architecture}: {what}.",
        "groups are found by the config; where the weights contradict it, the wrong ones would be cut.",
        "check that config.json belongs to these weights.",
    )


def meta_groups(config: PretrainedConfig, unit: AttentionUnit = "kv_group") -> ModelGroups:
    """Return the prunable groups of an architecture from its config alone; no weights are made."""
    with torch.device("meta"):
        return find_groups(AutoModelForCausalLM.from_config(config), config, unit)


def find_groups(model: nn.Module, config: PretrainedConfig, unit: AttentionUnit = "kv_group") -> ModelGroups:
    """Return the prunable groups of a loaded model, those of attention being whole kv_groups or q_heads inside them.

    Raises UserError where the weights contradict the config, or where a kv_group has no q_head to spare.
    """
    refuse_per_layer(config)
    if unit == "q_head":
        _refuse_single_heads(config)
    family = family_of(config)
    check_shapes(config, {name: tuple(weight.shape) for name, weight in model.named_parameters()})
    parameters = dict(model.named_parameters())
    kinds: dict[GroupKind, list[LayerGroups]] = {unit: [], "ffn_channel": []}
    attention_groups = _kv_groups if unit == "kv_group" else _query_heads
    for index in range(config.num_hidden_layers):
        layer = family.layer.format(index)
        kinds[unit].append(attention_groups(family, config, layer, index, parameters))
        kinds["ffn_channel"].append(_feed_forward_groups(family, config, layer, index, parameters))
    total = sum(weight.numel() for weight in parameters.values())
    return ModelGroups(
        family.architecture, {kind: tuple(one) for kind, one in kinds.items()}, total, allowed_attention(config, unit)
    )


def _refuse_single_heads(config: PretrainedConfig) -> None:
    if queries_per_group(config) == 1:
        raise UserError(
            f"attention_unit is q_head, and each of the {config.num_key_value_heads} kv_groups has one query head.",
            "a kv_group keeps at least one of its q_heads; here there is nothing finer than the kv_group.",
            "leave --attention-unit out.",
        )


def _kv_groups(
    family: Family, config: PretrainedConfig, layer: str, index: int, parameters: Mapping[str, nn.Parameter]
) -> LayerGroups:
    head_dim, count = head_dim_of(config), config.num_key_value_heads
    queries = head_dim * queries_per_group(config)
    rows = ((family.query, queries), (family.key, head_dim), (family.value, head_dim))
    spanned = ((family.query_norm, queries), (family.key_norm, head_dim))
    producers = _producers(layer, "kv_group", count, rows)
    consumer = ProjectionGroups(f"{layer}.{family.attention_output}", "kv_group", 1, count, queries)
    norms = tuple(ProjectionGroups(f"{layer}.{name}", "kv_group", 0, count, size) for name, size in spanned if name)
    return _layer_groups(index, producers, consumer, norms, parameters)


def _query_heads(
    family: Family, config: PretrainedConfig, layer: str, index: int, parameters: Mapping[str, nn.Parameter]
) -> LayerGroups:
    head_dim, count = head_dim_of(config), config.num_attention_heads
    producers = _producers(layer, "q_head", count, ((family.query, head_dim),))
    consumer = ProjectionGroups(f"{layer}.{family.attention_output}", "q_head", 1, count, head_dim)
    norm = family.query_norm
    norms = (ProjectionGroups(f"{layer}.{norm}", "q_head", 0, count, head_dim),) if norm else ()
    return _layer_groups(index, producers, consumer, norms, parameters, config.num_key_value_heads)


def _feed_forward_groups(
    family: Family, config: PretrainedConfig, layer: str, index: int, parameters: Mapping[str, nn.Parameter]
) -> LayerGroups:
    count = config.intermediate_size
    producers = _producers(layer, "ffn_channel", count, ((family.gate, 1), (family.up, 1)))
    consumer = ProjectionGroups(f"{layer}.{family.down}", "ffn_channel", 1, count, 1)
    return _layer_groups(index, producers, consumer, (), parameters)


def _producers(
    layer: str, kind: GroupKind, count: int, parts: Sequence[tuple[str, int]]
) -> tuple[ProjectionGroups, ...]:
    """Return where each part's rows lie: parts of one module lie on each other, in this order."""
    taken: Counter[str] = Counter()
    producers = []
    for name, size in parts:
        producers.append(ProjectionGroups(f"{layer}.{name}", kind, 0, count, size, taken[name]))
        taken[name] += count * size
    return tuple(producers)


def _layer_groups(
    index: int,
    producers: tuple[ProjectionGroups, ...],
    consumer: ProjectionGroups,
    norms: tuple[ProjectionGroups, ...],
    parameters: Mapping[str, nn.Parameter],
    divisions: int = 1,
) -> LayerGroups:
    """Count a group's parameters from the weights themselves, biases of cut rows included."""
    cut = consumer.size * parameters[f"{consumer.module}.weight"].shape[0]
    for one in (*producers, *norms):
        cut += one.size * parameters[f"{one.module}.weight"][0].numel()
        cut += one.size if f"{one.module}.bias" in parameters else 0
    return LayerGroups(index, consumer.kind, consumer.count, producers, consumer, cut, norms, divisions)
