"""Plan tables: what `loraprune plan` found, for a terminal of 80 columns; never a word of a data set.

Reads    the values of make_plan
Gives    show_plan
Source   -
Symbols  share = S / (1 + S); MiB = 2**20 bytes
"""

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loraprune.progress import duration_text
from loraprune.words import FORMS, Values, percent

AS_LLAMA = ("LlamaForCausalLM", "MistralForCausalLM")
READERS = {
    "stock": (
        "  transformers loads it by AutoModelForCausalLM, without this package",
        "  not run here: vLLM serves uniform widths as any model of the class, llama.cpp as architecture llama",
    ),
    "per_layer": (
        "  transformers loads it by AutoModelForCausalLM with trust_remote_code=True, without this package;",
        "  loraprune.load_pruned loads it without running code from its folder; no further request can start from it",
        "  not run here: vLLM's stock classes have no widths by layer; llama.cpp's architecture deci has",
    ),
}
PARTS = ("weights", "adapters", "optimizer", "activations", "needed", "resident")


def show_plan(values: Values, console: Console) -> None:
    """Print what the run would meet: groups, shares, overlap, checkpoint, memory, time."""
    console.print(groups_table(values["groups"]))
    if values["shares"] is not None:
        console.print(shares_table(values["shares"]))
    _say(console, share_lines(values["shares"]))
    _say(console, scored_lines(values["scored"]))
    _say(console, overlap_lines(values["overlap"]))
    _say(console, checkpoint_lines(values["checkpoint"]))
    console.print(memory_table(values["memory"], values["device"]))
    _say(console, memory_lines(values["memory"]))
    console.print(time_table(values["time"]))
    _say(console, time_lines(values["time"]))


def _say(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(Text(line))


def _table(title: str, columns: Sequence[str], left: int = 1) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place < left else "right", no_wrap=True)
    return table


# --- groups, shares ---------------------------------------------------------------------------------------------------


def groups_table(groups: Values) -> Table:
    """Return a line for every run of layers that have the same groups, and what may go of each kind."""
    title = (
        f"{groups['architecture']}, {groups['total_parameters']:,} parameters, {percent(groups['prunable'])} prunable"
    )
    table = _table(title, ("kind", "layers", "a layer", "parameters of one", "may go", "of all"))
    for kind, one in groups["kinds"].items():
        for number, run in enumerate(one["layers"]):
            total = (f"{one['removable']:,}", percent(one["prunable"])) if number == 0 else ("", "")
            layers = f"{run['first']} - {run['last']}" if run["first"] != run["last"] else str(run["first"])
            table.add_row(kind, layers, f"{run['groups']:,}", f"{run['parameters_per_group']:,}", *total)
    return table


def shares_table(shares: Values) -> Table:
    """Return how many candidates each threshold leaves, as slices and as single groups, and their sparsity."""
    table = _table("candidates: share above the threshold", ("threshold", *_candidate_columns(shares), "sparsity"))
    for row in shares["thresholds"]:
        own = row["threshold"] == shares["threshold"]
        counts = [f"{count:,}" for unit in ("slices", "groups") for count in row[unit].values()]
        cells = [f"{row['threshold']:g}{' (yours)' if own else ''}", *counts, f"{row['sparsity']:.3f}"]
        table.add_row(*cells, style="bold" if own else None)
    return table


def _candidate_columns(shares: Values) -> list[str]:
    short = {"kv_group": "kv", "q_head": "q", "ffn_channel": "ffn"}
    first = shares["thresholds"][0]
    return [f"{short[kind]} {unit}" for unit in ("slices", "groups") for kind in first[unit]]


def share_lines(shares: Values | None) -> list[str]:
    """Return what the counts mean for the run, and what they rest on."""
    if shares is None:
        return ["compression has no candidates: the groups of lowest sensitivity go, whatever it is", ""]
    rows = " and ".join(f"{count} {name} rows" for name, count in shares["rows"].items())
    lines = [f"scored on {rows} of the untouched model, metric {shares['metric']}; shares move as the run trains"]
    if shares["metric"] == "lora":
        lines.append("fresh adapters add nothing (B = 0): metric lora sees a random projection of the gradient here")
    if shares["all_may_go"]:
        lines.append("groups go by difference: to reach the sparsity all may go, whatever their share")
    elif not shares["enough"]:
        lines.append(
            f"warning: threshold {shares['threshold']:g} leaves candidates for sparsity {shares['most']:.3f}, "
            f"--sparsity asks for {shares['asked']:g}: the run would end with no_candidates unless training moves "
            "the shares; lower --unlearning-threshold or --sparsity"
        )
    return [*lines, ""]


