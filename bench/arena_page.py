"""Page of the arena: the table and both figures, made of the very numbers of arena.json.

Reads    the values of arena.py
Gives    section, draw, draw_relearning
Source   colours that colour-blind readers tell apart: Okabe and Ito, 2008; then shape and line tell
Symbols  cells: mean over seeds ± standard deviation; differences: ours minus theirs (95% interval over seeds)
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib

matplotlib.use("agg")
from arena_contestants import OURS
from arena_marks import TAUGHT, WITHHELD, paired
from arena_worlds import Values
from matplotlib import pyplot
from matplotlib.axes import Axes
from results_page import markdown_table

COMPOSITES = {"composite": "composite", "composite_relearning": "with relearning"}
COLUMNS: dict[str, Callable[[Values], float]] = {
    "P - ref.": lambda one: one["performance_gap"],
    "ES - ref.": lambda one: one["extraction_strength_gap"],
    "forget quality, p": lambda one: one["forget_quality"],
    "retention": lambda one: one["kept"][WITHHELD],
    "taught": lambda one: one["kept"][TAUGHT],
    "bystanders": lambda one: one["kept"].get("bystander", float("nan")),
    "guard": lambda one: one["kept"].get("guard", float("nan")),
    "min-k AUC - ref.": lambda one: one["auc_gap"],
    "relearning area - ref.": lambda one: one["relearning_gap"],
    "NF4 gap": lambda one: one["rounded_gap"]["nf4"],
    "int8 gap": lambda one: one["rounded_gap"]["int8"],
    "left": lambda one: one["left"],
    "memorisation": lambda one: one["memorisation"],
    "privacy": lambda one: one["privacy"],
    "utility": lambda one: one["utility"],
    **{title: lambda one, name=name: one[name] for name, title in COMPOSITES.items()},
}
OURS_COLOUR, COLOURS = "#000000", ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
MARKERS = {"ours": "D", "rival": "o", "control": "s"}
LINES = {"ours": "-", "rival": "-", "control": "--"}


def section(values: Values) -> str:
    """Return the section of the results page."""
    return "\n\n".join([*(_world(name, one) for name, one in values.items()), _words(values)])


def _world(name: str, world: Values) -> str:
    shown = [title for title in COLUMNS if not _absent(world, title)]
    header = ["", "point", *shown, "seconds", *(f"ours ahead, {title}" for title in COMPOSITES.values())]
    rows = [_row(key, one, world, shown) for key, one in world["contestants"].items()]
    size, seeds = world["sparsity"], len(world["seeds"])
    title = f"**{name}**, {seeds} seed(s); {size:.0%} of all parameters are asked of ours and of the controls."
    return f"{title}\n\n{markdown_table(header, rows)}"


def _absent(world: Values, title: str) -> bool:
    """Say whether a world has nothing to show in a column."""
    of = COLUMNS[title]
    return any(of(cell) != of(cell) for one in world["contestants"].values() for cell in one["cells"])


def _row(key: str, one: Values, world: Values, shown: Sequence[str]) -> list[str]:
    numbers = [_spread([COLUMNS[title](cell) for cell in one["cells"]]) for title in shown]
    point = ", ".join(f"{name} {value:g}" for name, value in one["point"].items()) or "-"
    ahead = [_ahead(world, key, name) for name in COMPOSITES]
    return [f"**{key}**" if key == OURS else key, point, *numbers, f"{_mean(one, 'seconds'):.0f}", *ahead]


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _mean(one: Values, name: str) -> float:
    return fmean(cell[name] for cell in one["cells"])


def _by_seed(one: Values, name: str) -> dict[int, float]:
    return {cell["seed"]: cell[name] for cell in one["cells"]}


def _ahead(world: Values, key: str, name: str) -> str:
    """Return by how much ours leads on a composite, with the interval of the paired differences."""
    if key == OURS or OURS not in world["contestants"]:
        return "-"
    found = paired(*(_by_seed(world["contestants"][one], name) for one in (OURS, key)))
    between = found["interval"]
    return f"{found['mean']:+.3f}" + (f" ({between[0]:+.3f} to {between[1]:+.3f})" if between else "")


def _words(values: Values) -> str:
    """Return what the columns mean and how the contestants came to their points."""
    searched = any(len(one["tried"]) > 1 for world in values.values() for one in world["contestants"].values())
    points = (
        "Points: of each rival's three the one with the best composite with relearning on the first seed, kept on the "
        "others; ours and the controls have one, the defaults. "
        if searched
        else "Points: each contestant's default; the rivals' grids were not searched. "
    )
    return points + (
        "P, ES (extraction strength), min-k AUC and relearning area are given as differences from the "
        "reference's. Retention: P after / P before on withheld rows; taught, bystanders: the same there. "
        "Relearning: all weights are trained on one half of the forget set, the other half is asked for; its area "
        "is the mean height of that curve. Gaps: P(forget) in NF4 or int8 minus P in float32. Memorisation: "
        "harmonic mean of the closeness of P, ES and truth ratio to the reference's, where closeness is 1 - "
        "|difference| / max(reference, 1 - reference); privacy: the same of four membership AUCs (loss, zlib, "
        "min-k, min-k++); utility: harmonic mean of what is kept of each set, at most 1. Composite: harmonic mean "
        "of the three; with relearning: of these and 1 - excess area / (1 - reference's area). Cells: mean ± "
        "standard deviation over seeds; ours ahead: paired differences by seed, 95% interval of Student's t. "
        "Every contestant sees the same rows. Those that train with a forget loss and score nothing take more steps "
        "in place of the scoring passes, in all at least as many rows as ours; RMU too; after a cut or a damping at "
        "once come the steps of repair alone. Seconds are of a machine that other work shared. Made by "
        "`python bench/arena.py`."
    )


# --- figures ----------------------------------------------------------------------------------------------------------


def draw(values: Values, path: Path) -> None:
    """Draw P(forget) against retention, a point for each contestant's mean and a small one a seed; the star is where
    the reference stands."""

    def world(axes: Axes, one: Values) -> None:
        for (key, each), look in zip(one["contestants"].items(), _looks(one), strict=True):
            across = [cell["kept"][WITHHELD] for cell in each["cells"]]
            up = [cell["forget"] for cell in each["cells"]]
            marker = MARKERS[each["role"]]
            axes.plot(across, up, marker, color=look["color"], markersize=3, alpha=0.6)
            axes.plot(fmean(across), fmean(up), marker, color=look["color"], markersize=8, label=key)
        ends = one["ends"].values()
        kept = [end["reference"]["sets"][WITHHELD]["performance"] / _known(end, WITHHELD) for end in ends]
        forgotten = [end["reference"]["performance"] for end in ends]
        axes.plot(fmean(kept), fmean(forgotten), "*", color="#CC0000", markersize=16, label="reference")
        axes.set_xlabel("retention on withheld rows")
        axes.set_ylabel("P(forget)")

    _figure(values, path, world)


def _known(end: Values, name: str) -> float:
    return end["original"]["sets"][name]["performance"]


def draw_relearning(values: Values, path: Path) -> None:
    """Draw P of the forget facts that relearning does not show, by its steps, as means over seeds."""

    def world(axes: Axes, one: Values) -> None:
        for role, line in (("original", ":"), ("reference", "-")):
            _curve(axes, [end[role] for end in one["ends"].values()], label=role, color="#CC0000", linestyle=line)
        for (key, each), look in zip(one["contestants"].items(), _looks(one), strict=True):
            _curve(axes, [cell["marks"] for cell in each["cells"]], label=key, **look)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlabel("steps of relearning on one half of the forget set")
        axes.set_ylabel("P of the other half")

    _figure(values, path, world)


def _curve(axes: Axes, marks: Sequence[Values], **look: Any) -> None:
    curves = [dict(map(tuple, one["relearning"]["curve"])) for one in marks]
    steps = [step for step in curves[0] if all(step in one for one in curves)]
    axes.plot(steps, [fmean(one[step] for one in curves) for step in steps], **look)


def _looks(world: Values) -> list[dict[str, Any]]:
    """Return colour, line and width of each contestant, in their order; ours stands out."""
    looks, used = [], 0
    for one in world["contestants"].values():
        ours = one["role"] == "ours"
        colour = OURS_COLOUR if ours else COLOURS[used % len(COLOURS)]
        looks.append({"color": colour, "linestyle": LINES[one["role"]], "linewidth": 2.5 if ours else 1.3})
        used += not ours
    return looks


def _figure(values: Mapping[str, Values], path: Path, world: Callable[[Axes, Values], None]) -> None:
    """Draw one panel a world, the legend beside them."""
    figure, panels = pyplot.subplots(
        1, len(values), figsize=(4.2 * len(values) + 3.0, 4.4), squeeze=False, layout="constrained"
    )
    for axes, (name, one) in zip(panels[0], values.items(), strict=True):
        world(axes, one)
        axes.set_title(name)
    panels[0][-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
