"""Attack by looking inside: do earlier layers hold the answer that the last one does not give?

Reads    the hidden states behind every layer
Gives    look_inside
Source   logit lens: the final norm and the output projection on every layer's state, as in arXiv 2303.08112
Symbols  L layers, n answer tokens of a batch
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loraprune.attacked import AttackedModel, AttackResult, Reading, interval_of
from loraprune.data import NO_LABEL, Example, batches_by_length, collate, find_facts, on_device
from loraprune.progress import Advance


def look_inside(attacked: AttackedModel, advance: Advance) -> AttackResult:
    """Read the answers' probability out of every layer; the layer that gives most stands against the last one."""
    facts = find_facts(attacked.rows.forget)
    performances, exact = lens(attacked.load(), attacked.examples(attacked.rows.forget), **attacked.options)
    best = int(performances.mean(1).argmax())
    by_layer = [
        {
            "layer": layer,
            "performance": float(performances[layer].mean()),
            "performance_interval": interval_of(performances[layer], facts),
            "exact_match": float(exact[layer].mean()),
        }
        for layer in range(len(performances))
    ]
    advance(1)
    reading = Reading(facts, performances[-1].tolist(), performances[best].tolist())
    return AttackResult({"performance": reading}, {"highest_layer": best, "layers": by_layer})


Numbers = NDArray[np.float64]


@torch.no_grad()
def lens(model: Any, examples: Sequence[Example], *, batch_size: int, pad_token_id: int) -> tuple[Numbers, Numbers]:
    """Return performance and exact match of every row behind every layer, (L, rows) each; the model's come last.

    Layers count from 0; the embeddings, which know nothing of what came before, are left out.
    """
    performances, exact = (np.zeros((len(model.get_decoder().layers), len(examples))) for _ in range(2))
    device = next(model.parameters()).device
    for rows in batches_by_length(examples, batch_size):
        batch = on_device(collate([examples[row] for row in rows], pad_token_id), device)
        performances[:, rows], exact[:, rows] = _read_batch(model, batch)
    return performances, exact


def _read_batch(model: Any, batch: dict[str, Tensor]) -> tuple[Numbers, Numbers]:
    targets = batch["labels"][:, 1:]
    counted = targets != NO_LABEL
    with _states(model.get_decoder(), counted) as states:
        model.get_decoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    read = [_read_state(model, state, targets, counted) for state in states]
    performances, exact = zip(*read, strict=True)
    return np.stack(performances), np.stack(exact)


@contextmanager
def _states(decoder: Any, counted: Tensor) -> Iterator[list[Tensor]]:
    """Collect every layer's states where an answer token is predicted, (n, hidden) each, while the block runs."""
    states: list[Tensor] = []

    def keep(module: nn.Module, given: Any, made: Any) -> None:
        states.append((made[0] if isinstance(made, tuple) else made)[:, :-1][counted])

    hooks = [layer.register_forward_hook(keep) for layer in decoder.layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def _capped(logits: Tensor, config: Any) -> Tensor:
    """Return logits as the model's own head gives them: Gemma 2 bends them under a cap."""
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _read_state(model: Any, state: Tensor, targets: Tensor, counted: Tensor) -> tuple[Numbers, Numbers]:
    """Return performance and exact match of the batch's rows, read out of one layer's states."""
    logits = _capped(model.get_output_embeddings()(model.get_decoder().norm(state)), model.config).float()
    chosen = logits.gather(-1, targets[counted][:, None])[:, 0] - logits.logsumexp(-1)
    right = logits.argmax(-1) == targets[counted]
    values = torch.zeros(counted.shape, dtype=torch.float64, device=counted.device)
    wrong = torch.zeros(counted.shape, dtype=torch.bool, device=counted.device)
    values[counted], wrong[counted] = chosen.double(), ~right
    means = values.sum(1) / counted.sum(1)
    return means.exp().cpu().numpy(), (~wrong.any(1)).double().cpu().numpy()
