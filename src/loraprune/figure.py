"""Figure: a run over its steps, and every set before and after, as one picture.

Reads    the content of metrics.json and events.jsonl
Gives    draw_result, draw_course, figure_bytes
Source   colours that colour-blind readers tell apart: Okabe and Ito, 2008
Symbols  P = performance
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from loraprune.events import Attempt, attempts, has_look
from loraprune.folder import write_bytes
from loraprune.words import Values, band_texts, percent

FORGET, RETENTION, REMOVED, INK, QUIET = "#C44E00", "#0072B2", "#DDDDDD", "#333333", "#666666"
BARS = {"before": "#BDBDBD", "after": "#0072B2", "reference": "#E69F00"}
STOOD = ("wait", "accept", "roll_back", "evaluate", "stop")  # looks at a state that the run came to or went back to
MARKS = {"repaired": "v", "rolled back": "x"}  # what came of a state that broke a limit
LEGEND: dict[str, Any] = {
    "loc": "lower right",
    "bbox_to_anchor": (1.02, 0.99),
    "frameon": False,
    "fontsize": 10,
    "columnspacing": 1.2,
}
LABEL_GAP = 0.062  # of the left panel's height; a line of text
MARGIN = 0.34  # of the training steps; room for the labels
Label = tuple[float, str, str]  # height, words, colour


@dataclass(frozen=True)
class Look:
    """The model at one training step: retention on floor rows, P(forget) (None in compression), removed share."""

    step: int
    retention: float
    sparsity: float
    forget: float | None
    interval: tuple[float, float] | None = None  # of retention


def course(metrics: Values, events: Iterable[Values]) -> list[Look]:
    """Return the run from the untouched model to the written one; of a step seen twice, the later look counts."""
    known = metrics.get("forget") or {"before": {}, "after": {}}
    looks = [Look(0, 1.0, 0.0, known["before"].get("performance"), (1.0, 1.0))]
    last_step = 0
    for event in events:
        step = event.get("step", last_step)
        last_step = step
        if has_look(event, STOOD):
            looks = [one for one in looks if one.step < step]
            looks.append(_look(step, event))
    end = metrics["floor"].get("retention")
    retention = metrics["retention"] if end is None else end
    interval = looks[-1].interval if looks[-1].step == last_step else None
    looks = [one for one in looks if one.step < last_step]
    return [*looks, Look(last_step, retention, metrics["sparsity"], known["after"].get("performance"), interval)]


def _look(step: int, event: Values) -> Look:
    """Return what an event saw; a number that is not finite stands there as text."""
    forget, interval = event.get("forget"), event.get("retention_interval")
    return Look(
        step,
        float(event["retention"]),
        event["sparsity"],
        None if forget is None else float(forget),
        interval and (float(interval[0]), float(interval[1])),
    )


def draw_result(metrics: Values, events: Iterable[Values], path: Path) -> None:
    """Write a PNG of 1200 x 480: the run over its training steps, and P of every set before and after."""
    write_bytes(path, figure_bytes(metrics, events))


def figure_bytes(metrics: Values, events: Iterable[Values]) -> bytes:
    figure = Figure(figsize=(12, 4.8), dpi=100)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    draw_course(left, metrics, list(events))
    _draw_bars(right, metrics)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, color=INK, pad=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=10, colors=INK)


def draw_course(axes: Axes, metrics: Values, events: Sequence[Values]) -> None:
    """Draw the left panel: retention, P(forget) and the removed share over the steps, and what broke a limit."""
    looks, marks = course(metrics, events), _marks(attempts(events))
    end = max(looks[-1].step, 1)
    heights = [*(one.retention for one in looks), *(height for points in marks.values() for _, height in points)]
    top = max(1.08, 1.06 * max(height for height in heights if isfinite(height)))
    _style(axes, "The run, step by step")
    axes.set(xlim=(0, (1 + MARGIN) * end), ylim=(0, top))
    axes.set_xlabel("training step", fontsize=10, color=INK, x=0.5 / (1 + MARGIN))
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= end])
    labels = [_draw_removed(axes, looks, top), *_draw_bounds(axes, metrics, end), *_draw_lines(axes, looks)]
    _draw_interval(axes, looks)
    _draw_marks(axes, marks)
    _write_labels(axes, labels, 1.02 * end, top)


def _marks(tried: Iterable[Attempt]) -> dict[str, list[tuple[int, float]]]:
    """Return step and retention of each state that broke a limit, by what came of it."""
    broke = [one for one in tried if one.broken or not one.accepted]
    marks = {
        "repaired": [(one.step, one.retention) for one in broke if one.accepted and one.retention is not None],
        "rolled back": [(one.step, one.retention) for one in broke if not one.accepted and one.retention is not None],
    }
    return {name: points for name, points in marks.items() if points}


def _draw_marks(axes: Axes, marks: dict[str, list[tuple[int, float]]]) -> None:
    """Mark what the controller did, with a key above the panel; nothing where no limit was broken."""
    style: dict[str, Any] = {"color": RETENTION, "markerfacecolor": "white", "markeredgewidth": 1.6, "linestyle": ""}
    for name, points in marks.items():
        axes.plot(*zip(*points, strict=True), marker=MARKS[name], markersize=6.5, label=name, clip_on=False, **style)
    if marks:
        axes.legend(ncols=len(marks), handletextpad=0.1, **LEGEND)


def _draw_interval(axes: Axes, looks: Sequence[Look]) -> None:
    """Shade the interval of retention; the untouched model's, an exact 1, begins it where others follow."""
    known = [(one.step, *one.interval) for one in looks if one.interval is not None]
    if len(known) > 1:
        steps, low, high = (list(numbers) for numbers in zip(*known, strict=True))
        axes.fill_between(steps, low, high, color=RETENTION, alpha=0.15, linewidth=0)


