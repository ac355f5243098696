"""The report says what metrics.json says: no other number, no text of a data set, nobody's folders."""

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from loraprune.errors import UserError
from loraprune.figure import course, draw_course, draw_result, spread
from loraprune.report import (
    limits,
    local_name,
    model_card,
    removed_by_layer,
    result_rows,
    result_table,
    without_folders,
    write_report,
)
from loraprune.words import number_text, outcome_text

HOME = "/home/jane/secret"
CONFIG = (
    f'model = "{HOME}/people-llama"\nforget = "{HOME}/forget.jsonl"\nretain = "org/people:all:train"\nsparsity = 0.3\n'
)


def measured(performance: float, rows: int) -> dict[str, Any]:
    return {
        "performance": performance,
        "loss": -math.log(performance),
        "exact_match": performance**2,
        "fact_performance": performance**3,
        "rows": rows,
    }


def unlearning() -> dict[str, Any]:
    """Return the metrics of a run with every optional set and a reference."""
    return {
        "schema": 1,
        "task": "unlearn",
        "model": {
            "parameters": {"before": 7340032, "after": 5123456},
            "bytes": {"before": 29361234, "after": 20494321},
            "groups": {"kv_group": {"before": 8, "after": 6}, "ffn_channel": {"before": 40, "after": 30}},
        },
        "sparsity": 0.30198,
        "forget": {"before": measured(0.9731, 108), "after": measured(0.4688, 108), "reference": measured(0.4457, 108)},
        "retain": {"before": measured(0.9712, 72), "after": measured(0.9301, 72)},
        "retain_taught": {"before": measured(0.9722, 576), "after": measured(0.9951, 576)},
        "bystander": {"before": measured(0.9698, 144), "after": measured(0.8123, 144)},
        "holdout": {"before": measured(0.4402, 108), "after": measured(0.4211, 108)},
        "retention": 0.9577,
        "retention_taught": 1.0236,
        "floor": {"min_retain_performance": 0.9, "held": True, "retention": 0.9571, "rows": 72},
        "target": {"performance": 0.4457, "low": 0.3343, "high": 0.5571, "source": "reference"},
        "outcome": "target_reached",
        "goal_met": True,
        "seconds": {"score": 14.2, "train": 52.1, "evaluate": 8.3, "total": 74.6},
        "peak_memory_bytes": 1912345600,
    }


def without_optional_sets() -> dict[str, Any]:
    metrics = unlearning()
    metrics["forget"]["reference"] = metrics["bystander"] = metrics["holdout"] = None
    target = {"performance": 0.0973, "low": -0.0027, "high": 0.1273, "source": "tenth"}
    return metrics | {"target": target, "outcome": "floor_reached", "goal_met": False}


def compression() -> dict[str, Any]:
    metrics = without_optional_sets()
    return metrics | {"task": "prune", "forget": None, "target": None, "outcome": "budget_spent", "goal_met": True}


RUNS = {"unlearning": unlearning, "without optional sets": without_optional_sets, "compression": compression}


