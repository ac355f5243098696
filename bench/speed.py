"""Speed: what scoring adds to a training step, what the chunked score of a weight takes, what a cut model gains.

Reads    bench/results/demo.json for the part that scoring passes have in a whole run; else models of random weights
Gives    bench/results/speed.json and the section of docs/results.md
Source   -
Symbols  paired: in every round each kind runs once, another one first; ratios are medians over the rounds' own ratios
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from results_page import markdown_table, results_path, write_results
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loraprune.groups import find_groups
from loraprune.mask import LiveMask
from loraprune.memory import traced
from loraprune.objectives import logits_of, retain_loss
from loraprune.records import Mask, ProjectionGroups
from loraprune.sensitivity import adapter_gradient, adapter_importance
from loraprune.settings_file import settings_from
from loraprune.step_scores import StepScores
from loraprune.surgery import cut_config, cut_weights

Values = dict[str, Any]
Kinds = Mapping[str, Callable[[], object]]
Clock = Callable[[], float]
EVERY_STEP, EVERY_TENTH = 0.15, 0.03  # most that scoring may add to a step of the small whole model
RUN_SHARE = 0.15  # most that scoring passes may take of a whole unlearning run
CHUNK_MEMORY, CHUNK_GAIN, CHUNK_LIMIT = 0.05, 8.0, 1.5
PREFILL = 0.85  # of 1 / (1 - x)
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
MIDDLE = {"hidden_size": 640, "intermediate_size": 1728, "num_attention_heads": 10, "num_key_value_heads": 5}


@dataclass(frozen=True)
class Sizes:
    """What is measured in how many rounds; `large` and `middle` by LlamaConfig's names."""

    large: Mapping[str, int]
    middle: Mapping[str, int]
    middle_vocabulary: int = 32_000
    middle_layers: int = 12
    large_tokens: int = 512  # of the one row of a step
    middle_batch: tuple[int, int] = (8, 128)
    layers: int = 2  # of the model that is cut
    prompt: int = 256
    decoded: int = 8
    step_rounds: Mapping[str, int] | None = None
    rounds: int = 7


