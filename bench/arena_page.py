"""Page of the arena: two tables a world and three figures, made of the very numbers of arena.json.

Reads    the values of arena.py
Gives    section, sources, draw, draw_frontier, draw_relearning
Source   colours that colour-blind readers tell apart: Okabe and Ito, 2008; then shape and line tell
Symbols  cells: mean over seeds ± half of its 95% interval; ours ahead: ours minus theirs (95% interval over seeds)
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from math import isnan, nan
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib

matplotlib.use("agg")
from arena_asked import AREA, KEPT, Column, asked_table, lead_of, spread
from arena_contestants import CONTESTANTS, OURS
from arena_marks import ATTACKS, GPU_PREFILL, PREFILL, TAUGHT, WITHHELD
from arena_worlds import WORLD_WORDS, Values
from matplotlib import pyplot
from matplotlib.axes import Axes
from results_page import markdown_table

from loraprune.words import counted

SAMPLES, ASKED = ATTACKS["attack_samples"], ATTACKS["attack_rows"]
COMPOSITES = {"composite": "composite", "composite_relearning": "with relearning"}
FORGOTTEN_AND_KEPT: dict[str, Column] = {
    "P - ref.": lambda one: one["performance_gap"],
    "ES - ref.": lambda one: one["extraction_strength_gap"],
    "truth ratio - ref.": lambda one: one["truth_ratio_gap"],
    "retention": lambda one: one["kept"][WITHHELD],
    "taught": lambda one: one["kept"][TAUGHT],
    "bystanders": lambda one: one["kept"].get("bystander", nan),
    "guard": lambda one: one["kept"].get("guard", nan),
    "memorisation": lambda one: one["memorisation"],
    "privacy": lambda one: one["privacy"],
    "utility": lambda one: one["utility"],
    **{title: lambda one, name=name: one[name] for name, title in COMPOSITES.items()},
}
ATTACKED_AND_SPENT: dict[str, Column] = {
    "min-k AUC - ref.": lambda one: one["auc_gap"],
    "relearning area - ref.": lambda one: one["relearning_gap"],
    "its rise - ref.": lambda one: one["relearning_rise_gap"],
    f"best of {SAMPLES}, facts - ref.": lambda one: one["sampled_gap"]["contains"],
    f"best of {SAMPLES}, ROUGE-L - ref.": lambda one: one["sampled_gap"]["rouge_l_recall"],
    "worst wording, P - ref.": lambda one: one["reworded_gap"]["performance"],
    "NF4 gap": lambda one: one["rounded_gap"]["nf4"],
    "int8 gap": lambda one: one["rounded_gap"]["int8"],
    "left": lambda one: one["left"],
    "prefill, times faster": lambda one: one["prefill"],
    "peak, MiB": lambda one: one["peak_mib"],
    "seconds": lambda one: one["seconds"],
}
ROLES = {
    "ours": "",
    "variant": "variants of ours, changed in one place, and the best there is",
    "rival": "rivals, each at the best point of a small grid",
    "control": "controls: ours with another mask",
}
UNTOLD = 0.05  # a p below it tells two models' truth ratios apart
WHOLE = ("peak, MiB", "seconds")  # columns without decimals
EVEN = 0.01  # of P at either side of the reference's the axis is linear, beyond that logarithmic
LEAST_SHOWN = 0.1  # of P at either side of the reference's, so that hairs do not look like differences
LEAST_DRAWN = 0.85  # of what is kept, in the second figure
FRONTIERS = {  # ours by one setting, in its order; the line and what it is called
    "ours, by how far it looks ahead": ("-", ("ours, not looking ahead", OURS, "ours, looking ahead by 4")),
    "ours, by how much it cuts": ("--", ("ours, nothing cut", "ours, a fifth", OURS, "ours, a half")),
}
PER_ROW, LEGEND_COLUMNS = 3, 5  # panels in a figure's row; names in the legend's below as many
OURS_COLOUR = "#000000"
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#F0E442", "#999999", "#8B4513")
MARKERS = {"ours": "D", "variant": "D", "rival": "o", "control": "s"}
LINES = {"ours": "-", "variant": ":", "rival": "-", "control": "--"}


def section(values: Values) -> str:
    """Return the section of the results page."""
    return "\n\n".join([_contestants(values), *(_world(name, one) for name, one in values.items()), MEANINGS])


def _contestants(values: Values) -> str:
    """Return what each contestant on the page is, a line each."""
    shown = [key for key in CONTESTANTS if any(key in world["contestants"] for world in values.values())]
    lines = []
    for role, what in ROLES.items():
        of_role = [f"- **{key}**: {CONTESTANTS[key].words}." for key in shown if CONTESTANTS[key].role == role]
        lines += of_role if role == "ours" or not of_role else [f"- {what}:", *(f"  {line}" for line in of_role)]
    return "\n".join(["Who competes (numbers in brackets are of arXiv):", "", *lines])


def _world(name: str, world: Values) -> str:
    size, seeds = world["sparsity"], world["seeds"]
    look = f"look ahead by {radius:g}" if (radius := world["relearning_radius"]) else "do not look ahead"
    named = f"{counted(len(seeds), 'seed')} ({', '.join(map(str, seeds))})"
    asked = f"{named}; ours and the controls are asked for {size:.0%} of all parameters, and {look}."
    heading = f"**{name}**: {WORLD_WORDS[name]}. {asked} {_searched(world)} {_machine(world)}"
    points = {"point": {key: _point(one) for key, one in world["contestants"].items()}}
    ended = {"ended": {key: _ended(one) for key, one in world["contestants"].items()}}
    made_by = {"source": {key: ", ".join(sorted(_sources(one))) for key, one in world["contestants"].items()}}
    quality = {"forget quality, p": {key: _quality(one["cells"]) for key, one in world["contestants"].items()}}
    ahead = {
        f"ours ahead, {title}": {key: _ahead(world, key, composite) for key in world["contestants"]}
        for composite, title in COMPOSITES.items()
    }
    tables = [
        {**points, **quality, **_columns(world, FORGOTTEN_AND_KEPT), **ahead},
        {**_columns(world, ATTACKED_AND_SPENT), **ended, **made_by},
    ]
    of_ours = [asked_table(world, OURS)] if OURS in world["contestants"] else []
    return "\n\n".join([heading, *of_ours, *(_table(world, one) for one in tables)])


def _table(world: Values, columns: Mapping[str, Mapping[str, str]]) -> str:
    """Return a table with one line a contestant."""
    rows = [
        [f"**{key}**" if key == OURS else key, *(one[key] for one in columns.values())] for key in world["contestants"]
    ]
    return markdown_table(["", *columns], rows)


def _columns(world: Values, columns: Mapping[str, Column]) -> dict[str, dict[str, str]]:
    """Return each contestant's text under every title of which this world has the numbers."""
    shown = {}
    for title, of in columns.items():
        numbers = {key: [of(cell) for cell in one["cells"]] for key, one in world["contestants"].items()}
        if not any(isnan(number) for values in numbers.values() for number in values):
            shown[title] = {key: spread(values, 0 if title in WHOLE else 3) for key, values in numbers.items()}
    return shown


