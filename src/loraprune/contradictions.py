"""Contradictions: settings that cannot both be had, refused before anything is loaded.

Reads    Settings
Gives    refuse_contradictions
Source   -
Symbols  -
"""

from loraprune.errors import UserError
from loraprune.settings import Settings


def refuse_contradictions(settings: Settings) -> None:
    """Raise UserError for the first two settings that cannot both be had."""
    one = settings
    floors = one.min_retain_performance > 0 or one.guard is not None
    for broken, what, why, fix in (
        (
            one.frozen_layers and one.widths == "uniform",
            "frozen_layers keeps some layers whole, and widths is uniform.",
            "under uniform widths every layer loses the same.",
            "set --widths per_layer.",
        ),
        (
            one.budget == "global" and (one.attention_ratio != 1.0 or one.sparsity_of == "groups"),
            "budget is global, and attention_ratio or sparsity_of gives each kind a share of its own.",
            "one ranking over all groups knows no shares.",
            "set --budget kind or layer, or leave the other two out.",
        ),
        (
            one.attention_ratio == 0.0 and one.sparsity_of == "groups",
            "attention_ratio is 0, and sparsity_of is groups.",
            "the sparsity would be a share of groups of which a kind is left whole.",
            "set --sparsity-of parameters.",
        ),
        (
            one.sparsity_of == "groups" and floors,
            "sparsity_of is groups, and a floor is set.",
            "a step that breaks the floor is halved in parameters; shares of groups are not.",
            "set --sparsity-of parameters, or --min-retain-performance 0 and no --guard.",
        ),
        (
            one.score_from == "training" and one.is_unlearning,
            "score_from is training, and there is a forget set.",
            "a training step's gradient is of both losses, and forget and retain must be scored apart.",
            "set --score-from passes.",
        ),
        (
            one.score_from == "training" and one.metric == "activation",
            "score_from is training, and metric activation reads no gradient.",
            "there is nothing of it in a training step.",
            "set --score-from passes.",
        ),
        (
            one.metric == "magnitude" and one.is_unlearning,
            "metric is magnitude, and there is a forget set.",
            "weights alone do not tell what serves which set: every dual score would be 1.",
            "set --metric gate or lora.",
        ),
        (
            one.initial_sparsity > 0 and one.initial_sparsity >= (one.sparsity or one.max_sparsity),
            f"initial_sparsity is {one.initial_sparsity:g}, and the goal is {one.sparsity or one.max_sparsity:g}.",
            "the schedule rises from the one to the other.",
            "lower --initial-sparsity.",
        ),
    ):
        if broken:
            raise UserError(what, why, fix)