FULL = Sizes(LARGE, MIDDLE, step_rounds={"large": 3, "middle": 9})
QUICK = Sizes(
    {name: value // 8 if value > 100 else value for name, value in LARGE.items()},
    {name: value // 4 if value > 100 else value for name, value in MIDDLE.items()} | {"num_attention_heads": 10},
    middle_vocabulary=1000,
    middle_layers=2,
    large_tokens=64,
    middle_batch=(2, 32),
    prompt=32,
    step_rounds={"large": 3, "middle": 3},
    rounds=3,
)


def main() -> None:
    """Measure every part and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds, printed, nothing written")
    sizes = QUICK if parser.parse_args().quick else FULL
    torch.set_num_threads(1)
    results = {
        "steps": {name: measure_steps(name, sizes) for name in ("middle", "large")},
        "run": run_shares(),
        "chunk": {name: measure_chunk(sizes, name) for name in ("down_proj", "up_proj")},
        "cut": measure_cut(sizes),
    }
    print(section(results))
    if sizes is FULL:
        write_results("speed", results, section(results))


def in_turns(kinds: Kinds, rounds: int, clock: Clock = perf_counter) -> dict[str, list[float]]:
    """Return each kind's seconds a round by this clock, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds + 1):
        order = list(kinds)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            begun = clock()
            kinds[name]()
            seconds[name].append(clock() - begun)
    return {name: one[1:] for name, one in seconds.items()}


def ratio(seconds: Mapping[str, Sequence[float]], name: str, other: str) -> float:
    """Return the median over the rounds of one kind's seconds to another's."""
    return statistics.median(one / two for one, two in zip(seconds[name], seconds[other], strict=True))


def make_llama(sizes: Mapping[str, int], *, layers: int, vocabulary: int = 512) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config: Any = LlamaConfig(  # pyright: ignore
        **sizes, num_hidden_layers=layers, vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=2048
    )
    return LlamaForCausalLM(config)


# --- a training step with scoring -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """A model with adapters and all that an ordinary LoRA step takes."""

    model: PeftModel
    live: LiveMask
    batch: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer

    def step(self) -> None:
        """Take a step."""
        self._backward()
        self._advance()

    def scored(self, metric: str) -> Callable[[], None]:
        """Return what takes a step and reads its score from the step's own gradients, as the trainer does."""
        scores = StepScores(self.model, self.live, settings_from({"metric": metric, "score_from": "training"}))
        ids = self.batch["input_ids"]

        def run() -> None:
            with scores.watched(len(ids), ids.device):
                self._backward()
            scores.read()
            self._advance()

        return run

    def _backward(self) -> None:
        retain_loss(logits_of(self.model, self.batch), self.batch["labels"]).backward()

    def _advance(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def make_training(model: LlamaForCausalLM, rows: int, length: int) -> Training:
    groups = find_groups(model, model.config)
    of_layers = [one for layers in groups.layers.values() for one in layers]
    names = {one.module.rpartition(".")[2] for layer in of_layers for one in layer.projections}
    adapted: Any = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=sorted(names)))
    ids = torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    trained = [one for one in adapted.parameters() if one.requires_grad]
    return Training(adapted.train(), LiveMask(adapted, groups), batch, torch.optim.AdamW(trained, lr=1e-4))


def measure_steps(name: str, sizes: Sizes) -> Values:
    """Return what scoring adds to the step of one model, in time and in memory."""
    if name == "large":
        model, shape = make_llama(sizes.large, layers=1), (1, sizes.large_tokens)
    else:
        shape = sizes.middle_batch
        model = make_llama(sizes.middle, layers=sizes.middle_layers, vocabulary=sizes.middle_vocabulary)
    parameters, training = sum(one.numel() for one in model.parameters()), make_training(model, *shape)
    kinds: Kinds = {
        "bare": training.step,
        "lora": training.scored("lora"),
        "gate": training.scored("gate"),
    }
    assert sizes.step_rounds is not None
    seconds = in_turns(kinds, sizes.step_rounds[name])
    peaks = {kind: max(traced(run)) for kind, run in kinds.items()}
    return {
        "parameters": parameters,
        "shape": shape,
        "sizes": dict(sizes.large if name == "large" else sizes.middle),
        "layers": model.config.num_hidden_layers,
        "rounds": sizes.step_rounds[name],
        "seconds": {kind: statistics.median(one) for kind, one in seconds.items()},
        "added": {kind: ratio(seconds, kind, "bare") - 1 for kind in ("lora", "gate")},
        "peak_bytes": peaks,
        "extra_bytes": {kind: peaks[kind] - peaks["bare"] for kind in ("lora", "gate")},
    }


def run_shares() -> dict[str, float]:
    """Return what scoring passes added to the demo's whole runs, by seed."""
    runs = json.loads(results_path("demo").read_text(encoding="utf-8"))
    seconds = {seed: one["seconds"] for seed, one in runs.items()}
    return {seed: one["score"] / (one["total"] - one["score"]) for seed, one in seconds.items()}


# --- the chunked score of one weight ----------------------------------------------------------------------------------


def measure_chunk(sizes: Sizes, name: str) -> Values:
    """Return time and memory of metric lora's score of one projection, against what it must not be and what it can."""
    hidden, inner = sizes.large["hidden_size"], sizes.large["intermediate_size"]
    shape = (hidden, inner) if name == "down_proj" else (inner, hidden)
    layer, groups = (
        adapted_layer(name, shape),
        ProjectionGroups(name, "ffn_channel", int(name == "down_proj"), inner, 1),
    )
    weight = layer.get_base_layer().weight.detach()
    kinds: Kinds = {
        "chunked": lambda: adapter_importance(layer, adapter_gradient(layer), groups),
        "materialised": lambda: materialised(layer, groups.axis),
        "sum": lambda: weight.abs().sum(),
    }
    with torch.no_grad():
        exact, seconds = materialised(layer, groups.axis).double(), in_turns(kinds, sizes.rounds)
        off = float(((adapter_importance(layer, adapter_gradient(layer), groups) - exact).abs() / exact).max())
        held = {kind: max(traced(run)) / weight.nbytes for kind, run in kinds.items()}
    return {
        "shape": shape,
        "rounds": sizes.rounds,
        "seconds": {kind: statistics.median(one) for kind, one in seconds.items()},
        "extra_memory": held,
        "gain": ratio(seconds, "materialised", "chunked"),
        "to_sum": ratio(seconds, "chunked", "sum"),
        "relative_difference": off,
    }


def adapted_layer(name: str, shape: tuple[int, int]) -> Any:
    """Return one projection with an adapter of rank 8 that has weights and gradients."""
    torch.manual_seed(0)
    module = nn.Module()
    module.add_module(name, nn.Linear(shape[1], shape[0], bias=False))
    adapted: Any = get_peft_model(module, LoraConfig(r=8, lora_alpha=16, target_modules=[name]))  # type: ignore[arg-type]
    for one in adapted.parameters():
        if one.requires_grad:
            one.data.normal_(std=0.01)
            one.grad = torch.randn_like(one) * 0.01
    return adapted.get_base_model().get_submodule(name)


def materialised(layer: Any, axis: int) -> Tensor:
    """Return the same score as the formula is written: every matrix of it made in full."""
    (a,), (b,) = ([one.weight.detach() for one in part.values()] for part in (layer.lora_A, layer.lora_B))
    gradient, scaling = adapter_gradient(layer), next(iter(layer.scaling.values()))
    estimated = gradient.b @ a + b @ gradient.a
    effective = layer.get_base_layer().weight.detach() + scaling * (b @ a)
    return (estimated * effective).abs().sum(1 - axis)


# --- the cut model ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_cut(sizes: Sizes) -> Values:
    """Return prefill and decoding of a model cut by a quarter and by half, against the dense one in the same round."""
    dense = make_llama(sizes.large, layers=sizes.layers).eval()
    models: dict[str, Any] = {"dense": dense, **{f"{part:.0%}": cut_model(dense, part) for part in (0.25, 0.5)}}
    prompt = torch.randint(512, (1, sizes.prompt), generator=torch.Generator().manual_seed(0))
    prefill = prefill_seconds(models, prompt, sizes.rounds)
    decode = in_turns({name: decoder(one, prompt, sizes.decoded) for name, one in models.items()}, sizes.rounds)
    counts = {name: sum(one.numel() for one in model.parameters()) for name, model in models.items()}
    return {
        "sizes": dict(sizes.large),
        "layers": sizes.layers,
        "prompt": sizes.prompt,
        "decoded": sizes.decoded,
        "rounds": sizes.rounds,
        "models": {
            name: {
                "removed": 1 - counts[name] / counts["dense"],
                "class": type(model).__name__,
                "prefill_seconds": statistics.median(prefill[name]),
                "decode_seconds": statistics.median(decode[name]),
                "prefill": ratio(prefill, "dense", name),
                "decode": ratio(decode, "dense", name),
            }
            for name, model in models.items()
        },
    }


@torch.no_grad()
def prefill_seconds(
    models: Mapping[str, Any], prompt: Tensor, rounds: int, clock: Clock = perf_counter
) -> dict[str, list[float]]:
    """Return the seconds a round in which each model reads the whole prompt, (rows, length), into a cache."""
    return in_turns({name: lambda one=one: one(prompt, use_cache=True) for name, one in models.items()}, rounds, clock)


def cut_model(dense: LlamaForCausalLM, part: float) -> Any:
    """Return the model without this part of every layer's groups, as it would be loaded."""
    groups = find_groups(dense, dense.config)
    kept = {kind: torch.arange(groups.count(kind)) >= round(part * groups.count(kind)) for kind in groups.layers}
    mask = Mask({kind: one.repeat(groups.depth, 1) for kind, one in kept.items()})
    weights = cut_weights({name: one.detach() for name, one in dense.state_dict().items()}, groups, mask)
    model = AutoModelForCausalLM.from_config(cut_config(dense.config, groups, mask))
    model.load_state_dict(weights)
    return model.eval()


def decoder(model: Any, prompt: Tensor, count: int) -> Callable[[], None]:
    """Return what writes `count` tokens more after the prompt, from a cache that grows alike in all models."""
    cache = model(prompt, use_cache=True).past_key_values

    def run() -> None:
        for _ in range(count):
            model(prompt[:, :1], past_key_values=cache, use_cache=True)

    return run


# --- what is shown ----------------------------------------------------------------------------------------------------


def demand(what: str, found: float, limit: float, *, most: bool, text: str = "{:.1%}") -> list[str]:
    """Return one line: what was measured, what is demanded, and whether it is met."""
    met = found <= limit if most else found >= limit
    asked = f"at {'most' if most else 'least'} {text.format(limit)}"
    return [what, text.format(found), asked, "met" if met else "missed"]


def demands(results: Values) -> Iterator[list[str]]:
    """Give every demand beside its figure."""
    added, times = results["steps"]["middle"]["added"], "{:.2f} x"
    for kind in ("lora", "gate"):
        yield demand(f"small whole model: {kind} every step adds", added[kind], EVERY_STEP, most=True)
        yield demand(f"small whole model: {kind} every 10 steps adds", added[kind] / 10, EVERY_TENTH, most=True)
    share = statistics.median(results["run"].values())
    yield demand("scoring passes add to a whole unlearning run", share, RUN_SHARE, most=True)
    for name, one in results["chunk"].items():
        yield demand(f"{name}: extra memory / weight", one["extra_memory"]["chunked"], CHUNK_MEMORY, most=True)
        yield demand(f"{name}: faster than materialising", one["gain"], CHUNK_GAIN, most=False, text=times)
        yield demand(f"{name}: time to summing the weight once", one["to_sum"], CHUNK_LIMIT, most=True, text=times)
    for name, one in results["cut"]["models"].items():
        if name != "dense":
            least = PREFILL / (1 - one["removed"])
            yield demand(f"cut by {name}: prefill faster than dense", one["prefill"], least, most=False, text=times)


def section(results: Values) -> str:
    """Return the section of the results page."""
    steps, cut = results["steps"], results["cut"]
    demanded = markdown_table(("what", "measured", "demanded", ""), list(demands(results)))
    step_header = ("model", "a step, s", "with lora", "with gate", "lora of every 10th", "gate of every 10th")
    step_header += ("extra MiB, lora", "gate", "a step's peak, MiB")
    step_table = markdown_table(step_header, [step_row(one) for one in steps.values()])
    chunk_header = ("projection", "kind", "seconds", "extra memory / weight")
    cut_header = ("cut", "removed", "prefill, s", "dense / cut", "1 / (1 - x)", "decode, s", "dense / cut", "class")
    return "\n\n".join(
        [
            demanded,
            step_table,
            markdown_table(chunk_header, [line for item in results["chunk"].items() for line in chunk_rows(*item)]),
            markdown_table(cut_header, [cut_row(*item) for item in cut["models"].items()]),
            f"float32, 1 thread on {psutil.cpu_count()} cores that other work may have shared. Kinds run in turns, one "
            "round uncounted; ratios are medians over the rounds' own ratios "
            f"({' and '.join(str(one['rounds']) for one in steps.values())} rounds of steps, "
            f"{cut['rounds']} of the others). A step: forward, backward, "
            "AdamW on adapters of rank 8 on all seven projections, without checkpointing; scored from its own "
            "gradients; of every 10th: a tenth of what one scored step adds. Memory: the most bytes alive in tensors, "
            "what a kernel borrows within one operation aside; extra: of a step with scoring less one without. "
            f"Prefill of {cut['prompt']} tokens, decoding of {cut['decoded']} from a cache, one row, "
            f"{cut['layers']} layers. Scoring passes: median over the demo's runs of their seconds over those of "
            "the rest; the look after each of them is for the floor. Made by `python bench/speed.py`.",
        ]
    )


def step_row(one: Values) -> list[str]:
    sizes, (rows, length) = one["sizes"], one["shape"]
    added, mib = one["added"], 2**20
    return [
        f"{one['layers']} layer(s), {sizes['hidden_size']} / {sizes['intermediate_size']}, "
        f"{one['parameters'] / 1e6:.0f} M parameters, {rows} x {length} tokens",
        f"{one['seconds']['bare']:.2f}",
        *(f"{added[kind]:+.1%}" for kind in ("lora", "gate")),
        *(f"{added[kind] / 10:+.1%}" for kind in ("lora", "gate")),
        *(f"{one['extra_bytes'][kind] / mib:,.1f}" for kind in ("lora", "gate")),
        f"{one['peak_bytes']['bare'] / mib:,.0f}",
    ]


def chunk_rows(name: str, one: Values) -> list[list[str]]:
    words = {
        "chunked": "lora, in chunks",
        "materialised": "the formula, materialised",
        "sum": "summing the absolute weight",
    }
    rows, columns = one["shape"]
    return [
        [
            f"{name}, {rows} x {columns}" if kind == "chunked" else "",
            text,
            f"{one['seconds'][kind]:.3f}",
            f"{one['extra_memory'][kind]:.1%}",
        ]
        for kind, text in words.items()
    ]


def cut_row(name: str, one: Values) -> list[str]:
    return [
        name,
        f"{one['removed']:.1%}",
        f"{one['prefill_seconds']:.2f}",
        f"{one['prefill']:.2f}",
        f"{1 / (1 - one['removed']):.2f}",
        f"{one['decode_seconds']:.2f}",
        f"{one['decode']:.2f}",
        one["class"],
    ]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