def _point(one: Values) -> str:
    """Return a contestant's point, and whether its grid ends there."""
    said = ", ".join(f"{name} {value:g}" for name, value in one["point"].items()) or "-"
    return f"{said}, its grid's end" if _is_at_end(one) else said


def _is_at_end(one: Values) -> bool:
    """Say whether nothing was tried on one side of a contestant's point."""
    tried = {name: {cell["point"][name] for cell in one["tried"]} for name in one["point"]}
    return any(one["point"][name] in (min(values), max(values)) for name, values in tried.items() if len(values) > 1)


def _ended(one: Values) -> str:
    """Return how the runs ended, and how many so; a dash for a rival, which cuts nothing or is not steered, and where
    that was not kept."""
    found = Counter(cell["outcome"] for cell in one["cells"] if cell.get("outcome") and one["role"] != "rival")
    return ", ".join(f"{name} {number}" for name, number in found.items()) or "-"


def _quality(cells: Sequence[Values]) -> str:
    """Return the median p, and of how many seeds it does not tell a cell from the reference."""
    found = [cell["forget_quality"] for cell in cells]
    return f"{median(found):.3f}; {sum(p >= UNTOLD for p in found)} of {len(found)}"


def _ahead(world: Values, key: str, name: str) -> str:
    """Return by how much ours leads on a composite, with the interval of the paired differences."""
    if key == OURS or OURS not in world["contestants"]:
        return "-"
    return str(lead_of(world, OURS, key, name))


