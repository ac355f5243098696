"""Scratch: a small language model that learns rows by heart, so that there is something to forget.

Reads    rows, a seed
Gives    a tokenizer, a Llama with grouped-query attention, trained
Source   -
Symbols  -
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from loraprune.data import PLAIN_TEMPLATE, Example, Row, collate, encode
from loraprune.folder import whole_folder
from loraprune.progress import stage


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with <pad>, <bos> and <eos>, trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<bos>", "<eos>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def make_llama(tokenizer: PreTrainedTokenizerFast, seed: int, **sizes: int) -> LlamaForCausalLM:
    """Return a fresh Llama with tied embeddings; `sizes` are LlamaConfig's, and the seed fixes every weight."""
    torch.manual_seed(seed)
    values: dict[str, Any] = {  # plain numbers, which the annotations of both classes do not say
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **sizes,
    }
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **values)
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Recipe:
    """How a model is made from nothing: tokenizer, sizes (LlamaConfig's names) and training."""

    vocabulary: int
    sizes: Mapping[str, int]
    epochs: int
    batch_size: int = 64
    learning_rate: float = 3e-3


def make_model(path: Path, rows: Sequence[Row], world: Iterable[Row], recipe: Recipe, seed: int) -> None:
    """Write a model that knows `rows` by heart, its tokenizer trained on all of `world`; leave one that is there."""
    if path.exists():
        return
    texts = (PLAIN_TEMPLATE.format(prompt=row.prompt) + row.answer for row in world)
    tokenizer = train_tokenizer(texts, recipe.vocabulary)
    model = make_llama(tokenizer, seed, **recipe.sizes)
    with whole_folder(path) as part:
        learn_by_heart(
            model, encode(rows, tokenizer, name="data"), recipe, seed=seed, title=f"learn {path.name}", folder=part
        )
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)


def learn_by_heart(
    model: LlamaForCausalLM, examples: Sequence[Example], recipe: Recipe, *, seed: int, title: str, folder: Path
) -> None:
    """Train all weights on the answers of the examples; AdamW, linear warm-up over 50 steps, cosine to zero."""
    pad = cast(int, model.config.pad_token_id)  # `make_llama` sets it
    steps = recipe.epochs * math.ceil(len(examples) / recipe.batch_size)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        warmup_steps=50,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        adam_beta2=0.98,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        seed=seed,
    )

    def gather(batch: list[Example]) -> dict[str, Any]:
        tensors = collate(batch, pad)
        del tensors["facts"]
        return tensors

    with stage(title, steps) as advance:
        trainer = Trainer(model=model, args=arguments, train_dataset=list(examples), data_collator=gather)  # type: ignore[arg-type]
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Advance(advance))
        trainer.train()
    model.eval()


class _Advance(TrainerCallback):
    """Moves the stage's progress bar."""

    def __init__(self, advance: Any) -> None:
        self.advance, self.note = advance, ""

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.advance(1, self.note)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        if logs and "loss" in logs:
            self.note = f"loss {float(logs['loss']):.3f}"
