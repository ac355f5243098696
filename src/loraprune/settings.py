"""Settings: every knob of a run, each with one sentence, a default and a range.

Reads    keyword arguments; files and the command line come through settings_file.py and cli.py
Gives    Settings, frozen and checked; DECLARED: what is declared of each, by name; as_values
Source   four fields come from the unlearning plan (threshold, epsilon, floor, ratio), with its defaults
Symbols  P = performance, S = dual score, share = S / (1 + S)
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loraprune.presets import PRESETS
from loraprune.ranges import AT_LEAST_ONE, INSIDE_UNIT, NOT_NEGATIVE, POSITIVE, UNIT, Range
from loraprune.records import (
    AttentionUnit,
    Budget,
    Compat,
    Metric,
    Order,
    Schedule,
    ScoreFrom,
    ScoreLoss,
    ScoreNorm,
    Widths,
)
from loraprune.setting import Setting, setting

PLAIN_BITS = 16  # stands for the checkpoint's own format
INSTRUCTION = "instruction"  # the name of a template; see data.py


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of one run of `loraprune unlearn` (with a forget set) or `loraprune prune` (without)."""

    model: str = setting("", "model", "Folder or hub name of the causal language model to start from.")
    output: str = setting(
        "",
        "model",
        "Folder of the run; the pruned checkpoint is its subfolder model (the demo's: runs/demo, or runs/demo-SEED).",
    )
    reference: str | None = setting(
        None, "model", "Folder or hub name of a model trained without the forget set; its P(forget) becomes the target."
    )
    original: str | None = setting(
        None,
        "model",
        "Folder or hub name of the model before the first request, where MODEL has unlearned already; "
        "the floor holds against it. Unset: the numbers in the ledger that the model brings along, where they fit.",
    )
    dtype: str = setting(
        "auto",
        "model",
        "Number format of the weights; auto takes the checkpoint's own.",
        allowed=("auto", "float32", "bfloat16", "float16"),
    )
    base_bits: int = setting(
        PLAIN_BITS,
        "model",
        "Bits in which the projections are held while the run trains: 16 leaves them in their own format, 8 and 4 take "
        "half and a quarter of the memory (the extra quantize); cut and written is the original all the same.",
        allowed=(PLAIN_BITS, 8, 4),
    )
    device: str = setting(
        "auto",
        "model",
        "Where the run computes; auto takes a GPU when there is one.",
        allowed=("auto", "cpu", "cuda"),
    )
    trust_remote_code: bool = setting(False, "model", "Run modelling code that ships with the checkpoint.")

    forget: str | None = setting(
        None,
        "data",
        "Forget set: a .jsonl, .json, .csv, .parquet or .txt file, a folder saved by datasets, or a hub name "
        "name:config:split.",
    )
    retain: str | None = setting(
        None, "data", "Retain set, same forms; split by the seed into taught (80%), floor (10%) and final rows (10%)."
    )
    data: str | None = setting(
        None,
        "data",
        "Training set of plain compression: a .jsonl, .json, .csv, .parquet or .txt file, a folder saved by datasets, "
        "or a hub name name:config:split.",
    )
    holdout: str | None = setting(
        None,
        "data",
        "Data of the forget set's kind that the model never saw; its P is the target when no reference is given.",
    )
    bystander: str | None = setting(
        None, "data", "Things the model knows that stand in neither file; reported, steers nothing."
    )
    guard: str | None = setting(
        None, "data", "Other text, for a second floor: its loss may grow by max_guard_loss_ratio at most."
    )
    already_forgotten: tuple[str, ...] = setting(
        (), "data", "Forget sets of earlier requests, each with a ceiling of its own that no step may break."
    )
    floor_rows: str | None = setting(None, "data", "File of floor rows, used in place of a tenth of the retain set.")
    final_rows: str | None = setting(None, "data", "File of final rows, used in place of a tenth of the retain set.")
    columns: dict[str, str] = setting(
        {},
        "data",
        "Which column plays which role, as role=column pairs; roles: messages, prompt, input, answer, text, facts, "
        "fact_id, subject, paraphrased_question, paraphrased_answer, perturbed_answer.",
    )
    data_rows: int | None = setting(
        None,
        "data",
        "Most rows of the retain set (or of the training set of plain compression) that are trained on, sampled by the "
        "seed; unset: all that are not withheld.",
        allowed=AT_LEAST_ONE,
    )
    withheld_rows: int | None = setting(
        None,
        "data",
        "Rows that are withheld from training, half of them floor rows, half final rows; rows that say the same stay "
        "together, so there may be a few more. Unset: a fifth of all.",
        allowed=Range(2),
    )
    template: str = setting(
        "Question: {prompt}\nAnswer: ",
        "data",
        "How a prompt is written for a tokenizer without a chat template; another than the default replaces the chat "
        "template too. The word instruction stands for Alpaca's prompt, with its form for rows that have an input.",
    )
    max_length: int = setting(512, "data", "Longest row in tokens; longer ones are cut at the end.", allowed=Range(8))
    allow_overlap: bool = setting(False, "data", "Go on although rows stand in both the forget set and the retain set.")
    forget_batch_size: int = setting(32, "data", "Rows of the forget set in one training step.", allowed=AT_LEAST_ONE)
    retain_batch_size: int = setting(32, "data", "Rows of the retain set in one training step.", allowed=AT_LEAST_ONE)
    evaluate_batch_size: int = setting(64, "data", "Rows in one pass of scoring or evaluation.", allowed=AT_LEAST_ONE)
    micro_batch_size: int | None = setting(
        None,
        "data",
        "Rows in one pass of a training step, whose gradients add up to those of the whole batch; unset: the whole "
        "batch of every set in one pass.",
        allowed=AT_LEAST_ONE,
    )
    group_by_length: bool = setting(
        False, "data", "Put rows of like length into one batch, so that less is padded; the order is less random."
    )
    train_on_prompt: bool = setting(
        False,
        "data",
        "Count the prompt's tokens too where the retain set (or the training set of plain compression) is trained on "
        "and scored; what is measured is always the answer.",
    )

    metric: Metric = setting(
        "gate",
        "sensitivity",
        "How sensitivity is computed: from adapter gradients (lora), per-example gates (gate), gradients of the frozen "
        "weights (grad; memory for all of them), mean input x column norm (activation), the weights alone (magnitude), "
        "or not at all (random, a control).",
    )
    score_loss: ScoreLoss = setting(
        "log_odds",
        "sensitivity",
        "Which loss is scored; log_odds keeps a gradient on facts known by heart, nll does not.",
    )
    score_rows: int = setting(
        128,
        "sensitivity",
        "Rows of each set that are scored at every pruning step, sampled once by the seed.",
        allowed=AT_LEAST_ONE,
    )
    score_power: int = setting(
        1, "sensitivity", "1 sums absolute values (the released code), 2 sums squares (the paper).", allowed=Range(1, 2)
    )
    third_term: bool = setting(
        False,
        "sensitivity",
        "Metric lora subtracts gB gA too, as published; it depends on the loss's scale and changes with clipping.",
    )
    score_norm: ScoreNorm = setting(
        "mean",
        "sensitivity",
        "What a score is divided by before it is averaged: the mean of its kind over the model (mean), the L2 norm of "
        "each projection (module, the released code), or nothing (none).",
    )
    score_from: ScoreFrom = setting(
        "passes",
        "sensitivity",
        "Whether scores come from passes of their own or, in compression, from the training steps' own gradients, "
        "which costs next to nothing.",
    )
    score_every: int = setting(
        5, "sensitivity", "Training steps between two scores when they come from training.", allowed=AT_LEAST_ONE
    )
    moving_average: float = setting(
        0.5,
        "sensitivity",
        "Weight of the past in the bias-corrected moving average of sensitivities.",
        allowed=Range(0, 1, open_high=True),
    )

    order: Order = setting(
        "difference",
        "decision",
        "In which order groups go when there is a forget set: by I_forget - retain_cost x I_retain (difference), or by "
        "the share S / (1 + S), S = I_forget / I_retain (share). By difference all may go to reach a sparsity.",
    )
    retain_cost: float = setting(
        3.0,
        "decision",
        "By how much the retain sensitivity outweighs the forget sensitivity in the difference.",
        allowed=NOT_NEGATIVE,
    )
    unlearning_threshold: float = setting(
        0.5,
        "decision",
        "A group may go only if its share S / (1 + S) is above this; 0.5 means it matters more to forget. Holds where "
        "sparsity is unset or the order is share.",
        allowed=UNIT,
    )
    unlearning_epsilon: float = setting(
        1e-6,
        "decision",
        "Added to the retain sensitivity in S = I_forget / (I_retain + epsilon); sensitivities have mean 1.",
        allowed=POSITIVE,
    )
    minimum_forget_sensitivity: float = setting(
        0.1,
        "decision",
        "A group with less than this part of the mean forget sensitivity is no candidate: it forgets nothing. Holds "
        "where the threshold does.",
        allowed=NOT_NEGATIVE,
    )
    sparsity: float | None = setting(
        None,
        "decision",
        "Removed parameters / all parameters to reach; unset: prune only until P(forget) is in the band.",
        allowed=INSIDE_UNIT,
    )
    max_sparsity: float = setting(
        0.5, "decision", "Most that may be removed when sparsity is unset.", allowed=INSIDE_UNIT
    )
    initial_sparsity: float = setting(
        0.0, "decision", "Sparsity at which the schedule begins.", allowed=Range(0, 1, open_high=True)
    )
    sparsity_of: str = setting(
        "parameters",
        "decision",
        "What sparsity is a share of: all parameters of the model, or the groups of every layer that is not frozen.",
        allowed=("parameters", "groups"),
    )
    budget: Budget = setting(
        "kind",
        "decision",
        "What loses the same fraction: every layer (layer), each kind over all layers (kind), or nothing, all groups "
        "standing in one ranking (global). Under uniform widths layer and kind are the same.",
    )
    attention_unit: AttentionUnit = setting(
        "kv_group",
        "decision",
        "What goes of attention: key/value heads with all query heads that share them (kv_group), or single query "
        "heads, as many of each kv_group (q_head), where a model has too few kv_groups to lose one.",
    )
    attention_ratio: float = setting(
        1.0,
        "decision",
        "Fraction of the attention groups that goes for each fraction of the feed-forward channels; 0 leaves attention "
        "whole.",
        allowed=NOT_NEGATIVE,
    )
    rescale_survivors: bool = setting(
        False,
        "decision",
        "Multiply what is left in a layer by a factor, so that the layer's output keeps its size on the scored retain "
        "rows when groups go; the factor ends up in the weights.",
    )
    frozen_layers: tuple[str, ...] = setting(
        (),
        "decision",
        "Layers that lose nothing, by number, -1 the last; first-tenth is the first tenth of them. Needs --widths "
        "per_layer.",
    )
    min_groups_per_layer: int = setting(
        1, "decision", "Groups of each kind that every layer keeps.", allowed=AT_LEAST_ONE
    )
    widths: Widths = setting(
        "uniform",
        "decision",
        "Whether every layer keeps the same number of groups of a kind (uniform: stock transformers loads the result), "
        "or each layer its own (per_layer: the result brings its modelling code along).",
    )
    round_to: int | None = setting(
        None,
        "decision",
        "Feed-forward widths that lose channels end at a multiple of this; 64 or 128 run best on GPUs. Unset: 8 where "
        "a sparsity is reached by difference, under uniform widths, in layers of 256 channels or more, else 1.",
        allowed=AT_LEAST_ONE,
    )

    min_retain_performance: float = setting(
        0.9,
        "floor",
        "The floor: lowest retention P_after / P_before on the floor rows that a pruning step may leave.",
        allowed=UNIT,
    )
    max_guard_loss_ratio: float = setting(
        1.1,
        "floor",
        "The second floor: highest loss_after / loss_before on the guard text that a pruning step may leave.",
        allowed=AT_LEAST_ONE,
    )
    recovery_steps: int = setting(
        20,
        "floor",
        "LoRA steps on the retain set after a pruning step that broke a limit; none after one that broke the floor "
        "while P(forget) was above its band.",
        allowed=NOT_NEGATIVE,
    )
    forget_target: float | None = setting(
        None, "target", "P(forget) at which to stop when there is neither a reference nor a holdout.", allowed=UNIT
    )
    natural_spread: bool = setting(
        True,
        "target",
        "Steer each forget row, where there is a holdout of 20 rows or more: ranked by P, the rows of a batch are to "
        "lie as far apart as the holdout's do, around the target. Off, or without such a holdout: steer their mean.",
    )
    band: float | None = setting(
        None,
        "target",
        "Half width of the band around the target; unset: the larger of 0.03 and a quarter of the target.",
        allowed=Range(0, 1, open_low=True),
    )

    forget_loss: str = setting(
        "npo",
        "training",
        "Loss that pushes the forget set down to its target, between pruning steps and in recovery.",
        allowed=("none", "ga", "npo", "simnpo"),
    )
    forget_retain_ratio: float = setting(
        1.0, "training", "Weight of the forget loss; the retain loss has weight 1.", allowed=NOT_NEGATIVE
    )
    forget_loss_beta: float = setting(
        1.0,
        "training",
        "Temperature beta of npo and simnpo, by the log-probability of the mean token: the higher, the sooner the push "
        "on a row flattens out as its answer becomes unlikely.",
        allowed=POSITIVE,
    )
    relearning_radius: float = setting(
        2.0,
        "training",
        "How far the forget loss looks ahead: for each half of a batch every weight of the adapters is moved by so "
        "many learning rates towards relearning the other half, or by a half, a quarter or an eighth of that where so "
        "far a step would not make it likelier, and what is still known there is pushed down. The further, the less "
        "comes back when a part is learnt again, and the more is lost of what is not taught. 0: not at all.",
        allowed=NOT_NEGATIVE,
    )
    learning_rate: float = setting(
        1e-3,
        "training",
        "Peak learning rate of the adapters; measured on models of millions of parameters, billions want about 1e-4.",
        allowed=POSITIVE,
    )
    epochs: float | None = setting(
        None,
        "training",
        "How often the run sees every row that it trains on: it takes rows / retain_batch_size x epochs steps. Unset: "
        "warmup_steps, prune_rounds and finish_steps decide the length.",
        allowed=POSITIVE,
    )
    warmup_share: float = setting(
        0.1,
        "training",
        "With epochs: the share of all steps before pruning begins, in place of warmup_steps.",
        allowed=Range(0, 1, open_high=True),
    )
    finish_share: float = setting(
        0.1,
        "training",
        "With epochs: the share of all steps after pruning has ended, in place of finish_steps.",
        allowed=Range(0, 1, open_high=True),
    )
    warmup_steps: int = setting(
        20,
        "training",
        "Steps of LoRA before the first pruning step; the learning rate rises over the first half.",
        allowed=NOT_NEGATIVE,
    )
    prune_every: int = setting(15, "training", "Training steps between two pruning steps.", allowed=AT_LEAST_ONE)
    schedule: Schedule = setting(
        "cubic",
        "training",
        "How sparsity grows: by a cubic that ends at the goal, or as in the released code, which begins a round "
        "earlier and ends short of it.",
    )
    prune_rounds: int = setting(
        12, "training", "Pruning steps over which the cubic schedule reaches the sparsity.", allowed=AT_LEAST_ONE
    )
    finish_steps: int = setting(
        100,
        "training",
        "Steps of recovery after the last pruning step; more by those that were left where a limit ended the pruning "
        "and the forget set is still known.",
        allowed=NOT_NEGATIVE,
    )
    evaluate_every: int = setting(
        25, "training", "Steps of the recovery between two looks at P(forget) and retention.", allowed=AT_LEAST_ONE
    )
    max_gradient_norm: float = setting(1.0, "training", "Gradients are clipped to this norm.", allowed=POSITIVE)
    gradient_checkpointing: bool = setting(False, "training", "Save memory by computing activations twice.")

    lora_rank: int = setting(8, "lora", "Rank of the adapters.", allowed=AT_LEAST_ONE)
    lora_alpha: float = setting(16, "lora", "Adapters are scaled by alpha / rank.", allowed=POSITIVE)
    lora_dropout: float = setting(0.0, "lora", "Dropout in front of the adapters.", allowed=Range(0, 1, open_high=True))
    target_modules: tuple[str, ...] = setting(
        (),
        "lora",
        "Projections that carry an adapter, by the last part of their names (q_proj, or qkv_proj where it is fused); "
        "none named: all projections of the model's family.",
    )
    adapter: str | None = setting(
        None,
        "lora",
        "Folder of a LoRA adapter to start from; its rank, alpha, modules and shapes must be those of the run.",
    )

    cache: str = setting(
        "auto",
        "evaluation",
        "Folder that keeps what was measured, by the content of weights and rows, so that it is not measured twice; "
        "auto is loraprune in the user's cache folder (or what LORAPRUNE_CACHE names), none keeps nothing.",
    )
    compat: Compat = setting(
        "none",
        "evaluation",
        "Whose attention mask is taken: open-unlearning hides every token that equals the padding token, on Llama 3 "
        "the ends of the prompt's turns; none hides padding alone, which is right.",
    )
    rouge_rows: int = setting(
        400,
        "evaluation",
        "Rows of each set, sampled by the seed, whose answers are generated for ROUGE, which costs more than all other "
        "metrics together; 0 leaves ROUGE out.",
        allowed=NOT_NEGATIVE,
    )
    gradient_norm: bool = setting(
        True,
        "evaluation",
        "Attack membership by gradient norms too, where a holdout is given: one backward pass a row, and memory for "
        "the gradients of all weights.",
    )

    attacks: tuple[str, ...] = setting(
        ("relearn", "retrain", "quantise", "sample", "rephrase", "prune_again", "look_inside"),
        "attack",
        "Which attacks are run; docs/attacks.md says what each answers.",
    )
    attack_steps: int = setting(
        40,
        "attack",
        "Steps of the attacks that train; the model is scored after 0, 1, 2, 5, 10, 20, 50 ... of them and at the end.",
        allowed=AT_LEAST_ONE,
    )
    attack_learning_rate: float | None = setting(
        None,
        "attack",
        "Learning rate of the attacks that train; unset: learning_rate of the run, a tenth of it for all weights.",
        allowed=POSITIVE,
    )
    attack_samples: int = setting(
        64, "attack", "Answers drawn to each question, of which the best counts.", allowed=AT_LEAST_ONE
    )
    attack_rows: int = setting(
        100, "attack", "Forget rows, chosen by the seed, for which answers are drawn.", allowed=AT_LEAST_ONE
    )
    attack_sparsity: float = setting(
        0.3, "attack", "Share of every matrix's single weights that pruning again sets to zero.", allowed=INSIDE_UNIT
    )

    request_id: str | None = setting(
        None, "run", "Name of this request in the ledger of reproduce.json; unset: request-N, N counted by the ledger."
    )
    preset: str = setting(
        "default",
        "run",
        "Where settings that are not given come from: the defaults, or what LoRAPrune's released code (released) or "
        "its paper (paper) does.",
        allowed=tuple(PRESETS),
    )
    seed: int = setting(0, "run", "The one seed: split, samples, adapters, order of the data.", allowed=NOT_NEGATIVE)
    report_to: tuple[str, ...] = setting(
        (), "run", "Where training metrics also go, as transformers names them (tensorboard, wandb, ...)."
    )
    show_examples: bool = setting(
        False,
        "run",
        "Print three forget and three retain prompts with the answers before and after, on the terminal only.",
    )

    def __post_init__(self) -> None:
        for name, one in DECLARED.items():
            one.check(getattr(self, name))

    @property
    def is_unlearning(self) -> bool:
        return self.forget is not None

    @property
    def pushes_down(self) -> bool:
        """Say whether training pushes down what is to be forgotten, where there is something."""
        return self.forget_loss != "none" and self.forget_retain_ratio > 0

    def changed(self, other: "Settings") -> list[str]:
        """Return the names of the settings in which the two differ."""
        return [name for name in DECLARED if getattr(self, name) != getattr(other, name)]


DECLARED = {one.name: Setting.of(one) for one in dataclasses.fields(Settings)}  # in the order of their declaration


def _with_preset(init: Callable[..., None]) -> Callable[..., None]:
    """Let a preset stand in for the defaults of settings that are not given."""

    @functools.wraps(init)
    def filled(self: Settings, **given: Any) -> None:
        init(self, **{**PRESETS.get(given.get("preset", "default"), {}), **given})

    return filled


Settings.__init__ = _with_preset(Settings.__init__)  # type: ignore[method-assign]


def as_values(settings: Settings) -> dict[str, Any]:
    """Return the settings as plain values; unset ones are left out, since TOML has no null."""
    values = dataclasses.asdict(settings)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v is not None}