def _searched(world: Values) -> str:
    """Return how the contestants came to their points."""
    rivals = {key: one for key, one in world["contestants"].items() if one["role"] == "rival"}
    unsearched = [key for key, one in rivals.items() if len(one["tried"]) == 1]
    if len(unsearched) == len(rivals):
        return "Points: each contestant's default; the rivals' grids were not searched."
    return (
        "Points: of each rival's three, and of one more where the best of these was at an edge, the one with the best "
        "composite with relearning on the first seed, kept on the others and for the composite without; ours and the "
        "controls have one, the defaults." + (f" Not searched: {', '.join(unsearched)}." if unsearched else "")
    )


def _machine(world: Values) -> str:
    """Return what the cells were made on, and what of their peak is there before anything is made."""
    cells = [cell for one in world["contestants"].values() for cell in one["cells"]]
    machines, jobs = sorted({cell["machine"] for cell in cells}), max(cell["jobs"] for cell in cells)
    before = fmean(cell["before_mib"] for cell in cells)
    return (
        f"Made on {' and '.join(machines)}, which other work may have shared, at most {counted(jobs, 'cell')} at once; "
        f"libraries and rows take {before:.0f} MiB of the peak."
    )


def sources(world: Values) -> set[str]:
    """Return by which code a world's cells were made."""
    return set[str]().union(*map(_sources, world["contestants"].values()))


def _sources(one: Values) -> set[str]:
    return {cell["source"] for cell in one["cells"]}


MEANINGS = f"""What the tables hold:

- **a cell**: mean over seeds ± half of its 95% interval of Student's t, the number alone where there is one seed.
- **ours ahead**: differences paired by seed, with the same interval.
- **met**: a limit is, where the whole interval keeps it, and in the mean, where the mean does; a lead, where every
  interval is above 0, and in the mean, where every mean is. Each interval is of one comparison: of twenty of what does
  not differ, one is expected to look sure.
- **- ref.**: less the reference's.
- **P**: performance; **ES**: extraction strength.
- **forget quality**: the median p of a Kolmogorov-Smirnov test of the truth ratios against the reference's, and on how
  many seeds it is {UNTOLD} or more: there it cannot tell the two apart.
- **retention**: P after / P before on withheld rows; **taught**, **bystanders**: the same there; **guard**: loss
  before / after.
- **memorisation**: harmonic mean of the closeness of P, ES and truth ratio to the reference's, where closeness is 1 -
  |difference| / max(reference, 1 - reference).
- **privacy**: harmonic mean of the closeness of four membership AUCs (loss, zlib, min-k, min-k++).
- **utility**: harmonic mean of what is kept of each set, at most 1.
- **composite**: harmonic mean of these three; **with relearning**: of these and 1 - excess area / (1 - reference's
  area).
- **relearning**: all weights are trained on one half of the forget set, the other half is asked for. Its **area** is
  the mean height of that curve, its **rise** the area less the height at which it begins.
- **best of {SAMPLES}**: of as many answers drawn at temperature 1 to each of {ASKED} forget questions, or all there
  are if fewer, the same for every contestant of a seed: in how many questions one holds every marked fact (the whole
  answer where none is marked), and the best ROUGE-L recall.
- **worst wording**: the most that P of a fact gets under its plain question, paraphrases, plain text, a statement or a
  jailbreak.
- **NF4 gap**, **int8 gap**: P(forget) in that format less P in float32, in which everything here is made.
- **left**: parameters, of the original's.
- **prefill**: the original's processor seconds over this checkpoint's, in turns in one process of one thread, to read
  {PREFILL["tokens"]:,} tokens in rows as long as its positions allow, in memory that stays with the process, so that
  no page faults are timed; on a GPU seconds of the clock, beside what other
  cells ask of it, and {GPU_PREFILL} times as many tokens.
- **seconds**, **peak**: of making the checkpoint alone, in a process of its own; peak is the most main memory that it
  held, a GPU's own is not counted.
- **ended**: the outcome that a run of ours or a control gave itself, and on how many seeds: `target_reached` is inside
  the band, `floor_reached` was stopped by the floor or kept less of its withheld rows than that, `no_candidates` has no
  group left that may go.
- **source**: a hash of the code that made a cell.

**The same for all**: the forget and retain rows. Rivals that train with a forget loss, and RMU, take more steps in
place of the scoring passes, in all at least as many rows as ours by its settings; so rivals take more steps for
looking ahead, which passes the forget rows twice a step and reads them once more (the loss of each half of a batch is
taken where relearning the other half would lead), while ours not looking ahead takes as many steps, of fewer rows. A
random or magnitude mask is not scored by passes and gets no steps for it; what a broken floor adds to ours or a
control, in repairs and looks, is not made up for; after a cut or a damping at once come the steps of repair alone.

**Not the same**: ours and its controls are steered row by row to goals taken from the holdout's rows
(`natural_spread`), the same rows that the membership attacks compare the forget set with; rivals by the mean of the
forget rows, for they push all alike, and RMU, SSD and the activation ratio by nothing. "Ours, steered by the mean"
shows what that gives. Losses on LoRA run inside the product, with its floor; the other rivals have none. The defaults
of ours were chosen over many tries on other seeds of the demo; a rival had its few points on one seed. The activation
ratio cuts channels one by one, ours by eights. A mask may end larger than it was asked to, where a smaller one would
break the floor. Seconds are of machines that did other work too, on stories most of all.

In the second figure the dashed lines are what was asked of ours: an area at most {AREA:.2f} above the reference's, and
{KEPT:.2f} kept.

Made by `python bench/arena.py --worlds WORLD --seeds ... --contestants ...`, with `--defaults` where no grid was
searched; the seeds on this page are the default. The quick form, `--quick --jobs 2`, compares a few contestants on one
seed of the demo and leaves this page as it is."""


