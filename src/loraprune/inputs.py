"""Inputs: everything a run needs, loaded, checked and tokenised before it begins.

Reads    Settings; the headers of the checkpoint, its tokenizer, the data files
Gives    Inputs
Source   -
Symbols  -
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, floor

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from loraprune.adapter import check_adapter
from loraprune.contradictions import refuse_contradictions
from loraprune.data import (
    Example,
    Overlap,
    Row,
    encode,
    find_facts,
    find_overlap,
    load_rows,
    refuse_overlap,
    sample_rows,
    split_retain,
    with_prompt_labels,
)
from loraprune.errors import UserError
from loraprune.groups import meta_groups, refuse_per_layer
from loraprune.length import refuse_idle, resolved
from loraprune.model import adapted_projections, check_machine, checked_config, load_tokenizer
from loraprune.records import ModelGroups
from loraprune.rules import (
    Rules,
    allowed_widths,
    channel_multiple,
    frozen_layers,
    most_removable,
    open_kinds,
    smallest_share,
    smallest_step,
)
from loraprune.setting import flag
from loraprune.settings import Settings
from loraprune.words import counted

OPTIONAL_SETS = ("holdout", "bystander", "guard")


@dataclass(frozen=True)
class Inputs:
    """What a run works on; sets by name: forget, taught, floor, final, OPTIONAL_SETS and those of earlier requests."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    rows: Mapping[str, Sequence[Row]]
    examples: Mapping[str, Sequence[Example]]
    overlap: Overlap | None
    for_reference: Mapping[str, Sequence[Example]]  # forget and earlier requests under the reference's tokenizer
    settings: Settings  # the run's, the number of its steps filled in

    @property
    def trained(self) -> Sequence[Example]:
        """Return the taught rows as training reads them, with labels on the prompt where that is asked for."""
        taught = self.examples["taught"]
        return [with_prompt_labels(one) for one in taught] if self.settings.train_on_prompt else taught

    @cached_property
    def facts(self) -> dict[str, list[int]]:
        """Return every set's facts: rows with the same number say the same thing, or belong to one fact_id."""
        return {name: find_facts(rows) for name, rows in self.rows.items()}


def earlier_sets(settings: Settings) -> dict[str, str]:
    """Return name and source of the forget sets of earlier requests."""
    return {f"already_forgotten_{number}": one for number, one in enumerate(settings.already_forgotten, start=1)}


def require(settings: Settings) -> None:
    """Raise UserError when the settings do not name what the run needs, or name what another one makes void."""
    refuse_idle(settings)
    needed = (
        ("model", "output", "forget", "retain") if settings.is_unlearning else ("model", "output", "data", "sparsity")
    )
    if settings.retain is not None and not settings.is_unlearning:
        needed = ("model", "output", "forget", "retain")
    for name in needed:
        if not getattr(settings, name):
            raise UserError(
                f"{flag(name)} is missing.",
                "a run needs " + ", ".join(flag(one) for one in needed) + ".",
                f"give {flag(name)}.",
            )


def prepare(settings: Settings) -> Inputs:
    """Return the checked and tokenised inputs of a run; raise UserError for the first thing that is wrong."""
    check_machine(settings)
    refuse_contradictions(settings)
    config = checked_config(settings.model, settings)
    refuse_per_layer(config)
    groups = meta_groups(config, settings.attention_unit)
    _refuse_unseen_kind(settings, groups, adapted_projections(settings, config))
    _refuse_unreachable(settings, groups)
    if settings.adapter is not None:
        check_adapter(settings, config)
    tokenizer = load_tokenizer(settings.model, settings)
    rows, overlap = _load_sets(settings)
    ready = resolved(settings, len(rows["taught"]))
    refuse_contradictions(ready)  # again, now that epochs have become steps
    examples = {name: encode_set(one, tokenizer, name, settings) for name, one in rows.items()}
    for_reference = _encode_for_reference(settings, rows)
    if settings.original is not None:
        checked_config(settings.original, settings)
    return Inputs(config, tokenizer, rows, examples, overlap, for_reference, ready)


