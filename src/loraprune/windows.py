"""Windows: perplexity of a plain text, cut into windows as long as the context.

Reads    texts (a file, a saved folder, a hub name), a checkpoint
Gives    measure_text, TextMeasured
Source   LLM-Pruner's and LoRAPrune's PPLMetric: documents joined by an empty line, whole windows alone, no overlap
Symbols  n windows of `context` tokens, of which the first is not predicted
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from time import perf_counter
from typing import Any

from loraprune.answers import read_answers
from loraprune.data import NO_LABEL, Example
from loraprune.errors import UserError
from loraprune.model import device_of, pad_token_id
from loraprune.settings import Settings
from loraprune.sources import read_source

COLUMNS = ("text", "sentence")  # WikiText's and PTB's


@dataclass(frozen=True)
class TextMeasured:
    """Perplexity of a text, at which context, on how many tokens, and what one pass over it took."""

    source: str
    perplexity: float
    context: int
    windows: int
    predicted: int  # tokens
    seconds: float
    device: str

    def line(self) -> str:
        return (
            f"{self.source}: perplexity {self.perplexity:.4f} at {self.context} tokens of context "
            f"({self.windows:,} windows, {self.predicted:,} tokens predicted); inference {self.seconds:.3f} s on "
            f"{self.device}, {self.windows * self.context / self.seconds:,.0f} tokens a second"
        )


def measure_text(source: str, model: Any, tokenizer: Any, settings: Settings) -> TextMeasured:
    """Return the perplexity of a text under a model: exp of the mean loss over all predicted tokens."""
    examples = text_windows(read_text(source), tokenizer, settings.max_length, source)
    begun = perf_counter()
    read = read_answers(
        model,
        examples,
        batch_size=settings.evaluate_batch_size,
        pad_token_id=pad_token_id(tokenizer),
        spread=False,
    )
    seconds = perf_counter() - begun
    predicted = sum(one.log_probabilities.size for one in read)
    loss = -sum(float(one.log_probabilities.sum()) for one in read) / predicted
    device = str(device_of(settings))
    return TextMeasured(source, exp(loss), settings.max_length, len(examples), predicted, seconds, device)


def read_text(source: str) -> str:
    """Return a source's documents joined by an empty line; documents without text are joined too, as the field does."""
    records = read_source(source, name="text")
    column = next((name for name in COLUMNS if records and name in records[0][1]), None)
    if column is None:
        raise UserError(
            f"{source} has no column {' or '.join(COLUMNS)}.",
            "perplexity is measured on plain text.",
            "give --text a .txt file, or a set with such a column.",
        )
    return "\n\n".join(str(record[column]) for _, record in records)


def text_windows(text: str, tokenizer: Any, context: int, source: str) -> Sequence[Example]:
    """Return the text's tokens as whole windows, the rest left out; raise UserError where there is not one."""
    ids = list(tokenizer(text)["input_ids"])
    windows = [tuple(ids[first : first + context]) for first in range(0, len(ids) - context + 1, context)]
    if not windows:
        raise UserError(
            f"{source} has {len(ids)} tokens, less than one window of {context}.",
            "perplexity depends on the context; a shorter one would give another number.",
            "lower --cutoff_len, or give a longer text.",
        )
    return [Example(one, (NO_LABEL, *one[1:]), (False,) * context) for one in windows]