# --- figures ----------------------------------------------------------------------------------------------------------


def draw(values: Values, path: Path) -> None:
    """Draw how far P(forget) is from the reference's against retention; the star is where the reference stands."""

    looks = _looks(values)

    def world(axes: Axes, one: Values) -> None:
        _points(axes, one, looks, _withheld, lambda cell: cell["performance_gap"])
        _star(axes, _kept_by_reference(one), 0.0)
        axes.set_yscale("symlog", linthresh=EVEN)
        lowest, highest = axes.get_ylim()
        axes.set_ylim(min(lowest, -LEAST_SHOWN), max(highest, LEAST_SHOWN))
        axes.set_xlabel("retention on withheld rows")
        axes.set_ylabel("P(forget) - the reference's")

    _figure(values, path, world)


def draw_frontier(values: Values, path: Path) -> None:
    """Draw what is kept of withheld rows against how much of what is forgotten comes back; dashed: what was asked.

    Lines join the means of ours and its variants by one setting: what it can be had for.
    """

    looks = _looks(values)

    def world(axes: Axes, one: Values) -> None:
        _points(axes, one, looks, _area, _withheld)
        _star(axes, 0.0, _kept_by_reference(one))
        axes.axvline(AREA, color="#999999", linewidth=0.8, linestyle="--")
        axes.axhline(KEPT, color="#999999", linewidth=0.8, linestyle="--")
        means = {key: (_mean(each, _area), _mean(each, _withheld)) for key, each in one["contestants"].items()}
        for name, (line, keys) in FRONTIERS.items():
            if len(present := [means[key] for key in keys if key in means]) > 1:
                axes.plot(*zip(*present, strict=True), line, color=OURS_COLOUR, linewidth=1.0, label=name)
        if below := [key for key, (_, kept) in means.items() if kept < LEAST_DRAWN]:
            axes.set_ylim(bottom=LEAST_DRAWN)
            axes.text(0.98, 0.02, f"further down: {', '.join(below)}", transform=axes.transAxes, ha="right", fontsize=8)
        axes.set_xlabel("relearning area - the reference's")
        axes.set_ylabel("retention on withheld rows")

    _figure(values, path, world)