@pytest.fixture(params=RUNS.values(), ids=RUNS.keys())
def metrics(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param()


def events_of(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    looks = [
        {"event": "accept", "step": 35, "sparsity": 0.1, "retention": 0.97},
        {"event": "propose", "step": 50, "sparsity": 0.4, "removed": 9},
        {"event": "roll_back", "step": 50, "sparsity": 0.1},
        {"event": "accept", "step": 50, "sparsity": 0.3, "retention": 0.93},
        {"event": "evaluate", "step": 75, "sparsity": 0.3, "retention": 0.95},
    ]
    if metrics["forget"]:
        looks = [one | {"forget": 0.6} if "retention" in one else one for one in looks]
    return [*looks, {"event": "train", "step": 90, "loss": 1.2}, {"event": "stop", "outcome": metrics["outcome"]}]


def run_folder(path: Path, metrics: Mapping[str, Any]) -> Path:
    share = [0.8, 0.6, 0.7] if metrics["forget"] else [None] * 3
    removals = {
        "layer": [0, 1, 1],
        "kind": ["kv_group", "kv_group", "ffn_channel"],
        "index": [3, 2, 11],
        "share": share,
        "forget": share,
        "retain": [0.2, 0.4, 0.3],
        "step": [35, 35, 50],
    }
    reproduce = {"seed": 0, "command": f"loraprune unlearn --forget={HOME}/forget.jsonl", f"{HOME}/x": "3 <b> rows"}
    files = {"metrics": metrics, "decision": {"ended_by": "budget", "removals": removals}, "reproduce": reproduce}
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    lines = [json.dumps(one) for one in events_of(metrics)]
    (path / "events.jsonl").write_text("\n".join([lines[0], lines[1][:20], *lines[1:]]))  # one was cut short by a kill
    (path / "config.toml").write_text(CONFIG)
    return path


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        for one in value.values():
            yield from numbers_in(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def printed(table: Any) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(table)
    return stream.getvalue()


# --- tables


def test_every_number_of_the_table_is_one_of_metrics(metrics: dict[str, Any]) -> None:
    known = {number_text(one) for one in numbers_in(metrics)}
    for row in result_rows(metrics):
        assert {row.before, row.after, row.reference} - {""} <= known, row


def test_changes_are_after_minus_before(metrics: dict[str, Any]) -> None:
    for row in result_rows(metrics):
        if not row.change:
            continue
        before, after = (float(text.replace(",", "")) for text in (row.before, row.after))
        change = 100 * (after - before) / before if row.change.endswith("%") else after - before
        assert float(row.change.removesuffix(" %")) == pytest.approx(change, abs=0.051 if "%" in row.change else 0.0016)


def test_sets_and_columns_that_the_run_did_not_have_are_absent() -> None:
    full, bare, pruned = (printed(result_table(make())) for make in RUNS.values())
    for words in ("P(bystander)", "P(holdout)", "reference"):
        assert words in full and words not in bare and words not in pruned
    assert "forget" in bare and "forget" not in pruned
    assert "P(data, final rows)" in pruned and "P(retain, final rows)" in full


def test_a_set_without_marked_facts_has_no_fact_performance() -> None:
    metrics = unlearning()
    for state in metrics["forget"].values():
        state["fact_performance"] = None
    assert "fact performance" not in printed(result_table(metrics))


# --- words


def test_the_outcome_is_said_with_its_numbers() -> None:
    assert outcome_text(unlearning()) == "target_reached: P(forget) 0.47 is inside 0.33 .. 0.56"
    assert outcome_text(without_optional_sets() | {"ended_by": "floor"}) == (
        "floor_reached: a further step would break the floor 0.90; retention on the floor rows is 0.96; "
        "P(forget) 0.47 is above 0.00 .. 0.13"
    )
    late = without_optional_sets() | {"ended_by": "budget", "breaks": {"floor": 2}}
    assert outcome_text(late) == (
        "floor_reached: retention on the floor rows is 0.96; retention fell below the floor 2 times; "
        "P(forget) 0.47 is above 0.00 .. 0.13"
    )
    unsteered = without_optional_sets() | {"retention": 0.8512}
    unsteered["floor"] = {**unsteered["floor"], "final_held": False}
    assert outcome_text(unsteered).startswith(
        "floor_reached: retention on the final rows, which steered nothing, is 0.85, below the floor 0.90"
    )
    guarded = without_optional_sets() | {"breaks": {"guard": 2, "band": 1}}
    assert outcome_text(guarded) == (
        "floor_reached: retention on the floor rows is 0.96; the loss on the guard text grew too much 2 times; "
        "P(forget) 0.47 is above 0.00 .. 0.13"
    )
    assert outcome_text(compression()) == "budget_spent: sparsity 0.302 is all that was to be removed"


def test_a_number_just_outside_the_band_does_not_look_inside() -> None:
    metrics = unlearning()
    metrics["forget"]["after"]["performance"] = 0.5574
    assert outcome_text(metrics).endswith("P(forget) 0.5574 is above 0.3343 .. 0.5571")


def test_a_floor_that_did_not_hold_is_said() -> None:
    metrics = without_optional_sets()
    metrics["floor"] |= {"held": False, "retention": 0.8999}
    assert "retention on the floor rows is 0.8999, below the floor 0.9000" in outcome_text(metrics)


def test_what_was_not_measured_is_said() -> None:
    bare = " ".join(limits(without_optional_sets()))
    assert "No attack was run" in bare and "a tenth of P(forget)" in bare and "no bystander set" in bare
    full = " ".join(limits(unlearning()))
    assert "No attack was run" in full and "tenth" not in full and "no bystander set" not in full


# --- figure


def test_the_course_runs_from_the_untouched_model_to_the_written_one() -> None:
    metrics = unlearning()
    looks = course(metrics, events_of(metrics))
    assert [one.step for one in looks] == [0, 35, 50, 75, 90]
    assert [one.sparsity for one in looks] == [
        0,
        0.1,
        0.3,
        0.3,
        metrics["sparsity"],
    ]  # what was only proposed is not in
    assert looks[0].forget == 0.9731 and looks[-1].forget == 0.4688
    assert looks[0].retention == 1 and looks[-1].retention == metrics["floor"]["retention"]


def test_steps_that_a_resumed_run_took_again_count_once() -> None:
    looks = [
        {"event": "evaluate", "step": step, "sparsity": 0.1, "retention": 0.9} for step in (35, 50, 65, 50, 65, 80)
    ]
    assert [one.step for one in course(compression(), looks)] == [0, 35, 50, 65, 80]


def test_a_state_that_was_rolled_back_is_not_on_the_course() -> None:
    seen = {"event": "evaluate", "step": 60, "sparsity": 0.3, "retention": 0.8}
    back = seen | {"event": "roll_back", "retention": 0.93}
    looks = course(compression(), [seen, back, seen | {"step": 80, "retention": 0.94}])
    assert [(one.step, one.retention) for one in looks[:-1]] == [(0, 1.0), (60, 0.93)]


def test_the_figure_is_a_png_of_1200_by_480(metrics: dict[str, Any], tmp_path: Path) -> None:
    draw_result(metrics, events_of(metrics), tmp_path / "result.png")
    with Image.open(tmp_path / "result.png") as image:
        assert (image.format, image.size) == ("PNG", (1200, 480))


def test_a_run_that_removed_nothing_can_be_drawn(tmp_path: Path) -> None:
    draw_result(compression() | {"sparsity": 0.0}, [], tmp_path / "result.png")
    assert (tmp_path / "result.png").stat().st_size > 0


def controlled(*, broken: list[str]) -> list[dict[str, Any]]:
    """Return the events of a run with intervals; where limits broke, one step was repaired and the next rolled back."""
    look = {"sparsity": 0.1, "retention": 0.95, "retention_interval": [0.92, 0.97], "forget": 0.7}
    worse = look | {"retention": 0.85}
    repair = [{"event": "recover", "step": 35, "broken": [], **look}] if broken else []
    lost = [{"event": "propose", "step": 50, "broken": broken, **worse}, {"event": "roll_back", "step": 50, **look}]
    return [
        {"event": "propose", "step": 35, "broken": broken, **worse},
        *repair,
        {"event": "accept", "step": 35, **look},
        *(lost if broken else []),
        {"event": "stop", "step": 75, "outcome": "target_reached", **look},
    ]


def left_panel(metrics: dict[str, Any], events: list[dict[str, Any]]) -> Axes:
    axes = Figure().subplots()
    draw_course(axes, metrics, events)
    return axes


def marked(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Return step and retention of every mark by its key."""
    lines, names = axes.get_legend_handles_labels()
    return {name: [(float(x), float(y)) for x, y in line.get_xydata()] for line, name in zip(lines, names, strict=True)}


def test_a_broken_limit_is_marked_at_its_step_with_the_retention_it_had() -> None:
    axes = left_panel(unlearning(), controlled(broken=["floor"]))
    assert marked(axes) == {"repaired": [(35, 0.85)], "rolled back": [(50, 0.85)]}
    assert axes.get_legend() is not None


def test_a_run_that_broke_no_limit_has_neither_mark_nor_key() -> None:
    axes = left_panel(unlearning(), controlled(broken=[]))
    assert marked(axes) == {} and axes.get_legend() is None


def test_the_interval_of_retention_is_shaded_where_a_run_has_one() -> None:
    def shades(events: list[dict[str, Any]]) -> list[tuple[float, float]]:
        shapes = left_panel(unlearning(), events).collections
        heights = [shape.get_paths()[0].vertices[:, 1] for shape in shapes]
        return [(one.min(), one.max()) for one in heights]

    events = controlled(broken=[])
    without = [{name: one for name, one in event.items() if name != "retention_interval"} for event in events]
    target = unlearning()["target"]
    assert shades(without) == [(target["low"], target["high"])]
    assert (0.92, 1.0) in shades(events)


def test_a_number_that_is_not_finite_does_not_keep_a_run_from_being_drawn(tmp_path: Path) -> None:
    broken = {"event": "evaluate", "step": 60, "sparsity": 0.3, "retention": "nan", "forget": "inf"}
    lost = {"event": "roll_back", "step": 60, "sparsity": 0.3, "retention": 0.93, "forget": 0.6}
    metrics = unlearning()
    draw_result(metrics, [*events_of(metrics)[:-1], broken, lost], tmp_path / "result.png")
    assert (tmp_path / "result.png").stat().st_size > 0


def test_labels_are_moved_apart_and_no_further() -> None:
    assert spread([0.1, 0.5, 0.9], 0.06, 1.08) == pytest.approx([0.1, 0.5, 0.9])
    assert spread([0.5, 0.5], 0.06, 1.08) == pytest.approx([0.47, 0.53])
    crowded = spread([0.0, 0.0, 1.07, 1.08, 1.08], 0.06, 1.08)
    assert all(high - low >= 0.06 - 1e-9 for low, high in pairwise(crowded))
    assert crowded[0] >= 0.03 and crowded[-1] <= 1.08 + 1e-9


# --- page


class Page(HTMLParser):
    """Collects what a page points to and the picture it carries."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]


def test_the_page_needs_nothing_else(metrics: dict[str, Any], tmp_path: Path) -> None:
    path = write_report(run_folder(tmp_path, metrics))
    text = path.read_text(encoding="utf-8")
    (picture,) = Page(text).links
    assert "http://" not in text and "https://" not in text and "url(" not in text and "<script" not in text
    with Image.open(io.BytesIO(base64.b64decode(picture.removeprefix("data:image/png;base64,")))) as image:
        image.load()
        assert image.size == (1200, 480)
    assert path == tmp_path / "report.html" and not list(tmp_path.glob("*.part"))


def test_the_page_has_every_line_of_the_table_and_no_folder(metrics: dict[str, Any], tmp_path: Path) -> None:
    text = write_report(run_folder(tmp_path, metrics)).read_text(encoding="utf-8")
    for row in result_rows(metrics):
        assert all(f">{cell}<" in text for cell in (row.name, row.before, row.after))
    assert "jane" not in text and str(tmp_path) not in text
    assert "people-llama" in text and "org/people:all:train" in text
    assert "3 &lt;b&gt; rows" in text  # what the files say is text, never markup


def test_the_page_says_how_much_went_from_every_layer() -> None:
    decision = {
        "removals": {"layer": [1, 1], "kind": ["ffn_channel"] * 2, "share": [0.6, 0.8]},
        "kept_by_layer": {"kv_group": [4, 4], "ffn_channel": [20, 18]},
    }
    lines = removed_by_layer(decision, unlearning()["model"]["groups"])
    assert [(one.removed, one.of, one.share) for one in lines["ffn_channel"]] == [
        (0, 20, None),
        (2, 20, pytest.approx(0.7)),
    ]
    assert [(one.removed, one.of) for one in lines["kv_group"]] == [(0, 4), (0, 4)]


def test_a_page_is_made_from_metrics_and_settings_alone(tmp_path: Path) -> None:
    run_folder(tmp_path, unlearning())
    for name in ("decision.json", "reproduce.json", "events.jsonl"):
        (tmp_path / name).unlink()
    assert "How to reproduce" not in write_report(tmp_path).read_text(encoding="utf-8")


def test_an_unfinished_run_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished run") as caught:
        write_report(tmp_path)
    assert "start the run's command again" in caught.value.fix


# --- model card


def front_matter(card: str) -> dict[str, Any]:
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


def test_front_matter_names_the_base_only_when_others_can_get_it(tmp_path: Path) -> None:
    assert front_matter(model_card({"model": "org/base-1B"}, unlearning())) == {
        "base_model": "org/base-1B",
        "library_name": "transformers",
        "tags": ["loraprune", "pruned", "unlearning"],
    }
    for local in (str(tmp_path), f"{HOME}/people-llama", "./base"):
        assert "base_model" not in front_matter(model_card({"model": local}, unlearning()))
    assert front_matter(model_card({"model": "gpt2"}, compression()))["tags"] == ["loraprune", "pruned"]


def test_the_card_has_results_and_changed_settings_but_no_folder(metrics: dict[str, Any]) -> None:
    values = {"model": f"{HOME}/base", "forget": f"{HOME}/forget.jsonl", "output": HOME, "lora_rank": 16, "seed": 0}
    values |= {"guard": f"{HOME}/guard.txt", "original": f"{HOME}/first", "floor_rows": f"{HOME}/floor.jsonl"}
    values |= {"already_forgotten": [f"{HOME}/one.jsonl", f"{HOME}/two.jsonl"]}
    card = model_card(values | {"columns": {"prompt": "question"}, "template": "Q: {prompt} | A:\n"}, metrics)
    for row in result_rows(metrics):
        assert f"| {row.name} | {row.before} | {row.after} |" in card
    assert "| lora_rank | `16` |" in card and "| seed" not in card and "jane" not in card
    assert "| already_forgotten | `one.jsonl, two.jsonl` |" in card and "| guard | `guard.txt` |" in card
    assert "| columns | `prompt=question` |" in card and r"| template | `Q: {prompt} \| A:\n` |" in card
    assert outcome_text(metrics) in card and all(one in card for one in limits(metrics))


def test_the_card_loads_the_model_with_stock_transformers() -> None:
    code = model_card({}, unlearning()).split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert len(code.splitlines()) == 3 and "loraprune" not in code and "trust_remote_code" not in code


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/home/jane/base", "base"),
        ("/home/jane/base/", "base"),
        ("~/data/forget.jsonl", "forget.jsonl"),
        ("data/forget.jsonl", "forget.jsonl"),
        (r"C:\Users\jane\base", "base"),
        ("org/base", "org/base"),
        ("org/set:config:train", "org/set:config:train"),
    ],
)
def test_folders_go_and_hub_names_stay(source: str, name: str) -> None:
    assert local_name(source) == name


def test_folders_go_from_commands_too() -> None:
    command = "loraprune unlearn --model '/home/Jane Doe/base' --retain org/set --forget=/x/jane/forget.jsonl"
    assert without_folders(command) == "loraprune unlearn --model base --retain org/set --forget=forget.jsonl"
    assert without_folders({"/home/jane/a.json": [1, None, "it's /home/jane/b"]}) == {"a.json": [1, None, "it's b"]}