def _encode_for_reference(settings: Settings, rows: Mapping[str, Sequence[Row]]) -> dict[str, list[Example]]:
    """Return what is to be forgotten under the reference's own tokenizer, once that model is known to be there."""
    if settings.reference is None or "forget" not in rows:
        return {}
    checked_config(settings.reference, settings)
    tokenizer = load_tokenizer(settings.reference, settings)
    names = ("forget", *earlier_sets(settings))
    return {name: encode_set(rows[name], tokenizer, name, settings) for name in names}


def encode_set(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, name: str, settings: Settings) -> list[Example]:
    """Return a set's examples under the run's template and length."""
    return encode(rows, tokenizer, name=name, template=settings.template, max_length=settings.max_length)


def load_set(settings: Settings, name: str, source: str) -> list[Row]:
    """Return a set's rows from its file."""
    return load_rows(source, name=name, columns=settings.columns or None)


def _load_sets(settings: Settings) -> tuple[dict[str, Sequence[Row]], Overlap | None]:
    rows: dict[str, Sequence[Row]] = {}
    overlap = None
    kept_name = "retain" if settings.is_unlearning else "data"
    kept = load_set(settings, kept_name, getattr(settings, kept_name))
    if settings.forget is not None:
        rows["forget"] = load_set(settings, "forget", settings.forget)
        overlap = find_overlap(rows["forget"], kept)
        refuse_overlap(overlap, allow_overlap=settings.allow_overlap)
    rows |= split_kept(settings, kept)
    for name, source in (("floor", settings.floor_rows), ("final", settings.final_rows)):
        if source and "forget" in rows:
            _refuse_shared(rows[name], rows["forget"], f"{name}-rows", "forget set")
    for name, source in earlier_sets(settings).items():
        rows[name] = load_set(settings, "already-forgotten", source)
        if not settings.allow_overlap:
            _refuse_shared(rows[name], kept, "already-forgotten", "retain set")
    for name in OPTIONAL_SETS:
        if (source := getattr(settings, name)) is not None:
            rows[name] = load_set(settings, name, source)
    return rows, overlap


def split_kept(settings: Settings, kept: list[Row]) -> dict[str, Sequence[Row]]:
    """Split the retain set; a file of floor or final rows takes the place of that part, which is taught instead.

    Of the taught rows at most `data_rows` are kept.
    """
    if settings.floor_rows and settings.final_rows:
        parts: dict[str, Sequence[Row]] = {"taught": kept}
    else:
        split = split_retain(kept, settings.seed, settings.withheld_rows)
        parts = {"taught": split.taught, "floor": split.floor, "final": split.final}
    for name, source in (("floor", settings.floor_rows), ("final", settings.final_rows)):
        if source:
            parts["taught"] = [*parts["taught"], *parts.get(name, ())]
            parts[name] = load_set(settings, f"{name}-rows", source)
            _refuse_shared(parts[name], parts["taught"], f"{name}-rows", "taught part of the retain set")
    return {**parts, "taught": sample_rows(parts["taught"], settings.data_rows, settings.seed)}


def _refuse_shared(rows: Sequence[Row], others: Sequence[Row], name: str, place: str) -> None:
    """Refuse rows that should be withheld but are trained on, or that should be kept but are forgotten."""
    if exact := find_overlap(rows, others).exact:
        numbers = ", ".join(str(number) for number, _ in exact[:5])
        raise UserError(
            f"{len(exact)} of --{name} also stand in the {place}: row {numbers}{' ...' if len(exact) > 5 else ''}.",
            "what is taught or forgotten cannot show what was kept.",
            f"remove these rows from one of the two files, or leave --{name} out.",
        )


def _refuse_unseen_kind(settings: Settings, groups: ModelGroups, adapted: Sequence[str]) -> None:
    """Refuse metric lora where no adapter lies on what a kind of group is made of: it would see nothing of them."""
    if settings.metric != "lora":
        return
    for layers in groups.layers.values():
        leaves = {one.module.rpartition(".")[2] for one in layers[0].projections}
        if not leaves & set(adapted):
            raise UserError(
                f"metric lora has no adapter on {' '.join(sorted(leaves))}.",
                "it reads adapter gradients alone, so these groups would go in an arbitrary order.",
                "name at least one of them in --target-modules, or set --metric gate.",
            )


