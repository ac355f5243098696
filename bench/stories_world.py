"""stories260K, widened and taught facts of invented people: a small model with an ability of its own, to be kept.

Reads    stories260K and TinyStories by stories260k.py
Gives    make_inputs: the sets, the model that knows its people and still tells stories, and the reference; widened;
         main prints what both know
Source   guard: TinyStories, arXiv 2305.07759; people: loraprune.world
Symbols  KL = mean over a story's tokens of KL(stories260K || model): what holds the ability while the facts are learnt
"""

import argparse
import json
import os
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from adamw import take_steps
from results_page import ROOT
from stories260k import find_data, make_folder, stories
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraprune.data import Example, collate, encode, load_rows
from loraprune.demo import write_rows
from loraprune.evaluate import measure
from loraprune.folder import whole_folder
from loraprune.model import pad_token_id, quiet_libraries
from loraprune.objectives import logits_of, retain_loss
from loraprune.schedule import learning_rate_factor
from loraprune.world import GROUP_SIZES, make_world

CACHE = ROOT / "bench" / "cache" / "arena" / "worlds"
KNOWN = ("retain", "bystander")  # by the reference
GUARD, GUARD_STORIES = "guard", 40  # not told while the facts are learnt
WIDER = 3  # times as many feed-forward channels: as it is, stories260K has none that stories do not need
MAX_LENGTH = 192  # tokens of each story, from its beginning on; a fact's row has at most 90
EPOCHS, FACTS_A_STEP, STORIES_A_STEP = 30, 32, 6
STORY_WEIGHT = 5.0  # at 2 the facts are learnt sooner, and the loss on other stories rises by 8% rather than by 4%
RATE, MAX_GRADIENT_NORM = 1.5e-3, 1.0
RISE, PLATEAU = 50, 0.4  # steps; part of all steps after which the learning rate falls


def main() -> None:
    """Make a seed's world and print what its models know, beside what stories260K knew before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None, help="folder with tinyllama-260k and tinystories")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data, begun = find_data(options.data), monotonic()
    folder = CACHE / f"stories-{options.seed}"
    make_inputs(data, options.seed, folder)
    print(f"{monotonic() - begun:.0f} s")
    with quiet_libraries():
        for path in (make_folder(data), folder / "untouched", folder / "reference"):
            print(path.name, json.dumps(known(path, folder)))


def make_inputs(data: Path, seed: int, folder: Path) -> None:
    """Write the five sets and both models, whichever are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = stories(data)
    random.Random(seed).shuffle(texts)
    guard, told = ([{"text": one} for one in part] for part in (texts[:GUARD_STORIES], texts[GUARD_STORIES:]))
    for name, rows in {**make_world(seed), GUARD: guard, "told": told}.items():
        write_rows(folder / f"{name}.jsonl", rows)
    with quiet_libraries():
        for name, learnt in (("untouched", (*KNOWN, "forget")), ("reference", KNOWN)):
            teach(make_folder(data), folder, learnt, folder / name, seed)


def teach(plain: Path, folder: Path, learnt: Sequence[str], path: Path, seed: int) -> None:
    """Write stories260K with the facts of `learnt`, all weights trained; leave one that is there."""
    if path.exists():
        return
    tokenizer, teacher = load(plain)
    pupil = widened(teacher, WIDER, seed)
    refuse_other(pupil, teacher, tokenizer)
    facts = [one for name in learnt for one in read(folder, name, tokenizer)]
    tales, pad, order = read(folder, "told", tokenizer), pad_token_id(tokenizer), random.Random(seed)
    batches = [part for _ in range(EPOCHS) for part in parts_of(order.sample(facts, len(facts)), FACTS_A_STEP)]

    def loss(step: int) -> Tensor:
        asked = collate(batches[step], pad)
        told = collate(order.sample(tales, STORIES_A_STEP), pad)
        return retain_loss(logits_of(pupil, asked), asked["labels"]) + STORY_WEIGHT * strayed(pupil, teacher, told)

    steps, plateau = len(batches), int(PLATEAU * len(batches))
    rates = [RATE * learning_rate_factor(step, 2 * RISE, plateau, steps - plateau) for step in range(steps)]
    take_steps(pupil.parameters(), loss, rates, MAX_GRADIENT_NORM)
    with whole_folder(path) as part:
        pupil.save_pretrained(part)
        tokenizer.save_pretrained(part)


@torch.no_grad()
def widened(model: Any, times: int, seed: int) -> Any:
    """Return a copy of a Llama with `times` as many feed-forward channels, the new ones silent: it says the same.

    A new channel's gate and up are drawn as a fresh model's are, its column of the down projection is zero.
    """
    torch.manual_seed(seed)
    config = type(model.config).from_dict(
        {**model.config.to_dict(), "intermediate_size": times * model.config.intermediate_size}
    )
    wide = type(model)(config)
    weights = dict(wide.named_parameters())
    for name, old in model.named_parameters():
        if name.endswith("down_proj.weight"):
            weights[name].zero_()
        weights[name][tuple(slice(size) for size in old.shape)] = old
    return wide


@torch.no_grad()
def refuse_other(pupil: Any, teacher: Any, tokenizer: Any) -> None:
    """End where the widened model does not say what the model said: then it has not its ability."""
    tokens = torch.tensor([tokenizer("Once upon a time")["input_ids"]])
    if not torch.allclose(pupil(tokens).logits, teacher(tokens).logits, atol=1e-4):
        raise SystemExit("the widened stories260K says something else than stories260K")


def strayed(pupil: Any, teacher: Any, told: Mapping[str, Tensor]) -> Tensor:
    """Return the mean KL of the teacher's next token from the pupil's, over all tokens of the stories, in nats.

    Soft targets, since the text is short: trained on as text, it is learnt by heart and other stories are lost.
    """
    counted = told["attention_mask"][:, 1:].bool()
    with torch.no_grad():
        wanted = log_softmax(logits_of(teacher, told)[:, :-1][counted], dim=-1)
    found = log_softmax(logits_of(pupil, told)[:, :-1][counted], dim=-1)
    return kl_div(found, wanted, log_target=True, reduction="batchmean")


def known(path: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Return performance and loss of a model on every set."""
    tokenizer, model = load(path)
    look = partial(measure, model, batch_size=64, pad_token_id=pad_token_id(tokenizer))
    found = {name: look(read(folder, name, tokenizer)) for name in (*GROUP_SIZES, GUARD)}
    return {name: {"performance": round(one.performance, 3), "loss": round(one.loss, 3)} for name, one in found.items()}


def load(path: Path) -> tuple[Any, Any]:
    return AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def read(folder: Path, name: str, tokenizer: Any) -> list[Example]:
    return encode(load_rows(str(folder / f"{name}.jsonl"), name=name), tokenizer, name=name, max_length=MAX_LENGTH)


def parts_of(examples: Sequence[Example], size: int) -> list[Sequence[Example]]:
    return [examples[begin : begin + size] for begin in range(0, len(examples), size)]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
