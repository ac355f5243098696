"""Rules: what every decision obeys, and the widths that may stand under it.

Reads    Settings, ModelGroups, the present mask
Gives    Rules, allowed_widths, channel_multiple, smallest_step, most_removable
Source   -
Symbols  width = the number of groups of a kind that a layer keeps
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loraprune.errors import UserError
from loraprune.records import Budget, GroupKind, Mask, ModelGroups, Order, Widths
from loraprune.settings import Settings

ROUND_TO, ROUNDED_FROM = 8, 256  # channels; 8 of fewer than 256 would be too much of a layer for one step


@dataclass(frozen=True)
class Rules:
    """What every decision obeys."""

    threshold: float = 0.5
    epsilon: float = 1e-6
    minimum_forget: float = 0.1
    min_groups_per_layer: int = 1
    widths: Widths = "uniform"
    round_to: int | None = None
    frozen_layers: tuple[str, ...] = ()
    budget: Budget = "kind"
    attention_ratio: float = 1.0
    of_groups: bool = False  # whether a budget counts groups of every layer, not parameters of the model
    per_parameter: bool = False  # whether one ranking over both kinds weighs a group by its parameters
    order: Order = "difference"
    retain_cost: float = 3.0
    all_may_go: bool = False  # whether unlearning may take groups that are no candidates, to reach a size

    @staticmethod
    def of(settings: Settings) -> "Rules":
        """Return the rules that a run's settings ask for."""
        return Rules(
            threshold=settings.unlearning_threshold,
            epsilon=settings.unlearning_epsilon,
            minimum_forget=settings.minimum_forget_sensitivity,
            min_groups_per_layer=settings.min_groups_per_layer,
            widths=settings.widths,
            round_to=settings.round_to,
            frozen_layers=settings.frozen_layers,
            budget=settings.budget,
            attention_ratio=settings.attention_ratio,
            of_groups=settings.sparsity_of == "groups",
            per_parameter=settings.score_norm == "none",
            order=settings.order,
            retain_cost=settings.retain_cost,
            all_may_go=settings.order == "difference" and settings.sparsity is not None,
        )


FIRST_TENTH = "first-tenth"


def frozen_layers(rules: Rules, depth: int) -> frozenset[int]:
    """Return the layers that lose nothing; raise UserError for a name that is none of a model of this depth."""
    frozen: set[int] = set()
    for name in rules.frozen_layers:
        number = int(name) if name.removeprefix("-").isdecimal() else None
        if name == FIRST_TENTH:
            frozen |= set(range(depth // 10))
        elif number is not None and -depth <= number < depth:
            frozen.add(number % depth)
        else:
            raise UserError(
                f"frozen_layers names {name!r}; the model has layers 0 to {depth - 1}.",
                "a layer that is not there cannot be kept whole.",
                f"give numbers from {-depth} to {depth - 1}, or {FIRST_TENTH}.",
            )
    return frozenset(frozen)


def open_layers(rules: Rules, depth: int) -> list[int]:
    """Return the layers that may lose groups."""
    return sorted(set(range(depth)) - frozen_layers(rules, depth))


def open_kinds(groups: ModelGroups, rules: Rules) -> tuple[GroupKind, ...]:
    """Return the kinds that may lose groups."""
    return tuple(groups.layers) if rules.attention_ratio else ("ffn_channel",)


def allowed_widths(kind: GroupKind, groups: ModelGroups, rules: Rules) -> list[int]:
    """Return the numbers of groups that a layer may keep, the untouched one first, falling.

    Channels come in multiples of `channel_multiple`; under uniform widths, kv_groups in numbers that the family's
    config takes; q_heads so too, as many of each kv_group under any widths.
    """
    untouched = groups.count(kind)
    lower = range(untouched - 1, rules.min_groups_per_layer - 1, -1)
    return [untouched, *(width for width in lower if _may_stand(kind, width, groups, rules))]


def _may_stand(kind: GroupKind, width: int, groups: ModelGroups, rules: Rules) -> bool:
    if kind == "ffn_channel":
        return width % channel_multiple(groups, rules) == 0
    even = width % groups.layers[kind][0].divisions == 0
    return even and (rules.widths == "per_layer" or width in groups.allowed_attention)


def channel_multiple(groups: ModelGroups, rules: Rules) -> int:
    """Return what the channels of cut layers are a multiple of: `round_to`, or where that is unset 8 or 1.

    Matrices of other widths take longer to multiply: on a processor, a tenth of what reading a prompt takes in all. Not
    so where only candidates may go, or each layer has its own width: eight at once would take along what must stay.
    """
    if rules.round_to is not None:
        return rules.round_to
    to_a_size = rules.all_may_go and rules.widths == "uniform"
    return ROUND_TO if to_a_size and groups.count("ffn_channel") >= ROUNDED_FROM else 1


def smallest_step(groups: ModelGroups, rules: Rules, kept: Mask | None = None) -> int:
    """Return the parameters of the smallest thing that may go next, 0 where nothing may; `kept` None: untouched."""
    steps: list[int] = []
    for kind in open_kinds(groups, rules):
        left = [groups.count(kind)] * groups.depth if kept is None else kept.kept[kind].sum(1).tolist()
        steps += _next_steps(kind, left, groups, rules)
    return min(steps, default=0)


def _next_steps(kind: GroupKind, left: Sequence[int], groups: ModelGroups, rules: Rules) -> Iterator[int]:
    """Give the parameters down to the next lower width: of all layers together, or of each layer."""
    widths = allowed_widths(kind, groups, rules)
    layers = open_layers(rules, groups.depth)
    together = [layers] if rules.widths == "uniform" else [[layer] for layer in layers]
    for layers in together:
        width = next((one for one in widths if one < min(left[layer] for layer in layers)), None)
        if width is not None:
            yield sum((left[layer] - width) * groups.layers[kind][layer].parameters_per_group for layer in layers)


def removed_share(mask: Mask, groups: ModelGroups, rules: Rules) -> float:
    """Return how much is gone, in what the rules count: of all parameters, or of the channels of layers not frozen."""
    if not rules.of_groups:
        return mask.sparsity(groups)
    return 1.0 - float(mask.kept["ffn_channel"][open_layers(rules, groups.depth)].double().mean())


def smallest_share(groups: ModelGroups, rules: Rules, kept: Mask | None = None) -> float:
    """Return the smallest step in what the rules count."""
    if rules.of_groups:
        untouched, *lower = allowed_widths("ffn_channel", groups, rules)
        layers = open_layers(rules, groups.depth)
        left = untouched if kept is None else int(kept.kept["ffn_channel"][layers].sum(1).min())
        return (left - next((one for one in lower if one < left), left)) / untouched
    return smallest_step(groups, rules, kept) / groups.total_parameters


def most_removable(groups: ModelGroups, rules: Rules) -> int:
    """Return the parameters that go when every layer is cut down to its lowest allowed width."""
    spare: list[int] = []
    for kind in open_kinds(groups, rules):
        untouched, *lower = allowed_widths(kind, groups, rules)
        parameters = sum(groups.layers[kind][layer].parameters_per_group for layer in open_layers(rules, groups.depth))
        spare.append((untouched - min(lower, default=untouched)) * parameters)
    return sum(spare)
