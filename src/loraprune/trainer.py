"""Trainer: LoRA on the retain set, pushed off the forget set, with pruning steps in between.

Reads    paired batches, a model with adapters and a mask, the settings
Gives    the same model, pruned and repaired; every metric goes to events.jsonl and to `report_to`
Source   transformers.Trainer; its loop is used as it is
Symbols  main steps: warm-up and pruning; finish steps: recovery on the retain set
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from loraprune.checkpoint import RunState, load_state, resume_optimizer, save_state
from loraprune.data import Example, PairedBatches, batches_by_length, collate
from loraprune.decision import Rules
from loraprune.evaluate import answer_values, measure
from loraprune.mask import LiveMask
from loraprune.metrics import forget_drop, forget_per_retain, retention
from loraprune.objectives import answer_log_probabilities, forget_loss, logits_of, retain_loss, row_sums
from loraprune.progress import Advance, stage
from loraprune.pruning import Record, restore_state, take_state, unlearning_prune
from loraprune.records import DatasetType
from loraprune.schedule import cubic, learning_rate_factor, pruning_round
from loraprune.sensitivity import nonfinite_layers, score_model, update_sensitivity_dict
from loraprune.settings import Settings


@dataclass(frozen=True)
class Target:
    """Where P(forget) is steered: the value, the band around it, and what set it."""

    performance: float
    low: float
    high: float
    source: str

    def way_left(self, performance: float, before: float) -> float:
        """Return how much of the way from `before` down to the target is left, in [0, 1]; 0 at the target and below."""
        if performance <= self.performance:
            return 0.0
        return min(1.0, (performance - self.performance) / (before - self.performance)) if before > performance else 1.0

    def holds(self, performance: float) -> bool:
        return self.low <= performance <= self.high


@dataclass(frozen=True)
class TrainingSets:
    """The tokenised sets of a run; no forget set means plain compression."""

    taught: Sequence[Example]
    floor: Sequence[Example]
    forget: Sequence[Example] | None
    pad_token_id: int

    def scored(self) -> list[tuple[DatasetType, Sequence[Example]]]:
        """Return the sets whose sensitivities decide."""
        sets: list[tuple[DatasetType, Sequence[Example]]] = [("retain", self.taught)]
        return sets if self.forget is None else [*sets, ("forget", self.forget)]


def _show_nothing(steps: int = 1, note: str = "", new_total: int | None = None) -> None:
    """Stand in for a progress bar."""


class LoRAPruneTrainer(Trainer):
    """A transformers.Trainer whose loss is retain + ratio x forget, and that prunes between steps.

    The forget loss of a batch fades with the way that its P has left to the target, so that nothing is pushed below it.
    """

    def __init__(
        self,
        model: PeftModel,
        settings: Settings,
        sets: TrainingSets,
        *,
        live: LiveMask,
        before: Mapping[str, float],
        target: Target | None,
        folder: Path,
        record: Record,
    ) -> None:
        """`before`: P of the untouched model on "floor" and "forget"; a state saved in `folder` is taken up again."""
        self.settings, self.sets, self.live, self.before, self.target = settings, sets, live, before, target
        self.record, self.state_folder = record, folder / "state"
        main = settings.warmup_steps + settings.prune_every * settings.prune_rounds
        self.run_state, self.last_good = load_state(self.state_folder) or (RunState(main_end=main), take_state(model))
        self.first_step, self.note = self.run_state.step, ""
        self.advance: Advance = _show_nothing
        self.clock = monotonic()
        self.base_log_probability = self._untouched_log_probability(model)
        restore_state(model, self.last_good)
        steps = main + settings.finish_steps
        self.adapted = model
        super().__init__(model=model, args=_training_arguments(settings, folder / "logs", steps))
        self.remove_callback(PrinterCallback)
        self.add_callback(_Between(self))

    def _untouched_log_probability(self, model: PeftModel) -> Tensor | None:
        """Return log p of every forget answer under the untouched model, (rows,): adapters off, mask off."""
        if self.sets.forget is None:
            return None
        with self.live.lifted(), model.disable_adapter():
            return answer_values(model, self.sets.forget, **self._pass()).log_probability.float()

    def _pass(self) -> dict[str, Any]:
        return {"batch_size": self.settings.evaluate_batch_size, "pad_token_id": self.sets.pad_token_id}

    def run(self) -> None:
        """Train, prune and recover to the end; a run whose end was saved already is left as it is."""
        self.clock = monotonic()
        with stage("train", self.run_state.main_end + self.settings.finish_steps) as self.advance:
            self.advance(self.first_step)
            if not self._over:
                self.train()

    @property
    def stepper(self) -> Optimizer:
        """The optimizer, once training has made it."""
        assert isinstance(self.optimizer, Optimizer)
        return self.optimizer

    @property
    def _over(self) -> bool:
        return self.run_state.step >= self.run_state.main_end + self.settings.finish_steps

    # --- what Trainer asks for ---------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return batches of both sets; the order is a function of the seed and the step alone."""
        batches = self._paired_from(self.first_step, self.args.max_steps - self.first_step)
        # A generator of its own: else the loader would draw its seed from the random state that a resumed run restored.
        return DataLoader(batches, batch_size=None, shuffle=False, generator=torch.Generator())

    def _paired_from(self, step: int, count: int) -> "_From":
        """Return the batches of `count` steps from a step on."""
        pairs = PairedBatches(
            self.sets.taught,
            self.sets.forget,
            retain_batch_size=self.settings.retain_batch_size,
            forget_batch_size=self.settings.forget_batch_size,
            pad_token_id=self.sets.pad_token_id,
            seed=self.settings.seed,
            length=step + count,
        )
        return _From(pairs, step)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """Return a linear rise, a plateau while pruning, and a linear fall that starts when pruning ends."""

        def factor(step: int) -> float:
            end = self.run_state.main_end
            step += self.first_step
            return learning_rate_factor(step, self.settings.warmup_steps, end, self.settings.finish_steps)

        self.lr_scheduler = LambdaLR(optimizer or self.stepper, factor)
        return self.lr_scheduler

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],  # "retain", and "forget" when there is one: a batch each
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return retain loss + forget_retain_ratio x forget loss of a pair of batches."""
        batch = inputs["retain"]
        logits = logits_of(model, batch)
        loss = retain_loss(logits, batch["labels"])
        if self.run_state.forgetting and "forget" in inputs and self.settings.forget_loss != "none":
            loss = loss + self.settings.forget_retain_ratio * self._forget_loss(model, inputs["forget"])
        return (loss, {"logits": logits}) if return_outputs else loss

    def _forget_loss(self, model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        logits = logits_of(model, batch)
        values, counted = answer_log_probabilities(logits, batch["labels"])
        rows, tokens = row_sums(values, counted), counted.sum(1)
        performance = float((rows.detach() / tokens).exp().mean())
        weight = 1.0 if self.target is None else self.target.way_left(performance, self.before["forget"])
        if weight == 0.0:
            return rows.new_zeros(())
        assert self.base_log_probability is not None
        base = self.base_log_probability.to(rows.device)[batch["rows"]]
        return weight * forget_loss(self.settings.forget_loss, rows, tokens, base, self.settings.forget_loss_beta)

    # --- between steps -----------------------------------------------------------------------------------------------

    def after_step(self) -> bool:
        """Prune or look, as the step asks; return whether the run is over."""
        state, settings = self.run_state, self.settings
        state.step += 1
        now = monotonic()
        state.train_seconds, self.clock = state.train_seconds + now - self.clock, now
        self.advance(1, self.note)
        if state.step <= state.main_end:
            turn = pruning_round(state.step, settings.warmup_steps, settings.prune_every, settings.prune_rounds)
            if turn is not None:
                self._prune(turn)
        elif (state.step - state.main_end) % settings.evaluate_every == 0:
            self._steer()
        if self._over:
            self._finish()
        return self._over

    def _prune(self, turn: int) -> None:
        finite = [self._score(name, one) for name, one in self.sets.scored()]
        if not all(finite):
            return
        state, settings, scored = self.run_state, self.settings, self.run_state.sensitivities
        begun, early = self.live.value.sparsity(self.live.groups), self._early_goal()
        planned = (settings.sparsity or settings.max_sparsity) * cubic(turn, settings.prune_rounds)
        ratio = min(planned, begun + state.largest_step)
        decision = unlearning_prune(
            self.adapted,
            scored.forget.values() if self.sets.forget is not None else None,
            scored.retain.values(),
            settings.unlearning_threshold,
            settings.min_retain_performance,
            retention=lambda: self._retention()[1],
            ratio=ratio,
            repair=self._repair if settings.recovery_steps else None,
            last_good=self.last_good,
            forget_performance=None if early is None else self._forget_performance(),
            forget_goal=early,
            rules=self.rules,
            step=state.step,
            record=self.record,
        )
        state.removals += decision.removals
        state.ended_by = decision.ended_by
        if decision.ended_by in ("floor", "target"):
            state.main_end = state.step
            self.advance(0, new_total=state.main_end + settings.finish_steps)
        state.forgetting = state.step < state.main_end
        gained = self.live.value.sparsity(self.live.groups) - begun
        if decision.removals and decision.ended_by == "budget" and gained < 0.6 * (ratio - begun):
            state.largest_step = gained  # the step was halved at least once
        self._log_metrics("accept" if decision.ended_by != "floor" else "stop")
        if decision.ended_by != "floor":
            self._keep()

    @property
    def rules(self) -> Rules:
        one = self.settings
        return Rules(
            one.unlearning_threshold, one.unlearning_epsilon, one.minimum_forget_sensitivity, one.min_groups_per_layer
        )

    def _early_goal(self) -> float | None:
        """Return the P(forget) at which pruning stops early: only when no sparsity was asked for."""
        return self.target.high if self.target is not None and self.settings.sparsity is None else None

    def _score(self, dataset_type: DatasetType, examples: Sequence[Example]) -> bool:
        """Score one set and average the score in; return whether it was finite, else nothing is pruned at this step."""
        settings, state, begun = self.settings, self.run_state, monotonic()
        sample = score_sample(examples, settings.score_rows, settings.seed)
        new = score_model(
            self.adapted,
            self.live,
            self._batches(sample),
            dataset_type,
            prune_metric=settings.metric,
            loss=settings.score_loss,
            power=settings.score_power,
        )
        broken = nonfinite_layers(new)
        state.sensitivities = update_sensitivity_dict(
            state.sensitivities, new, dataset_type, kept=self.live.value, beta=settings.moving_average
        )
        where = [f"{kind} of layer {layer}" for kind, layer in broken]
        duration = round(monotonic() - begun, 3)
        state.score_seconds += duration
        self.record("score", step=state.step, set=dataset_type, rows=len(sample), non_finite=where, duration=duration)
        return not broken

    def _batches(self, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        device = self.args.device
        return [
            {name: one.to(device) for name, one in collate([examples[i] for i in part], self.sets.pad_token_id).items()}
            for part in batches_by_length(examples, self.settings.evaluate_batch_size)
        ]

    def _repair(self) -> None:
        """Take `recovery_steps` optimizer steps on the retain set alone, with the batches of the steps to come."""
        was, self.run_state.forgetting = self.run_state.forgetting, False
        batches = self._paired_from(self.run_state.step, self.settings.recovery_steps)
        for batch in (batches[index] for index in range(len(batches))):
            self.training_step(self.adapted, batch)
            self.accelerator.clip_grad_norm_(self.adapted.parameters(), self.args.max_grad_norm)
            self.stepper.step()
            self.stepper.zero_grad()
        self.run_state.forgetting = was

    def _steer(self) -> None:
        """Look at both sets during recovery: the forget loss goes on when P(forget) left the band upwards."""
        numbers = self._log_metrics("evaluate")
        holds = numbers["retention"] >= self.settings.min_retain_performance
        if self.target is not None:
            self.run_state.forgetting = holds and numbers["forget"] > (self.target.performance + self.target.high) / 2
        if holds:
            self._keep()

    def _keep(self) -> None:
        """Make the model as it is now the point to come back to, in memory and on disk."""
        self.last_good = take_state(self.adapted)
        save_state(self.state_folder, self.run_state, self.last_good, self.stepper)

    def _finish(self) -> None:
        """Save the end; where it broke the floor, the last good state is the end."""
        if not self._retention()[1] >= self.settings.min_retain_performance:  # NaN breaks the floor too
            restore_state(self.adapted, self.last_good)
            self.record("roll_back", step=self.run_state.step, sparsity=self.live.value.sparsity(self.live.groups))
        self._keep()

    # --- the plan's methods ------------------------------------------------------------------------------------------

    def evaluate_forget_retain(self) -> dict[str, float]:
        """Evaluate the model on both sets: retention on the floor rows, P on them, and P(forget) when there is one."""
        floor, kept = self._retention()
        numbers = {"retain": floor, "retention": kept}
        if self.sets.forget is not None:
            numbers["forget"] = self._forget_performance()
        return numbers

    def _retention(self) -> tuple[float, float]:
        """Return P on the floor rows, and it over P before."""
        floor = measure(self.adapted, self.sets.floor, **self._pass()).performance
        return floor, retention(self.before["floor"], floor)

    def _forget_performance(self) -> float:
        assert self.sets.forget is not None
        return measure(self.adapted, self.sets.forget, **self._pass()).performance

    def compute_unlearning_metrics(self) -> dict[str, float]:
        """Return progress and trade-off now: both performances, sparsity, drop on forget, what it cost on retain."""
        numbers = self.evaluate_forget_retain()
        numbers["sparsity"] = self.live.value.sparsity(self.live.groups)
        if "forget" in numbers:
            drop = forget_drop(self.before["forget"], numbers["forget"])
            numbers["forget_drop"] = drop
            numbers["forget_per_retain"] = forget_per_retain(drop, numbers["retention"])
        return numbers

    def _log_metrics(self, event: str) -> dict[str, float]:
        numbers = self.compute_unlearning_metrics()
        kept = {kind: one.sum(1).tolist() for kind, one in self.live.value.kept.items()}
        self.record(event, step=self.run_state.step, **numbers, groups={kind: sum(one) for kind, one in kept.items()})
        self.log(dict(numbers))
        self.note = "  ".join(f"{name} {numbers[name]:.2f}" for name in ("forget", "retention") if name in numbers)
        return numbers


class _From(Dataset[Any]):
    """A data set from one of its items on."""

    def __init__(self, whole: PairedBatches, first: int) -> None:
        self.whole, self.first = whole, first

    def __len__(self) -> int:
        return len(self.whole) - self.first

    def __getitem__(self, index: int) -> dict[str, dict[str, Tensor]]:
        return self.whole[self.first + index]


class _Between(TrainerCallback):
    """Calls the trainer back between steps; Trainer has no method of its own for that."""

    def __init__(self, trainer: LoRAPruneTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        state.global_step = self.trainer.first_step  # so that a resumed run's steps count on
        if self.trainer.state_folder.exists():
            resume_optimizer(self.trainer.state_folder, self.trainer.stepper)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        control.should_training_stop = self.trainer.after_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        if logs and "loss" in logs:
            kept = {name: float(logs[name]) for name in ("loss", "grad_norm", "learning_rate") if name in logs}
            self.trainer.record("train", step=self.trainer.run_state.step, **kept)


def score_sample(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Return the same sample at every pruning step, so that scores differ by the model alone."""
    if len(examples) <= count:
        return list(examples)
    chosen = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))[:count]
    return [examples[index] for index in sorted(chosen.tolist())]


def _training_arguments(settings: Settings, output: Path, steps: int) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        learning_rate=settings.learning_rate,
        weight_decay=0.0,
        max_grad_norm=settings.max_gradient_norm,
        logging_steps=settings.prune_every,
        save_strategy="no",
        eval_strategy="no",
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=settings.device == "cpu",
        seed=settings.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # Trainer would spread one process over all GPUs by DataParallel
    return arguments