def scored_lines(scored: Values) -> list[str]:
    """Return that the run will score otherwise than the plan, where it does."""
    if scored["run_from"] == "passes":
        return []
    return [
        f"the run scores from training's own gradients, at {scored['run_steps']} of its steps; what goes, and with it "
        f"the widths shown below, is by passes over {scored['rows']['retain']} retain rows now; what scoring takes is "
        "part of train below",
        "",
    ]


# --- data, checkpoint -------------------------------------------------------------------------------------------------


def overlap_lines(overlap: Values | None) -> list[str]:
    """Return how far the sets say the same, by numbers of rows."""
    if overlap is None:
        return []
    lines = [f"overlap of forget and retain: {overlap['exact']} equal pairs, {overlap['near']} nearly equal ones"]
    pairs = [(f"{one['forget']} and {one['retain']}", f"{one['containment']:.0%}") for one in overlap["nearest"]]
    lines += [f"  forget and retain row {rows} share {part} of their phrases" for rows, part in pairs]
    return [*lines, ""]


def checkpoint_lines(checkpoint: Values) -> list[str]:
    """Return which form and class the result has, by the attention groups left, and what else can read it."""
    goal, unit, multiple = checkpoint["goal"], checkpoint["attention_unit"], checkpoint["round_to"]
    lines = [
        f"checkpoint: {FORMS[checkpoint['form']]}; pruned at once to sparsity {goal['sparsity']:.3f} it "
        f"would be {goal['class']} with {_span_text(goal[f'{unit}s'])} of {checkpoint[f'{unit}s']} {unit}s and "
        f"{_span_text(goal['ffn_channels'])} ffn_channels a layer"
        + (f", which go by multiples of {multiple} (--round-to)" if multiple > 1 else "")
    ]
    for name, counts in checkpoint["classes"].items():
        lines.append(f"  {name} with {', '.join(map(str, counts))} {unit}s")
    if checkpoint["never"]:
        lines.append(f"  {', '.join(map(str, checkpoint['never']))} {unit}s are never left: no stock class has them")
    return [*lines, *READERS[checkpoint["form"]], ""]


def _span_text(kept: int | list[int]) -> str:
    return f"{kept:,}" if isinstance(kept, int) else f"{kept[0]:,} to {kept[1]:,}"


# --- memory, time -----------------------------------------------------------------------------------------------------


def memory_table(memory: Values, device: str) -> Table:
    """Return what every stage needs at its heaviest step and what the process then holds, in MiB."""
    table = _table(f"memory on {device}, MiB", ("stage", *PARTS))
    for one in memory["stages"]:
        table.add_row(one["stage"], *(_mebibytes(one[part]) for part in PARTS))
    table.add_row("peak", *[""] * (len(PARTS) - 1), _mebibytes(memory["peak"]), style="bold")
    return table


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f}" if count >= 10 * 2**20 else f"{count / 2**20:,.1f}"


def memory_lines(memory: Values) -> list[str]:
    """Return how needed becomes resident."""
    if not memory["process"]:
        return ["resident: what torch has allocated at most, its cache aside", ""]
    return [
        f"resident: the process without a model ({_mebibytes(memory['process'])} MiB), the weights, and the rest as "
        f"the C library holds it: {memory['allocator']:.2f} bytes for one of activations, as measured in small "
        "passes, and not given back when a stage ends",
        "",
    ]


def time_table(time: Values) -> Table:
    """Return how long every stage will take."""
    table = _table("time, as this machine is now", ("stage", "time"))
    for one in time["stages"]:
        table.add_row(one["stage"], duration_text(one["seconds"]))
    table.add_row("total", duration_text(time["total_seconds"]), style="bold")
    return table


def time_lines(time: Mapping[str, float]) -> list[str]:
    """Return what the times assume."""
    return [
        f"assumed: {time['steps']} steps, {time['looks']} looks, no roll-back; a pruning step that breaks a limit "
        f"costs {duration_text(time['one_repair_seconds'])} more for its repair; reading and writing of "
        "files is not counted"
    ]