def _area(cell: Values) -> float:
    return cell["relearning_gap"]


def _withheld(cell: Values) -> float:
    return cell["kept"][WITHHELD]


def _mean(contestant: Values, of: Column) -> float:
    return fmean(of(cell) for cell in contestant["cells"])


def _kept_by_reference(world: Values) -> float:
    """Return the mean over seeds of what the reference knows of withheld rows, of what the original does."""
    pairs = [(one["reference"]["sets"][WITHHELD], one["original"]["sets"][WITHHELD]) for one in world["ends"].values()]
    return fmean(theirs["performance"] / ours["performance"] for theirs, ours in pairs)


def _star(axes: Axes, across: float, up: float) -> None:
    axes.plot(across, up, "*", color="#CC0000", markersize=16, label="reference")


def _points(axes: Axes, world: Values, looks: Mapping[str, Values], across: Column, up: Column) -> None:
    """Draw a point for each contestant's mean and a small one a seed."""
    for key, each in world["contestants"].items():
        found = [[of(cell) for cell in each["cells"]] for of in (across, up)]
        marker, colour = MARKERS[each["role"]], looks[key]["color"]
        axes.plot(*found, marker, color=colour, markersize=3, alpha=0.6)
        axes.plot(*([fmean(one)] for one in found), marker, color=colour, markersize=8, label=key)


def draw_relearning(values: Values, path: Path) -> None:
    """Draw P of the forget facts that relearning does not show, by its steps, as means over seeds."""

    looks = _looks(values)

    def world(axes: Axes, one: Values) -> None:
        for role, line in (("original", ":"), ("reference", "-")):
            _curve(axes, [end[role] for end in one["ends"].values()], label=role, color="#CC0000", linestyle=line)
        for key, each in one["contestants"].items():
            _curve(axes, [cell["marks"] for cell in each["cells"]], label=key, **looks[key])
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlabel("steps of relearning on one half of the forget set")
        axes.set_ylabel("P of the other half")

    _figure(values, path, world)


def _curve(axes: Axes, marks: Sequence[Values], **look: Any) -> None:
    curves = [dict(map(tuple, one["relearning"]["curve"])) for one in marks]
    steps = [step for step in curves[0] if all(step in one for one in curves)]
    axes.plot(steps, [fmean(one[step] for one in curves) for step in steps], **look)


def _looks(values: Values) -> dict[str, Values]:
    """Return colour, line and width of each contestant, the same in every world; ours stands out.

    Colours tell apart those of one role, whose marker or line is the same.
    """
    roles = {key: one["role"] for world in values.values() for key, one in world["contestants"].items()}
    of_role = {role: [key for key, one in roles.items() if one == role] for role in roles.values()}
    colours = {key: COLOURS[of_role[role].index(key) % len(COLOURS)] for key, role in roles.items() if role != "ours"}
    return {
        key: {
            "color": colours.get(key, OURS_COLOUR),
            "linestyle": LINES[role],
            "linewidth": 2.5 if role == "ours" else 1.3,
        }
        for key, role in roles.items()
    }


def _figure(values: Mapping[str, Values], path: Path, world: Callable[[Axes, Values], None]) -> None:
    """Draw one panel a world, PER_ROW beside each other, the legend below them."""
    rows, columns = -(-len(values) // PER_ROW), min(PER_ROW, len(values))
    size = 4.2 * columns, 3.8 * rows
    figure, panels = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes, (name, one) in zip_longest(panels.flat, values.items(), fillvalue=("", None)):
        if one is None:
            axes.set_axis_off()
        else:
            world(axes, one)
            axes.set_title(name)
    named: dict[str, Any] = {}
    for axes in panels.flat:
        handles, labels = axes.get_legend_handles_labels()
        named.update(zip(labels, handles, strict=True))
    names_in_row = -(-LEGEND_COLUMNS * columns // PER_ROW)
    figure.legend(named.values(), named, loc="outside lower center", ncols=names_in_row, frameon=False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
