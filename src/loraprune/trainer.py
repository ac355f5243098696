"""Trainer: LoRA on the retain set, pushed off the forget set, with pruning steps in between.

Reads    paired batches, a model with adapters and a mask, the settings
Gives    the same model, pruned and repaired; every metric goes to events.jsonl and to `report_to`
Source   transformers.Trainer; its loop is used as it is
Symbols  main steps: warm-up and pruning; finish steps: recovery, with the same loss and nothing pruned, and with main
         steps that a limit left over while the forget set is still known
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from math import inf, isfinite
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback

from loraprune.balance import Balance, TrainingSets, joined
from loraprune.batches import PairedBatches, score_sample
from loraprune.checkpoint import (
    Point,
    RunState,
    SavedRun,
    load_state,
    moments_of,
    restore_moments,
    restore_random,
    save_state,
)
from loraprune.data import Example, batches_by_length, collate, on_device
from loraprune.launch import here
from loraprune.mask import LiveMask, full_mask
from loraprune.metrics import forget_drop, forget_per_retain
from loraprune.model import merged, takes_adapters_in
from loraprune.processes import first_does, sum_gradients, summed
from loraprune.progress import Advance, show_nothing, stage
from loraprune.pruning import ModelState, restore_state, take_state, unlearning_prune
from loraprune.records import DatasetType, Decision, Limit, Look, Mask, Sensitivity
from loraprune.rescale import rescaled
from loraprune.rules import Rules
from loraprune.schedule import learning_rate_factor, planned_sparsity
from loraprune.scoring import as_asked, score_model
from loraprune.sensitivity import nonfinite_layers, update_sensitivity_dict
from loraprune.settings import Settings
from loraprune.steering import Limits, Steering, first_acceptable, take_look
from loraprune.step_scores import StepScores
from loraprune.training_arguments import training_arguments

Event = Callable[..., None]  # event("accept", step=3, retention=0.9): one line of events.jsonl


class LoRAPruneTrainer(Trainer):
    """A transformers.Trainer whose loss is retain + ratio x forget, and that prunes between steps.

    The forget loss of a batch fades with the way that its P has left to the target, and pulls up what is below it;
    sets of earlier requests are pushed down as soon as they rise above where they rest. A step whose gradient is not
    finite is left out and counted.
    """

    def __init__(
        self,
        model: PeftModel,
        settings: Settings,
        sets: TrainingSets,
        *,
        live: LiveMask,
        steering: Steering,
        folder: Path,
        event: Event,
    ) -> None:
        """`event` takes what happens; a state saved in `folder` is taken up again."""
        self.settings, self.sets, self.live, self.steering = settings, sets, live, steering
        self.event, self.state_folder = event, folder / "state"
        main = settings.warmup_steps + settings.prune_every * settings.prune_rounds
        fresh = Point(take_state(model), {})
        end = main + settings.finish_steps
        self.saved = load_state(self.state_folder) or SavedRun(RunState(main_end=main, end=end), fresh, fresh, {})
        self.run_state, self.good = self.saved.run_state, self.saved.good
        self.first_step, self.note = self.run_state.step, ""
        self.advance: Advance = show_nothing
        self.repairing = False
        self.undone_by: set[Limit] = set()  # what undid the pruning step that is being tried, but for lack of room
        self.clock = monotonic()
        self.balance = Balance(model, settings, sets, live, steering)
        self.step_scores = StepScores(model, live, settings)
        restore_state(model, self.saved.now.state)
        self.adapted = model
        arguments = training_arguments(settings, folder / "logs", end)
        super().__init__(model=model, args=arguments)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Between(self))

    def run(self) -> None:
        """Train, prune and recover to the end; a run whose end was saved already is left as it is."""
        self.clock = monotonic()
        if self.run_state.good_look is None:
            self.run_state.good_look = self._look()
            self.record("evaluate", self.run_state.good_look)
        with stage("train", self.run_state.end) as self.advance:
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
        return self.run_state.step >= self.run_state.end

    # --- what Trainer asks for ---------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return batches of both sets; the order is a function of the seed and the step alone."""
        batches = self._paired(self.first_step, self.args.max_steps)
        # A generator of its own: else the loader would draw its seed from the random state that a resumed run restored.
        return DataLoader(batches, batch_size=None, shuffle=False, generator=torch.Generator())

    def _paired(self, first: int, end: int) -> PairedBatches:
        """Return the batches from one step to before another."""
        return PairedBatches(
            self.sets.taught,
            self.sets.forget,
            joined(self.sets.already_forgotten),
            retain_batch_size=self.settings.retain_batch_size,
            forget_batch_size=self.settings.forget_batch_size,
            pad_token_id=self.sets.pad_token_id,
            seed=self.settings.seed,
            steps=range(first, end),
            group_by_length=self.settings.group_by_length,
        )

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """Return a linear rise, a plateau while pruning, and a linear fall that starts when pruning ends."""

        def factor(step: int) -> float:
            state = self.run_state
            step += self.first_step
            return learning_rate_factor(step, self.settings.warmup_steps, state.main_end, state.end - state.main_end)

        self.lr_scheduler = LambdaLR(optimizer or self.stepper, factor)
        return self.lr_scheduler

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],  # "retain", and "forget" and "already_forgotten" where there are: a batch each
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return retain loss + forget_retain_ratio x what pushes the forget sets down, of a batch of each set.

        All at the adapters as they are; a step whose forget loss looks ahead takes back other losses, `Balance.parts`.
        """
        loss, logits = self.balance.loss(
            model, inputs, forgetting=self.run_state.forgetting, forget_weight=self.run_state.forget_weight
        )
        return (loss, {"logits": logits}) if return_outputs else loss

    def training_step(
        self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Take one step forward and back, in passes of `micro_batch_size` rows where that is set; return its loss.

        A forget loss that looks ahead has passes of its own for each half of its batch, of those rows at most.
        A step that is scored leaves what the metric reads. The gradient is that of the whole batch in any size of pass
        and in any number of processes, but for dropout, which draws anew in every pass.
        """
        size, rows = self.settings.micro_batch_size, len(inputs["retain"]["input_ids"])
        fits = size is None or size >= max(len(one["input_ids"]) for one in inputs.values())
        if fits and here().count == 1 and not self.balance.looks_ahead(self.run_state.forgetting):
            with self._watched(rows):
                loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = self._step_in_parts(model, inputs, size)
        if self._scored_now and self.accelerator.sync_gradients:
            self.step_scores.take_frozen()
        return loss

    def _step_in_parts(self, model: torch.nn.Module, inputs: Any, size: int | None) -> Tensor:
        model.train()
        state, total = self.run_state, torch.zeros((), device=self.args.device)
        ends: Any = {"forgetting": state.forgetting, "forget_weight": state.forget_weight}
        for part in self.balance.parts(model, self._prepare_inputs(inputs), size, **ends):
            with self._watched(part.rows):
                loss = part.loss()
                self.accelerator.backward(loss)
            total += loss.detach()
        sum_gradients(self.adapted)
        summed([total])
        return total

    def _watched(self, rows: int) -> AbstractContextManager[None]:
        """Let a pass of so many rows leave what the metric reads, where the step is scored."""
        return self.step_scores.watched(rows, self.args.device) if self._scored_now else nullcontext()

    @property
    def _scored_now(self) -> bool:
        """Say whether the step under way is scored: not those of a repair, and none once pruning is over."""
        state = self.run_state
        return not self.repairing and state.step < state.main_end and self.step_scores.due(state.step + 1)

    # --- between steps -----------------------------------------------------------------------------------------------

    def after_step(self) -> bool:
        """Prune or look, as the step asks; return whether the run is over."""
        self.run_state.step += 1
        self._count_seconds()
        self.advance(1, self.note)
        acted = self._act()
        if self._over:
            self._finish()
        if acted or self._over:
            self._count_seconds()
            first_does(lambda: save_state(self.state_folder, self.run_state, self._point(), self.good))
        return self._over

    def _count_seconds(self) -> None:
        now = monotonic()
        self.run_state.train_seconds += now - self.clock
        self.clock = now

    def _act(self) -> bool:
        """Prune or look where the step asks for it; return whether it did."""
        state, settings = self.run_state, self.settings
        if state.step <= state.main_end:
            planned = planned_sparsity(state.step, settings)
            if planned is not None:
                self._prune(planned)
            return planned is not None
        due = (state.step - state.main_end) % settings.evaluate_every == 0
        if due:
            self._steer()
        return due

    def before_step(self) -> None:
        """Leave this step out where a gradient is not finite: one bad batch must not spoil the adapters."""
        if self._scored_now and (broken := self._average(self.step_scores.read(), "retain")):
            reason = f"the score was not finite: {', '.join(broken)}"
            self.event("skip", step=self.run_state.step + 1, reason=reason)
        gradients = (one.grad for one in self.adapted.parameters() if one.grad is not None)
        if not all(bool(one.isfinite().all()) for one in gradients):
            self._skip(self.run_state.step + 1)

    def _skip(self, step: int) -> None:
        self.adapted.zero_grad(set_to_none=True)  # the optimizer passes over weights without a gradient
        self.run_state.skipped += 1
        self.event("skip", step=step, reason="the gradient was not finite")

    def _prune(self, planned: float) -> None:
        begun, passes = monotonic(), self.settings.score_from == "passes"
        pushed, self.run_state.forgetting = self.run_state.forgetting, True  # a wait may have switched it off till now
        unread = {name: self._score(name, one) for name, one in self.sets.scored()} if passes else {}
        scored = monotonic()
        looked = self._look()
        took = {"duration": round(scored - begun, 3), "look_duration": round(monotonic() - scored, 3)}
        rows = {name: min(len(one), self.settings.score_rows) for name, one in self.sets.scored() if passes}
        self.run_state.score_seconds += took["duration"]
        self.record("score", looked, rows=rows, non_finite=joined(unread.values()), **took)
        if any(unread.values()) or self.run_state.sensitivities.retain.totals is None:
            return
        if not self.steering.limits.broken(looked):
            self._hold(looked)
        if not self._wait(looked, pushed):
            self._follow(self._step_of(planned, looked), looked)

    def _wait(self, looked: Look, pushed: bool) -> bool:
        """Leave a model that forgetting brought below a floor to mend, to be cut later; return whether it was left so.

        A roll-back would lose what was forgotten. While the forget set is still known, and in the first half of the
        steps before recovery, the push goes on: it fades, and training mends what it cost. Else it is off until the
        next look; a model that is below a floor even then (`pushed` is False) does not wait again. Nor does one that
        was below it from the first look on with most of its way still to go, or in the second half of these steps: it
        begins anew with half of the push.
        """
        state, known, broken = self.run_state, self._is_still_known(looked), self.steering.limits.broken(looked)
        early = state.step <= state.main_end / 2
        worth_it = state.began_well or (early and self.steering.past_half_way(looked))
        if not pushed or not worth_it or not self._may_mend(looked):
            return False
        state.forgetting = known and early
        state.lacks_room |= known and "floor" in broken
        self.record("wait", looked, broken=broken, forgetting=state.forgetting)
        return True

    def _may_mend(self, looked: Look) -> bool:
        """Say whether forgetting may have brought the model below a floor, and a cut can wait for a later step."""
        state, settings = self.run_state, self.settings
        if self.steering.target is None or not settings.pushes_down or self.steering.acceptable(looked):
            return False
        later = range(state.step + 1, state.main_end + 1)
        return any(planned_sparsity(step, settings) is not None for step in later)

    def _step_of(self, planned: float, looked: Look) -> Decision:
        """Take one pruning step, as far as the schedule and the steps before it allow."""
        state, settings, scored = self.run_state, self.settings, self.run_state.sensitivities
        return unlearning_prune(
            self.adapted,
            scored.forget.values() if self.sets.forget is not None else None,
            scored.retain.values(),
            settings.unlearning_threshold,
            settings.min_retain_performance,
            look=self._look,
            ratio=min(planned, looked.sparsity + state.largest_step),
            limits=self._limits,
            repair=self._repair if settings.recovery_steps else None,
            roll_back=self._roll_back,
            looked=looked,
            forget_performance=looked.forget,
            forget_goal=self._early_goal(),
            rules=self.rules,
            step=state.step,
            rescale=self._rescaled if settings.rescale_survivors else None,
            record=self.record,
        )

    @property
    def _limits(self) -> Limits:
        """Return the limits of cuts: where forgetting once had too little room, it needs it at every P(forget)."""
        limits = self.steering.limits
        always = self.run_state.lacks_room and limits.forget_high is not None
        return replace(limits, forget_high=-inf) if always else limits

    def _rescaled(self, mask: Mask) -> Mask:
        """Return the mask with factors measured on the retain rows that are scored."""
        return rescaled(self.adapted, self.live, mask, self._sample_of(self.sets.taught))

    def _follow(self, decision: Decision, looked: Look) -> None:
        """Take over what a pruning step decided; one that had to be undone makes the run gentler.

        So does forgetting, if the model broke a limit before the cut; else it is the cut that was too much.
        """
        state, tried_again = self.run_state, bool(self.undone_by)
        if decision.look is not None:
            gained = decision.look.sparsity - (state.good_look.sparsity if state.good_look else 0.0)
            if tried_again and decision.removals:
                state.largest_step = gained
            self._hold(decision.look)
        if tried_again and self.steering.limits.broken(looked):
            state.forget_weight /= 2
        state.removals += decision.removals
        state.ended_by = decision.ended_by
        if decision.look is None or decision.ended_by == "target":
            left, state.main_end = state.main_end - state.step, state.step
            if not self._is_still_known(state.good_look):
                state.end -= left
                self.advance(0, new_total=state.end)
        self.undone_by = set()

    def _is_still_known(self, looked: Look | None) -> bool:
        """Say whether forgetting has a way to go: the forget set is pushed down, and P is above its band."""
        target = self.steering.target
        if target is None or looked is None or not self.settings.pushes_down:
            return False
        return (looked.forget or 0.0) > target.high

    @property
    def rules(self) -> Rules:
        return Rules.of(self.settings)

    def _early_goal(self) -> float | None:
        """Return the P(forget) at which pruning stops early: only when no sparsity was asked for."""
        target = self.steering.target
        return target.high if target is not None and self.settings.sparsity is None else None

    def _score(self, dataset_type: DatasetType, examples: Sequence[Example]) -> list[str]:
        """Score one set and average the score in; return where it was not finite: then nothing is pruned now."""
        how = as_asked(self.settings)
        new = score_model(self.adapted, self.live, self._sample_of(examples), dataset_type, **how)
        return self._average(new, dataset_type)

    def _average(self, new: Sensitivity, dataset_type: DatasetType) -> list[str]:
        """Average one score in; return where it was not finite: then it is left out."""
        settings, state = self.settings, self.run_state
        agreed = first_does(lambda: new)  # to the last digit: else processes could decide differently
        state.sensitivities = update_sensitivity_dict(
            state.sensitivities,
            agreed,
            dataset_type,
            kept=self.live.value,
            beta=settings.moving_average,
            norm=settings.score_norm,
        )
        return [f"{kind} of layer {layer}, {dataset_type}" for kind, layer in nonfinite_layers(agreed)]

    def _sample_of(self, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        """Return the batches of the rows of a set that are scored."""
        examples = score_sample(examples, self.settings.score_rows, self.settings.seed)
        device = self.args.device
        return [
            on_device(collate([examples[i] for i in part], self.sets.pad_token_id), device)
            for part in batches_by_length(examples, self.settings.evaluate_batch_size)
        ]

    def _repair(self) -> int:
        """Take `recovery_steps` optimizer steps without the forget loss, on the batches of the steps to come."""
        was, self.run_state.forgetting = self.run_state.forgetting, False
        self.repairing = True
        step = self.run_state.step
        batches = self._paired(step, step + self.settings.recovery_steps)
        for batch in (batches[index] for index in range(len(batches))):
            self.training_step(self.adapted, batch)
            norm = self.accelerator.clip_grad_norm_(self.adapted.parameters(), self.args.max_grad_norm)
            if norm is not None and not isfinite(float(norm)):
                self._skip(self.run_state.step)
            self.stepper.step()
            self.stepper.zero_grad()
        self.run_state.forgetting, self.repairing = was, False
        return len(batches)

    def _steer(self) -> None:
        """Look at the model during recovery: the forget loss stays on, and is off while the model breaks a floor."""
        looked = self._look()
        self.record("evaluate", looked, broken=self.steering.limits.broken(looked))
        self.run_state.forgetting = self.steering.acceptable(looked)
        if self._better(looked):
            self._hold(looked)

    def _better(self, looked: Look) -> bool:
        """Say whether the model may be written and is no further from the band than at the point to roll back to."""
        good, steering = self.run_state.good_look, self.steering
        return steering.acceptable(looked) and (good is None or steering.distance(looked) <= steering.distance(good))

    def _hold(self, looked: Look) -> None:
        """Make the model as it is now the point to roll back to."""
        self.good, self.run_state.good_look, self.run_state.began_well = self._point(), looked, True

    def _point(self) -> Point:
        return Point(take_state(self.adapted), moments_of(self.stepper))

    def _roll_back(self) -> Look:
        """Go back to the last good point, optimizer included, and return what was seen there."""
        assert self.run_state.good_look is not None  # the first look is taken before the first step
        self._go_to(self.good)
        return self.run_state.good_look

    def _go_to(self, point: Point) -> None:
        restore_state(self.adapted, point.state)
        restore_moments(self.stepper, point.moments)

    def _finish(self) -> None:
        """End at the best point that keeps its limits with the adapters merged, as it will be written.

        That is the model now, else the last good one, else the one to start from, which keeps them by definition. A
        base that takes no adapters in leaves the choice for afterwards: of `ends`, in the original.
        """
        looked, now = self._look(), self._point()
        better, untouched = self._better(looked), self._untouched()
        broken = self.steering.limits.broken(looked) or ("band",)  # where none is, it is further from the band
        if not takes_adapters_in(self.settings):
            if not better:
                self._go_to(self.good)
                self.record("roll_back", self._look(), broken=broken, tried=looked.sparsity)
            return
        ends = [now, self.good, untouched] if better else [self.good, untouched]
        self.good, found, last_broken = first_acceptable(ends, self._merged_look, self.steering)
        self.run_state.good_look, broken = found, last_broken or broken
        if self.good is untouched:
            self.run_state.removals, self.run_state.ended_by = [], broken[0]
        if self.good is not now:
            self.record("roll_back", found, broken=broken, tried=looked.sparsity)

    def _merged_look(self, point: Point) -> Look:
        self._go_to(point)
        with merged(self.adapted):
            return self._look()

    def ends(self) -> list[ModelState]:
        """Return what may be written of a run that is over, the best first: now, the last good, the untouched."""
        now, good = take_state(self.adapted), self.good.state
        return [now, *([] if now.equals(good) else [good]), self._untouched().state]

    def _untouched(self) -> Point:
        """Return the model to start from: nothing masked, adapters that add nothing."""
        trained = take_state(self.adapted).trained
        nothing = {name: torch.zeros_like(one) if "lora_B" in name else one for name, one in trained.items()}
        return Point(ModelState(full_mask(self.live.groups), nothing), {})

    # --- the plan's methods ------------------------------------------------------------------------------------------

    def evaluate_forget_retain(self) -> dict[str, float]:
        """Evaluate the model on both sets: retention on the floor rows, P on them, and P(forget) when there is one."""
        looked = self._look()
        numbers = {"retain": self._retain_of(looked), "retention": looked.retention}
        return numbers if looked.forget is None else {**numbers, "forget": looked.forget}

    def _retain_of(self, looked: Look) -> float:
        """Return P on the floor rows."""
        before = self.steering.probes.floor_before
        return looked.retention * sum(before) / len(before)

    def compute_unlearning_metrics(self, looked: Look | None = None) -> dict[str, float]:
        """Return progress and trade-off now: the look's numbers, the drop on forget, what it cost on retain."""
        looked = looked or self._look()
        numbers = {"retain": self._retain_of(looked), **_flat(looked.as_values())}
        if looked.forget is not None and self.steering.forget_before is not None:
            drop = forget_drop(self.steering.forget_before, looked.forget)
            numbers["forget_drop"] = drop
            numbers["forget_per_retain"] = forget_per_retain(drop, looked.retention)
        return numbers

    def _look(self) -> Look:
        return take_look(self.adapted, self.live, self.steering.probes)

    def record(self, kind: str, look: Look, **values: Any) -> None:
        """Write one line of events.jsonl; its numbers also go to `report_to` and, in short, to the progress bar."""
        if kind == "roll_back":
            self.undone_by |= {*values["broken"]} - {"room"}
        if kind in ("wait", "roll_back", "evaluate"):  # a repair that healed a break held nothing back
            for name in values.get("broken", ()):
                self.run_state.breaks[name] = self.run_state.breaks.get(name, 0) + 1
        self.event(kind, **{"step": self.run_state.step, **look.as_values(), **values})
        self.log(self.compute_unlearning_metrics(look))
        shown = {"forget": look.forget, "retention": look.retention}
        self.note = "  ".join(f"{name} {value:.2f}" for name, value in shown.items() if value is not None)


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, float]:
    """Return nested numbers under names such as "groups/kv_group/0", as tools that draw curves want them."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{name}/")
        elif isinstance(value, tuple):
            flat |= _flat(dict(zip(map(str, range(len(value))), value, strict=True)), f"{above}{name}/")
        else:
            flat[above + name] = value
    return flat


class _Between(TrainerCallback):
    """Calls the trainer back between steps; Trainer has no method of its own for that."""

    def __init__(self, trainer: LoRAPruneTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        state.global_step = self.trainer.first_step  # so that a resumed run's steps count on
        restore_moments(self.trainer.stepper, self.trainer.saved.now.moments)
        restore_random(self.trainer.saved.random)
        if here().rank:  # else dropout would drop the same of every process's rows
            torch.manual_seed((self.trainer.settings.seed * here().count + here().rank) * 1_000_003 + state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.trainer.before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        control.should_training_stop = self.trainer.after_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        if logs and "loss" in logs:
            kept = {name: float(logs[name]) for name in ("loss", "grad_norm", "learning_rate") if name in logs}
            self.trainer.event("train", step=self.trainer.run_state.step, **kept)
