"""Contradictions: settings that cannot both be had, refused before anything is loaded.

Reads    Settings
Gives    refuse_contradictions
Source   -
Symbols  -
"""

from loraprune.errors import UserError
from loraprune.records import OF_TRAINING
from loraprune.schedule import last_sparsity
from loraprune.setting import flag
from loraprune.settings import PLAIN_BITS, Settings

OF_CANDIDATES = ("unlearning_threshold", "minimum_forget_sensitivity")  # the higher, the fewer groups may go


def _by_preset(settings: Settings) -> str:
    return "" if settings.preset == "default" else f" by preset {settings.preset}"


def refuse_contradictions(settings: Settings) -> None:
    """Raise UserError for the first two settings that cannot both be had."""
    one = settings
    steps = one.warmup_steps + one.prune_every * one.prune_rounds
    floors = one.min_retain_performance > 0 or one.guard is not None
    stricter = [name for name in OF_CANDIDATES if getattr(one, name) > getattr(Settings, name)]
    for broken, what, why, fix in (
        (
            one.frozen_layers and one.widths == "uniform",
            "frozen_layers keeps some layers whole, and widths is uniform.",
            "under uniform widths every layer loses the same.",
            "set --widths per_layer.",
        ),
        (
            one.is_unlearning and (one.budget, one.attention_ratio, one.sparsity_of) != ("kind", 1.0, "parameters"),
            f"budget, attention_ratio or sparsity_of is set{_by_preset(one)}, and there is a forget set.",
            "unlearning takes groups by both sensitivities, wherever they are.",
            "leave these settings and --preset out.",
        ),
        (
            one.is_unlearning and one.score_norm != "mean",
            f"score_norm is {one.score_norm}{_by_preset(one)}, and there is a forget set.",
            "differences, shares and minimum_forget_sensitivity compare groups with the mean of their kind, so 1.",
            "leave --score-norm and --preset out.",
        ),
        (
            one.is_unlearning and one.order == "difference" and one.sparsity is not None and stricter,
            " and ".join(f"{name} is {getattr(one, name):g}" for name in stricter) + ", and a sparsity is set.",
            "under --order difference every group may go to reach a sparsity, whatever its share and sensitivity.",
            f"leave {' and '.join(map(flag, stricter))} out, or --sparsity, or set --order share.",
        ),
        (
            one.attention_unit == "q_head" and one.preset != "default",
            f"attention_unit is q_head, and preset is {one.preset}.",
            "the preset stands for LoRAPrune, which takes heads with their keys and values.",
            "leave --attention-unit or --preset out.",
        ),
        (
            one.budget == "global" and one.attention_ratio != 1.0,
            "budget is global, and attention_ratio gives each kind a share of its own.",
            "one ranking over all groups knows no shares.",
            "set --budget kind or layer, or leave --attention-ratio out.",
        ),
        (
            one.sparsity_of == "groups" and one.budget != "layer",
            f"sparsity_of is groups, and budget is {one.budget}.",
            "a share of every layer's groups is taken from every layer alike.",
            "set --budget layer.",
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
            one.score_from == "training" and one.metric not in OF_TRAINING,
            f"score_from is training, and metric {one.metric} reads no gradient.",
            "there is nothing of it in a training step.",
            "set --score-from passes.",
        ),
        (
            one.score_from == "training" and one.score_every > steps,
            f"score_every is {one.score_every}, and pruning ends after {steps} training steps.",
            "nothing would ever be scored.",
            "lower --score-every.",
        ),
        (
            one.metric == "grad" and one.base_bits != PLAIN_BITS,
            f"metric is grad, and base_bits is {one.base_bits}.",
            "rounded weights have no gradient.",
            "set --metric gate or lora, or leave --base-bits out.",
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
        (
            last_sparsity(one) <= one.initial_sparsity,
            f"the schedule {one.schedule} with {one.prune_rounds} pruning rounds never prunes.",
            "as in the released code, nothing goes once the goal itself is planned.",
            "raise --prune-rounds or --epochs, or set --schedule cubic.",
        ),
    ):
        if broken:
            raise UserError(what, why, fix)
