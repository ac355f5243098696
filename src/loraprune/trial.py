"""Trial: the run's model and trainer, on which its passes are tried in small before the run.

Reads    Settings, Inputs
Gives    Trial: the sample's sensitivities, and memory and time of every stage as plain values
Source   -
Symbols  goal = a mask such as the run will have at its end
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

from loraprune.adapter import adapter_folder, load_adapter
from loraprune.balance import TrainingSets, joined
from loraprune.batches import score_sample
from loraprune.data import Example
from loraprune.errors import UserError
from loraprune.estimate import (
    AHEAD,
    MOMENTS,
    POINT,
    Cost,
    Held,
    Pass,
    Passes,
    StageMemory,
    passes_over,
    stage_memory,
    trial_counts,
)
from loraprune.inputs import Inputs, earlier_sets
from loraprune.mask import LiveMask
from loraprune.memory import private_bytes, resident_bytes, traced
from loraprune.model import (
    attach_lora,
    base_groups,
    device_of,
    load_base,
    load_model,
    lora_layers,
    pad_token_id,
    weight_shapes,
)
from loraprune.quantised import weight_bytes
from loraprune.records import DatasetType, Mask, Sensitivity
from loraprune.rules import smallest_share
from loraprune.sensitivity import SensitivityDict, nonfinite_layers, update_sensitivity_dict
from loraprune.settings import PLAIN_BITS, Settings
from loraprune.steering import NOT_LOOKED_AT, Ceiling, Probe, Probes, Steering
from loraprune.surgery import cut_weights
from loraprune.trainer import LoRAPruneTrainer

Values = dict[str, Any]
TRIAL_ROWS = 8  # of a pass whose size is not known yet
LOOKS = 2  # at the model in one pruning step that is accepted at once
LOOKS_AT_THE_ENDS = 3  # before the first step, after the last, and with the adapters merged
POINTS = 2  # in memory at once: the one to roll back to, and the model as it is while it is saved


class Trial:
    """A loaded model with fresh adapters, its trainer, and what loading took."""

    def __init__(self, settings: Settings, inputs: Inputs, scratch: Path) -> None:
        """`scratch`: a folder that is thrown away, since a trainer makes one for its logs."""
        self.settings, self.inputs = settings, inputs
        self.process = resident_bytes()
        begun = perf_counter()
        base = load_base(settings.model, settings)
        self.load_seconds = perf_counter() - begun
        self.weights = weight_bytes(base)
        self.groups = base_groups(base, inputs.config, settings.attention_unit)
        self.quantised = settings.base_bits != PLAIN_BITS
        self.plain = self.groups.total_parameters * base.get_input_embeddings().weight.itemsize
        model = attach_lora(base, settings)
        if settings.adapter is not None:
            load_adapter(model, adapter_folder(settings.adapter))
        self.adapters = sum(one.nbytes for one in model.parameters() if one.requires_grad)
        copied = 0 if self.quantised else sum(one.get_base_layer().weight.nbytes for one in lora_layers(model))
        self.copied = copied if device_of(settings).type == "cpu" else 0  # at the end, while adapters are merged
        self.private = private_bytes()
        self.trainer = trial_trainer(settings, inputs, model, LiveMask(model, self.groups), scratch)
        self.passes = Passes(settings, inputs.examples, self.trainer)
        self.sample: dict[DatasetType, list[Example]] = {
            name: score_sample(examples, settings.score_rows, settings.seed)
            for name, examples in self.trainer.sets.scored()
        }
        self.scored_steps = frozenset(  # 0, 1, ...: from their own gradients; none where passes score
            step for step in range(self._main_steps) if self.trainer.step_scores.due(step + 1)
        )
        self.score_seconds = 0.0

    @property
    def smallest_step(self) -> float:
        """Return the smallest step of sparsity that the run can take."""
        return smallest_share(self.groups, self.trainer.rules)

    def score(self) -> SensitivityDict:
        """Return the sensitivities of the run's own sample under fresh adapters."""
        scoring = self.passes.scoring(self.sample)
        ((_, size),) = trial_counts(scoring.footprint(), scoring.counts).items()
        begun, sensitivities = perf_counter(), SensitivityDict()
        for name, examples in self.sample.items():
            new = self.passes.score(name, examples, size)
            _refuse_broken(name, new)
            sensitivities = update_sensitivity_dict(
                sensitivities,
                new,
                name,
                kept=self.trainer.live.value,
                beta=self.settings.moving_average,
                norm=self.settings.score_norm,
            )
        self.score_seconds = perf_counter() - begun
        return sensitivities

    def estimates(self, goal: Mask) -> Values:
        """Return memory and time by stage; the model is merged by this and of no use afterwards."""
        self.trainer.live.set(goal)
        passes = self.trial_passes()
        footprints = {name: one.footprint() for name, one in passes.items()}
        trials = {name: trial_counts(footprints[name], one.counts) for name, one in passes.items()}
        costs = {name: one.cost(trials[name]) for name, one in passes.items()}
        if self.scored_steps:
            costs["read"] = Cost(self.passes.read_seconds(), token=0.0)
        held = self._held(max(footprints[name].peak(trials[name]) for name in passes))
        peaks = {name: footprints[name].peak(one.counts) for name, one in passes.items()}
        begun = perf_counter()
        peaks["export"] = max(traced(self._export(goal)))
        export_seconds = perf_counter() - begun
        return {
            "memory": _memory_values(stage_memory(self._needs(peaks, goal), held), held),
            "time": self._time_values(costs, export_seconds),
        }

    def trial_passes(self) -> dict[str, Pass]:
        """Return the kinds of pass that the run is made of; a look is an evaluation while it trains.

        What scores is a pass over the sample, or of a training step where scores come from training.
        """
        return {
            "evaluate": self.passes.evaluation(self.inputs.examples, adapted=False),
            "look": self.passes.evaluation(self._looked_at(), adapted=True),
            "score": self.passes.training(scored=True) if self.scored_steps else self.passes.scoring(self.sample),
            "train": self.passes.training(),
        }

    def _looked_at(self) -> list[str]:
        return [name for name in self.inputs.examples if name not in NOT_LOOKED_AT]

    # --- memory -------------------------------------------------------------------------------------------------------

    def _held(self, tried: int) -> Held | None:
        """Return what a CPU process holds, once passes of `tried` bytes have been tried; None on a GPU."""
        if device_of(self.settings).type != "cpu":
            return None
        now = private_bytes()
        grown = 0 if now is None or self.private is None else now.grown(self.private)
        return Held(self.process, max(1.0, grown / tried))

    def _export(self, goal: Mask) -> Callable[[], object]:
        """Return what merges and cuts as the run does: of a quantised base the original, in the main memory."""
        self.trainer.live.remove()
        adapted = self.trainer.adapted
        if self.quantised:
            on_cpu = replace(self.settings, device="cpu")
            adapted = attach_lora(load_model(on_cpu.model, on_cpu), on_cpu)

        def merge_and_cut() -> object:
            model: Any = adapted.merge_and_unload()
            return cut_weights({name: one.detach() for name, one in model.state_dict().items()}, self.groups, goal)

        return merge_and_cut

    def _needs(self, peaks: Mapping[str, int], goal: Mask) -> list[Values]:
        """Return what every stage needs at its heaviest, in the order in which the stages begin.

        Of several models one at a time is evaluated; training takes a step before anything is scored. Scores from
        training are read in its steps: there is no stage of them.
        """
        optimizer = (MOMENTS + POINTS * POINT + AHEAD * self.passes.looks_ahead) * self.adapters
        trained = {"weights": self.weights, "adapters": self.adapters, "optimizer": optimizer}
        alone = {"adapters": 0, "optimizer": 0, "activations": peaks["evaluate"]}
        largest, left = max([1.0, *self._other_sizes()]), round((1 - goal.sparsity(self.groups)) * self.plain)
        export = self._written(peaks, left) if self.quantised else {**trained, "activations": peaks["export"]}
        score, train = peaks["score"], max(peaks["train"], peaks["look"] + self.copied)
        return [
            {"stage": "evaluate before", "weights": round(largest * self.plain), **alone},
            {"stage": "train", **trained, "activations": max(train, score) if self.scored_steps else train},
            *([] if self.scored_steps else [{"stage": "score", **trained, "activations": score}]),
            {"stage": "export", **export},
            {"stage": "evaluate after", "weights": left, **alone},
        ]

    def _written(self, peaks: Mapping[str, int], left: int) -> Values:
        """Return what the end of a quantised run needs: the original is cut in main memory, a GPU meets the rest."""
        if device_of(self.settings).type != "cpu":
            return {"weights": left, "adapters": 0, "optimizer": 0, "activations": peaks["look"]}
        return {"weights": self.plain, "adapters": self.adapters, "optimizer": 0, "activations": peaks["export"]}

    def _other_sizes(self) -> list[float]:
        """Return the parameters of each other model that is evaluated before, over those of the model."""
        names = [name for name in (self.settings.reference, self.settings.original) if name]
        counts = [sum(map(prod, weight_shapes(name).values())) for name in names]
        return [count / self.groups.total_parameters for count in counts]

    # --- time ---------------------------------------------------------------------------------------------------------

    def _time_values(self, costs: Mapping[str, Cost], export_seconds: float) -> Values:
        evaluate = self.load_seconds + self._over(costs["evaluate"], list(self.inputs.examples))
        other = self.load_seconds + self._over(costs["evaluate"], ["forget"] if self.settings.is_unlearning else [])
        look, rounds = self._over(costs["look"], self._looked_at()), self.settings.prune_rounds
        sample = costs["look"].seconds(passes_over(self.sample["retain"], self.settings.evaluate_batch_size))
        rescaling = 2 * sample * self.settings.rescale_survivors  # outputs are measured before and after
        stages = {
            "evaluate before": evaluate + other * sum(self._other_sizes()),
            "train": self.load_seconds + self._training_seconds(costs) + self._looks * look + rounds * rescaling,
            **({} if self.scored_steps else {"score": rounds * self.score_seconds}),
            "export": export_seconds,
            "evaluate after": evaluate,
        }
        steps = self.passes.step_tokens[: self.settings.recovery_steps]
        repair = joined(self.passes.of_step(one, ["retain"]) for one in steps)
        return {
            "stages": [{"stage": name, "seconds": round(one, 3)} for name, one in stages.items()],
            "total_seconds": round(sum(stages.values()), 3),
            "steps": len(self.passes.step_tokens),
            "looks": self._looks,
            "one_repair_seconds": round(costs["train"].seconds(repair) + look, 3),
        }

    def _over(self, cost: Cost, names: Sequence[str]) -> float:
        """Return the seconds of one evaluation of some sets."""
        size = self.settings.evaluate_batch_size
        return sum(cost.seconds(passes_over(self.inputs.examples[name], size)) for name in names)

    def _training_seconds(self, costs: Mapping[str, Cost]) -> float:
        """Return the seconds of all training steps, each with its forget loss."""
        plain: list[float] = []
        scored: list[float] = []
        for number, tokens in enumerate(self.passes.step_tokens):
            passes = self.passes.of_step(tokens, self.passes.taken_back)
            (scored if number in self.scored_steps else plain).extend(passes)
        seconds = costs["train"].seconds(plain)
        if not scored:
            return seconds
        read = costs["read"].each  # once a step, and in the cost of a scored pass once each
        without = replace(costs["score"], each=max(0.0, costs["score"].each - read))
        return seconds + without.seconds(scored) + read * len(self.scored_steps)

    @property
    def _main_steps(self) -> int:
        """Return the training steps until the last pruning step."""
        return self.settings.warmup_steps + self.settings.prune_every * self.settings.prune_rounds

    @property
    def _looks(self) -> int:
        one = self.settings
        return LOOKS * one.prune_rounds + one.finish_steps // one.evaluate_every + LOOKS_AT_THE_ENDS


