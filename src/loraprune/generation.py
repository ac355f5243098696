"""Generation: what a model answers by itself.

Reads    a model and prompts as tokens
Gives    generate, end_tokens
Source   transformers' own `generate`; the attack by samples at a temperature is the caller's
Symbols  -
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from loraprune.answers import Advance, silent
from loraprune.records import Compat

ANSWER_TOKENS = 200  # as many as the reference evaluations let a model write


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    end_token_ids: Sequence[int],
    max_new_tokens: int = ANSWER_TOKENS,
    batch_size: int,
    samples: int = 1,
    temperature: float | None = None,
    seed: int = 0,
    advance: Advance = silent,
    compat: Compat = "none",
) -> list[list[list[int]]]:
    """Return for every prompt `samples` answers as tokens, cut before the first end token.

    Greedy without a temperature, else drawn from the whole distribution at it, the same for the same seed and batch
    size; the checkpoint's own defaults of sampling and penalties count for nothing. `batch_size` answers are written
    at a time, of prompts of about one length, padded on the left; `advance` hears of answers, not of prompts. `compat`
    as in `read_answers`. Raises ValueError for a prompt of no token.
    """
    if not all(prompts):
        raise ValueError("a prompt of no token cannot be continued")
    asked = [index for index in range(len(prompts)) for _ in range(samples)]
    asked.sort(key=lambda index: len(prompts[index]))
    answers: list[list[list[int]]] = [[] for _ in prompts]
    config = _config(temperature, max_new_tokens, pad_token_id, end_token_ids)
    with _plainly(model, config, seed):
        for begin in range(0, len(asked), batch_size):
            batch = asked[begin : begin + batch_size]
            written = _write([prompts[index] for index in batch], model, pad_token_id, compat)
            for index, tokens in zip(batch, written, strict=True):
                answers[index].append(_until_end(tokens, end_token_ids))
            advance(len(batch))
    return answers


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, and those that the checkpoint names besides."""
    named = model.generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return sorted({one for one in ids if isinstance(one, int)})


def _config(temperature: float | None, new_tokens: int, pad: int, ends: Sequence[int]) -> GenerationConfig:
    drawn = {} if temperature is None else {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(max_new_tokens=new_tokens, pad_token_id=pad, eos_token_id=list(ends) or None, **drawn)


@contextmanager
def _plainly(model: Any, config: GenerationConfig, seed: int) -> Iterator[None]:
    """Have the model write in eval mode, by this config alone and from this seed; all is as it was afterwards.

    A config handed to `generate` has its gaps filled from the checkpoint's, so the checkpoint's own steps aside.
    """
    own, training = model.generation_config, model.training
    device = next(model.parameters()).device
    model.generation_config = config
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        model.generation_config = own
        model.train(training)


def _write(prompts: Sequence[Sequence[int]], model: Any, pad: int, compat: Compat) -> list[list[int]]:
    """Return what the model appends to each prompt, padding after an end included."""
    device, length = next(model.parameters()).device, max(map(len, prompts))
    ids = torch.tensor([[pad] * (length - len(one)) + list(one) for one in prompts])
    there = torch.arange(length) >= length - torch.tensor([len(one) for one in prompts])[:, None]
    mask = ids != pad if compat == "open-unlearning" else there
    made: Tensor = model.generate(input_ids=ids.to(device), attention_mask=mask.long().to(device))
    return made[:, length:].tolist()


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    stop = next((place for place, one in enumerate(tokens) if one in ends), len(tokens))
    return tokens[:stop]