def _draw_lines(axes: Axes, looks: Sequence[Look]) -> list[Label]:
    lines = {
        "P(forget)": (FORGET, [(one.step, one.forget) for one in looks if one.forget is not None]),
        "retention": (RETENTION, [(one.step, one.retention) for one in looks]),
    }
    labels, marker = [], "o" if len(looks) <= 60 else ""
    for name, (colour, points) in lines.items():
        if points:
            axes.plot(
                *zip(*points, strict=True), color=colour, linewidth=2, marker=marker, markersize=3.5, clip_on=False
            )
            labels.append((points[-1][1], f"{name} {points[-1][1]:.2f}", colour))
    return labels


def _draw_removed(axes: Axes, looks: Sequence[Look], top: float) -> Label:
    """Fill the removed share on an axis of its own, in the lower third; return its label."""
    most = max(0.02, *(one.sparsity for one in looks))
    second = axes.twinx()
    second.fill_between([one.step for one in looks], [one.sparsity for one in looks], step="post", color=REMOVED)
    second.set_ylim(0, 3.2 * most)
    ticks = [tick for tick in MaxNLocator(3).tick_values(0, most) if tick <= 1.1 * most]
    second.set_yticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
    second.set_ylabel("removed share", fontsize=10, color=QUIET, loc="bottom")
    second.tick_params(labelsize=10, colors=QUIET)
    second.spines[["top", "left"]].set_visible(False)
    second.spines["right"].set(bounds=(0, ticks[-1]), color=QUIET)
    axes.set_zorder(second.get_zorder() + 1)
    axes.patch.set_visible(False)
    return looks[-1].sparsity / (3.2 * most) * top, f"removed {percent(looks[-1].sparsity)}", QUIET


def _draw_bounds(axes: Axes, metrics: Values, end: int) -> list[Label]:
    """Draw target band and floor as far as the run has them; return their labels."""
    labels = []
    if target := metrics.get("target"):
        low, high = max(target["low"], 0.0), target["high"]
        axes.fill_between([0, end], low, high, color=FORGET, alpha=0.15, linewidth=0)
        labels.append(((low + high) / 2, f"target {' .. '.join(band_texts(target))}", FORGET))
    if floor := metrics["floor"].get("min_retain_performance"):
        axes.plot([0, end], [floor, floor], color=RETENTION, linewidth=1.2, linestyle="--")
        labels.append((floor, f"floor {floor:.2f}", RETENTION))
    return labels


def _write_labels(axes: Axes, labels: Sequence[Label], x: float, top: float) -> None:
    ordered = sorted(labels, key=lambda one: one[0])
    heights = spread([height for height, _, _ in ordered], LABEL_GAP * top, top)
    for height, (_, words, colour) in zip(heights, ordered, strict=True):
        axes.text(x, height, words, color=colour, fontsize=10, va="center")


def spread(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Return rising heights moved apart to at least `gap` with the least squared movement, within 0 and `top`."""
    blocks: list[list[float]] = []  # each holds what one block of touching labels asks of its lowest
    for number, height in enumerate(heights):
        blocks.append([height - gap * number])
        while len(blocks) > 1 and _middle(blocks[-2]) > _middle(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    lowest = [_middle(block) for block in blocks for _ in block]
    highest = top - gap * (len(heights) - 1)
    return [min(max(low, gap / 2), highest) + gap * number for number, low in enumerate(lowest)]


def _middle(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _draw_bars(axes: Axes, metrics: Values) -> None:
    blocks = {name: metrics[name] for name in ("forget", "retain", "bystander", "holdout") if metrics.get(name)}
    states = [name for name in BARS if any(block.get(name) for block in blocks.values())]
    width = 0.8 / len(states)
    for place, block in enumerate(blocks.values()):
        present = [name for name in states if block.get(name)]
        for index, name in enumerate(present):
            _draw_bar(axes, place + (index - (len(present) - 1) / 2) * width, block[name]["performance"], width, name)
    _style(axes, "Performance")
    final = {"retain": "retain\n(final rows)" if metrics.get("forget") else "data\n(final rows)"}
    axes.set_xticks(range(len(blocks)), [final.get(name, name) for name in blocks])
    half, middle = max(len(blocks), 3) / 2 + 0.1, (len(blocks) - 1) / 2
    axes.set(xlim=(middle - half, middle + half), ylim=(0, 1.08))
    keys = [Patch(color=BARS[name], label=name) for name in states]
    axes.legend(handles=keys, ncols=len(states), handlelength=1, **LEGEND)


def _draw_bar(axes: Axes, x: float, height: float, width: float, name: str) -> None:
    axes.bar(x, height, 0.92 * width, color=BARS[name])
    axes.text(x, height + 0.012, f"{height:.2f}", ha="center", fontsize=9, color=INK)