def _refuse_broken(name: str, score: Sensitivity) -> None:
    """Raise UserError where a score is not finite: of the untouched model, so that the run would never prune."""
    if broken := nonfinite_layers(score):
        kind, layer = broken[0]
        raise UserError(
            f"the score of the {name} set is not finite in {len(broken)} places, the first in {kind} of layer {layer}.",
            "the run leaves such scores out, and here it is the untouched model's: nothing could be pruned.",
            "set --dtype float32 or bfloat16, or check the weights.",
        )


def trial_trainer(settings: Settings, inputs: Inputs, model: Any, live: LiveMask, scratch: Path) -> LoRAPruneTrainer:
    """Return the run's own trainer, with the forget loss at full weight, and passes of few rows while it is made."""
    examples, pad = inputs.examples, pad_token_id(inputs.tokenizer)
    earlier = tuple(examples[name] for name in earlier_sets(settings))
    sets = TrainingSets(inputs.trained, examples.get("forget"), pad, earlier)
    careful = replace(settings, evaluate_batch_size=min(TRIAL_ROWS, settings.evaluate_batch_size), report_to=())
    nobody = Probes(Probe((), ()), (), pad, careful.evaluate_batch_size)  # the trial takes no look of the trainer's
    steering = Steering(nobody, ceilings=tuple(Ceiling(0.0, 0.0) for _ in earlier))
    return LoRAPruneTrainer(
        model, careful, sets, live=live, steering=steering, folder=scratch, event=lambda kind, **values: None
    )


def _memory_values(stages: Sequence[StageMemory], held: Held | None) -> Values:
    return {
        "stages": [asdict(one) | {"needed": one.needed} for one in stages],
        "peak": max(one.resident for one in stages),
        "process": held.process if held else 0,
        "allocator": held.allocator if held else 1.0,
    }
