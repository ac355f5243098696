"""Harness: tasks of lm-evaluation-harness, WMDP and MMLU among them, on the settings' model.

Reads    names of its tasks, or of tasks in a folder of the user's
Gives    run_harness
Source   lm-evaluation-harness, which asks, scores and averages; only the model is handed over
Symbols  -
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from scipy.stats import norm

from loraprune.errors import UserError, nearest
from loraprune.folder import write_json
from loraprune.interval import CONFIDENCE
from loraprune.log_aggregates import Entry
from loraprune.model import check_machine, checked_config, load_model, load_tokenizer, quiet_libraries
from loraprune.settings import Settings

if TYPE_CHECKING:
    from loraprune.benchmark import Request


def run_harness(settings: Settings, request: "Request") -> dict[str, Entry]:
    """Return every metric of the tasks as "task metric"; written to LM_EVAL_SUMMARY.json where there is a folder.

    Raises UserError where lm-eval is not installed or has no such task.
    """
    manager = _imported("lm_eval.tasks").TaskManager(include_path=request.data)
    tasks = [one.strip() for one in request.split.split(",") if one.strip()]
    _refuse_unknown(tasks, manager.all_tasks)
    check_machine(settings)
    with quiet_libraries():
        results = _evaluate(settings, tasks, manager)
    found = dict(_entries(results))
    if request.output is not None:
        request.output.mkdir(parents=True, exist_ok=True)
        write_json(request.output / "LM_EVAL_SUMMARY.json", found)
    return found


def _imported(name: str) -> Any:
    try:
        return import_module(name)  # an extra: a type checker may not find it either
    except ImportError:
        raise UserError(
            "lm-eval is not installed.",
            "its tasks (WMDP, MMLU and others) are asked and scored by it.",
            "pip install 'loraprune[bench]'.",
        ) from None


def _refuse_unknown(tasks: Sequence[str], known: Sequence[str]) -> None:
    for task in tasks:
        if task not in known:
            close = nearest(task, known)
            raise UserError(
                f"lm-eval has no task {task}.",
                f"it knows {len(known)} tasks, those of the folder in --data included.",
                f"did you mean {close}?" if close else "name another, or the folder of your own tasks with --data.",
            )


def _evaluate(settings: Settings, tasks: Sequence[str], manager: Any) -> Mapping[str, Any]:
    checked_config(settings.model, settings)
    tokenizer: Any = load_tokenizer(settings.model, settings)
    model = load_model(settings.model, settings).eval()
    huggingface = _imported("lm_eval.models.huggingface")
    subject = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.evaluate_batch_size)
    seed = settings.seed
    results = _imported("lm_eval").simple_evaluate(
        model=subject,
        tasks=list(tasks),
        task_manager=manager,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert results is not None  # only processes other than the first get nothing
    return results


def _entries(results: Mapping[str, Any]) -> Iterator[tuple[str, Entry]]:
    for task, values in results["results"].items():
        for key, value in values.items():
            name, _, chosen = key.partition(",")
            if chosen and not name.endswith("_stderr") and isinstance(value, int | float):
                error = values.get(f"{name}_stderr,{chosen}")
                kind = name if chosen == "none" else f"{name} ({chosen})"
                yield f"{task} {kind}", _entry(float(value), _rows(task, results), error)


def _entry(value: float, rows: int, error: Any) -> Entry:
    entry: Entry = {"agg_value": value, "rows": rows, "interval": None, "note": "lm-eval states no standard error"}
    if isinstance(error, int | float):
        reach = float(norm.ppf((1 + CONFIDENCE) / 2)) * error
        entry |= {"interval": [value - reach, value + reach], "note": "interval from lm-eval's standard error"}
    return entry


def _rows(task: str, results: Mapping[str, Any]) -> int:
    """Return how many rows a task, or all tasks of a group, were asked."""
    parts = results.get("group_subtasks", {}).get(task, [])
    own = results["n-samples"].get(task, {}).get("effective", 0)
    return own or sum(_rows(part, results) for part in parts)