def _refuse_unreachable(settings: Settings, groups: ModelGroups) -> None:
    """Refuse a goal that cannot be had under the widths that may stand."""
    rules = Rules.of(settings)
    frozen_layers(rules, groups.depth)
    if most_removable(groups, rules) == 0:
        raise UserError(
            f"nothing can be cut: {_lowest_widths(groups, rules)}.",
            _widths_that_stand(groups, rules),
            "lower --min-groups-per-layer or --round-to, or freeze fewer layers.",
        )
    if rules.of_groups:
        _refuse_too_large_a_share(settings.sparsity or settings.max_sparsity, groups, rules)
        return
    if settings.sparsity is not None:
        _refuse_too_much(settings.sparsity, groups, rules)
    name = "max_sparsity" if settings.sparsity is None else "sparsity"
    _refuse_too_little(name, getattr(settings, name), groups, rules)


def _refuse_too_large_a_share(sparsity: float, groups: ModelGroups, rules: Rules) -> None:
    untouched, *lower = allowed_widths("ffn_channel", groups, rules)
    least, most = smallest_share(groups, rules), (untouched - min(lower, default=untouched)) / untouched
    if sparsity > most or least > sparsity:
        raise UserError(
            f"sparsity {sparsity:g} of a layer's groups cannot be had; {_lowest_widths(groups, rules)}.",
            _widths_that_stand(groups, rules),
            f"set --sparsity between {ceil(least * 10_000) / 10_000:g} and {floor(most * 10_000) / 10_000:g}"
            f"{_or_a_lower_multiple(groups, rules)}.",
        )


def _refuse_too_much(sparsity: float, groups: ModelGroups, rules: Rules) -> None:
    most = most_removable(groups, rules) / groups.total_parameters
    if sparsity > most:
        raise UserError(
            f"sparsity {sparsity:g} cannot be reached: at most {most:.3f} of all parameters are prunable; "
            f"{_lowest_widths(groups, rules)}.",
            f"embeddings stay whole; {_widths_that_stand(groups, rules)}",
            f"lower --sparsity to at most {floor(most * 1000) / 1000:g}, or --min-groups-per-layer or --round-to.",
        )


def _refuse_too_little(name: str, goal: float, groups: ModelGroups, rules: Rules) -> None:
    step, allowed = smallest_step(groups, rules), int(goal * groups.total_parameters)
    if allowed < step:
        enough = ceil(step / groups.total_parameters * 10_000) / 10_000
        raise UserError(
            f"{name} {goal:g} is {allowed} parameters, the smallest step removes {step}: nothing would be cut.",
            _widths_that_stand(groups, rules),
            f"raise {flag(name)} to at least {enough:g}{_or_a_lower_multiple(groups, rules)}.",
        )


def _or_a_lower_multiple(groups: ModelGroups, rules: Rules) -> str:
    return ", or give a lower --round-to" if channel_multiple(groups, rules) > 1 else ""


def _widths_that_stand(groups: ModelGroups, rules: Rules) -> str:
    """Return in words what any decision obeys."""
    least, multiple = rules.min_groups_per_layer, channel_multiple(groups, rules)
    return (
        f"a layer keeps at least {counted(least, 'group')} of each kind (--min-groups-per-layer), channels in "
        f"multiples of {multiple} (--round-to), and under --widths uniform only head counts that the family's config "
        "takes."
    )


def _lowest_widths(groups: ModelGroups, rules: Rules) -> str:
    """Return in words to which width each kind may be cut down."""
    ends = {kind: allowed_widths(kind, groups, rules) for kind in open_kinds(groups, rules)}
    return "a layer keeps at least " + " and ".join(
        f"{widths[-1]} of {widths[0]} {kind}s" for kind, widths in ends.items()
    )
