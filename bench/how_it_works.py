"""How it works: a run of the demo under a strict floor, so that a step waits, is repaired, rolled back and halved.

Reads    the demo's models and data of seed 0, made when they are not there; the run is in bench/cache/how-it-works
Gives    docs/how-it-works.png and the events of docs/how-it-works.md
Source   -
Symbols  P = performance
"""

from typing import Any

from results_page import ROOT, markdown_table, put_section

from loraprune.demo import make_inputs, settings_for
from loraprune.events import has_look, read_events
from loraprune.figure import draw_result
from loraprune.pipeline import run
from loraprune.words import counted

WORLD, OUTPUT = ROOT / "bench" / "cache" / "demo" / "seed-0", ROOT / "bench" / "cache" / "how-it-works"
STRICT: dict[str, Any] = {"min_retain_performance": 0.95, "sparsity": 0.35, "recovery_steps": 10}
SHOWN = ("score", "wait", "propose", "recover", "roll_back", "accept", "evaluate", "stop")


def main() -> None:
    """Run it (a finished one is read), draw it, and tell the events of steps that waited and were undone."""
    make_inputs(WORLD, 0)
    metrics = dict(run(settings_for(WORLD, 0, output=str(OUTPUT), **STRICT)).metrics)
    events = read_events(OUTPUT / "events.jsonl")
    draw_result(metrics, events, ROOT / "docs" / "how-it-works.png")
    put_section(ROOT / "docs" / "how-it-works.md", "events", section(metrics, events))


def section(metrics: Any, events: list[dict[str, Any]]) -> str:
    """Return the table of the first steps that waited and were undone, of recovery's first look, and of the stop."""
    waited, undone = ([one["step"] for one in events if one["event"] == kind] for kind in ("wait", "roll_back"))
    looks = [one for one in events if has_look(one, SHOWN)]
    told = [one for one in looks if one["step"] in (*waited[:1], *undone[:1])]
    recovery = [one for one in looks if one["event"] == "evaluate" and one["step"] > 0]
    told += [*recovery[:1], looks[-1]]
    header = ["step", "event", "removed", "retention (95 % interval)", "P(forget)", "broken"]
    rows = [
        [
            str(one["step"]),
            f"`{one['event']}`",
            f"{one['sparsity']:.1%}",
            f"{one['retention']:.3f} ({one['retention_interval'][0]:.3f} to {one['retention_interval'][1]:.3f})",
            f"{one['forget']:.3f}",
            ", ".join(one.get("broken", ())) or "-",
        ]
        for one in told
    ]
    strict = ", ".join(f"`{name}` {value:g}" for name, value in STRICT.items())
    goal, floor = metrics["target"], metrics["floor"]
    return "\n\n".join(
        [
            markdown_table(header, rows),
            f"The demo's world, seed 0, with {strict}. Target P(forget) {goal['performance']:.3f}, band "
            f"{goal['low']:.3f} to {goal['high']:.3f}; {counted(len(waited), 'wait')} and "
            f"{counted(len(undone), 'roll-back')} in all; outcome `{metrics['outcome']}`; retention "
            f"{floor['retention']:.3f} on the floor rows and {metrics['retention']:.3f} on the final rows. Made by "
            "`python bench/how_it_works.py`.",
        ]
    )


if __name__ == "__main__":
    main()
