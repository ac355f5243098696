"""Training arguments: what transformers' Trainer is told, alone or in one of several processes.

Reads    Settings
Gives    training_arguments
Source   transformers.TrainingArguments
Symbols  -
"""

from functools import cached_property
from pathlib import Path
from tempfile import gettempdir

import torch
from accelerate.state import AcceleratorState, PartialState
from transformers import TrainingArguments

from loraprune.launch import here
from loraprune.settings import Settings


class _OwnDevice(TrainingArguments):
    """The arguments of one of several processes: Trainer, which takes it for the only one, stays on its device."""

    @cached_property
    def _setup_devices(self) -> torch.device:
        AcceleratorState._reset_state(reset_partial_state=True)
        on_cpu = self.use_cpu or not torch.cuda.is_available()
        self.distributed_state = PartialState(cpu=on_cpu)
        self._n_gpu = 0 if on_cpu else 1
        return torch.device("cpu") if on_cpu else torch.device("cuda", here().local_rank)


def training_arguments(settings: Settings, output: Path, steps: int) -> TrainingArguments:
    """Return the arguments of a run of so many steps: nothing is saved or evaluated by Trainer itself."""
    kind = TrainingArguments if here().count == 1 else _OwnDevice
    arguments = kind(
        output_dir=str(output) if here().first else gettempdir(),  # Trainer makes the folder
        max_steps=steps,
        learning_rate=settings.learning_rate,
        weight_decay=0.0,
        max_grad_norm=settings.max_gradient_norm,
        logging_steps=settings.prune_every,
        save_strategy="no",
        eval_strategy="no",
        report_to=list(settings.report_to) if settings.report_to and here().first else "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=settings.device == "cpu",
        seed=settings.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # Trainer would spread one process over all GPUs by DataParallel
    return arguments
