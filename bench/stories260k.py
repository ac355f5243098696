"""stories260K as a Hugging Face folder, and TinyStories as rows: a really trained Llama, small enough to measure.

Reads    stories260K.bin and tok512.bin (llama2.c's formats), tinystories.txt: --data, LORAPRUNE_DATA or ../shared/data
Gives    make_folder, stories, find_data, check (the model's loss, how it begins a story, its tokenizer's encoding)
Source   github.com/karpathy/llama2.c, tinyllamas/stories260K; TinyStories, arXiv 2305.07759
Symbols  d hidden, h heads, k key/value heads, L layers; its rotary embedding turns neighbours (2i, 2i + 1), Hugging
         Face's turns halves (i, i + head_dim / 2), so the rows of a query or key head are put into that order
"""

import argparse
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from results_page import ROOT
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loraprune.folder import whole_folder

FOLDER = ROOT / "bench" / "cache" / "stories260k"
SPACE, BYTES_FROM, BYTES = "\u2581", 3, 256  # how a vocabulary writes a space; ids 3 to 258 are the single bytes
KNOWN_LOSS = (1.27, 1.33)  # nats a token on TinyStories
KNOWN_STORIES = 60  # from the beginning of the file on; over all of it the loss is 1.47, why is not known
KNOWN_BEGINNING = "Once upon a time, there was a little girl named Lily."
MENDED = {"â€œ": "“", "â€™": "’", "â€“": "–", "â€”": "—", "â€": "”"}  # UTF-8 that someone read as Windows-1252
OPENING = re.compile(
    r"Once upon a time|Once,? there|There (once )?(was|were|lived)|Long ago|A long time ago"
    r"|One (\w+ )?(day|night|morning),? (a|an|two|three|there was) |(Lily|Tom|Tim|Ben|Sara|Anna|Mia|Max) and "
)


class Sizes(NamedTuple):
    """The seven numbers at the head of the weights' file; a negative vocabulary says that the head is not tied."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    length: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


def main() -> None:
    """Make the folder and check that it is the model it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None, help="folder with tinyllama-260k and tinystories")
    data = find_data(parser.parse_args().data)
    print(f"{make_folder(data)}: {check(FOLDER, data)}")


def find_data(given: Path | None) -> Path:
    """Return the folder that holds tinyllama-260k and tinystories."""
    for place in (given, Path(os.environ.get("LORAPRUNE_DATA", "")), ROOT.parent / "shared" / "data"):
        if place is not None and (place / "tinyllama-260k" / "stories260K.bin").exists():
            return place
    raise SystemExit("stories260K.bin was not found: name the folder above tinyllama-260k with --data.")


def make_folder(data: Path) -> Path:
    """Write model and tokenizer to bench/cache once; return their folder."""
    if not FOLDER.exists():
        FOLDER.parent.mkdir(parents=True, exist_ok=True)
        source = data / "tinyllama-260k"
        model, tokenizer = read_model(source / "stories260K.bin"), read_tokenizer(source / "tok512.bin")
        with whole_folder(FOLDER) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
    return FOLDER


# --- weights ----------------------------------------------------------------------------------------------------------


def read_model(path: Path) -> LlamaForCausalLM:
    """Return the model of a llama2.c checkpoint, version 0, float32, with tied embeddings."""
    content = path.read_bytes()
    sizes = Sizes(*struct.unpack("7i", content[:28]))
    if sizes.vocabulary < 0:
        raise ValueError(f"{path} has a head of its own; this reader knows tied ones")
    values = torch.from_numpy(np.frombuffer(content, dtype="<f4", offset=28).copy())
    model = LlamaForCausalLM(config_of(sizes))
    missing, unexpected = model.load_state_dict(dict(_named_weights(values, sizes)), strict=False)
    if unexpected or missing != ["lm_head.weight"]:  # tied to the embeddings
        raise ValueError(f"{path}: {missing} and {unexpected} do not match")
    model.tie_weights()
    return model.eval()


def config_of(sizes: Sizes) -> LlamaConfig:
    values: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
    return LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=sizes.length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        **values,
    )


def _named_weights(values: Tensor, sizes: Sizes) -> Iterator[tuple[str, Tensor]]:
    """Give every weight under Hugging Face's name; the file holds one kind after the other, of all layers each."""
    d, inner, key = sizes.hidden, sizes.inner, sizes.kv_heads * sizes.head_dim
    of_layers = {
        "input_layernorm": (d,),
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (key, d),
        "self_attn.v_proj": (key, d),
        "self_attn.o_proj": (d, d),
        "post_attention_layernorm": (d,),
        "mlp.gate_proj": (inner, d),
        "mlp.down_proj": (d, inner),
        "mlp.up_proj": (inner, d),
    }
    heads = {"self_attn.q_proj": sizes.heads, "self_attn.k_proj": sizes.kv_heads}
    shapes = [(name, (sizes.layers, *shape)) for name, shape in of_layers.items()]
    place = 0
    for name, shape in (("embed_tokens", (sizes.vocabulary, d)), *shapes, ("norm", (d,))):
        count = int(np.prod(shape))
        weight, place = values[place : place + count].reshape(shape), place + count
        if name not in of_layers:
            yield f"model.{name}.weight", weight
            continue
        for layer, one in enumerate(weight):
            yield f"model.layers.{layer}.{name}.weight", halves(one, heads[name]) if name in heads else one
    unused = sizes.length * sizes.head_dim  # sines and cosines
    if place + unused != len(values):
        raise ValueError(f"the file holds {len(values)} numbers, its head promises {place + unused}")


def halves(weight: Tensor, heads: int) -> Tensor:
    """Return a query's or key's weight, (o, i), with the rows of each head from (0, 1), (2, 3) ... to halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


# --- tokenizer --------------------------------------------------------------------------------------------------------


def read_vocabulary(path: Path) -> list[tuple[str, float]]:
    """Return piece and score of every token, in the order of their ids, as the file spells them."""
    content, place, found = path.read_bytes(), 4, []
    while place < len(content):
        score, length = struct.unpack_from("<fi", content, place)
        place += 8 + length
        found.append((content[place - length : place].decode("utf-8"), score))
    return found


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Return llama2.c's tokenizer as one of `tokenizers`: pairs join in the order of what they make, best score first.

    It puts a space in front of a text and <s> in front of that; characters that it does not know become bytes.
    """
    pieces = read_vocabulary(path)
    names = [
        piece.strip() if number < BYTES_FROM else piece.replace(" ", SPACE) for number, (piece, _) in enumerate(pieces)
    ]
    vocabulary = {name: number for number, name in enumerate(names)}
    model = models.BPE(
        vocab=vocabulary, merges=_merges(pieces, names), unk_token=names[0], fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    parts: Any = {"prepend": normalizers.Prepend(SPACE), "replace": normalizers.Replace(" ", SPACE)}
    tokenizer.normalizer = normalizers.Sequence(list(parts.values()))  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{names[1]} $A", special_tokens=[(names[1], 1)]
    )
    steps: list[Any] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=names[0],
        bos_token=names[1],
        eos_token=names[2],
        clean_up_tokenization_spaces=False,
    )


def _merges(pieces: Sequence[tuple[str, float]], names: Sequence[str]) -> list[tuple[str, str]]:
    """Return every pair of tokens that makes a token, the best score first."""
    first = BYTES_FROM + BYTES
    known = set(names[first:])
    order = sorted(range(first, len(pieces)), key=lambda number: -pieces[number][1])
    cuts = ((names[number][:cut], names[number][cut:]) for number in order for cut in range(1, len(names[number])))
    return [pair for pair in cuts if known.issuperset(pair)]


def encode_plainly(text: str, pieces: Sequence[tuple[str, float]]) -> list[int]:
    """Return llama2.c's encoding, restated: characters or their bytes, then again and again the best pair joined."""
    known = {piece: number for number, (piece, _) in enumerate(pieces) if number >= BYTES_FROM + BYTES}
    ids = [1]
    for character in " " + text:
        ids += [known[character]] if character in known else [one + BYTES_FROM for one in character.encode()]
    while True:
        joined = (
            (pieces[made][1], -place, made)
            for place, (left, right) in enumerate(pairwise(ids))
            if (made := known.get(pieces[left][0] + pieces[right][0])) is not None
        )
        best = max(joined, default=None)
        if best is None:
            return ids
        place = -best[1]
        ids[place : place + 2] = [best[2]]


# --- text -------------------------------------------------------------------------------------------------------------


def stories(data: Path) -> list[str]:
    """Return the stories of tinystories.txt, which parts them by an empty line as it parts their paragraphs.

    A story begins where a paragraph opens as a story does; where two run into one, the second is cut by its length.
    Paragraphs are joined by one line break, as the model saw them.
    """
    text = (data / "tinystories" / "tinystories.txt").read_text(encoding="utf-8")
    for broken, whole in MENDED.items():
        text = text.replace(broken, whole)
    found: list[list[str]] = []
    for paragraph in text.strip().split("\n\n"):
        if not found or OPENING.match(paragraph):
            found.append([])
        found[-1].append(paragraph.strip())
    return ["\n".join(one) for one in found]


# --- check ------------------------------------------------------------------------------------------------------------


def check(folder: Path, data: Path) -> Mapping[str, Any]:
    """Return loss, beginning and how many stories are encoded as by llama2.c; stop where one is not as it should be."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    pieces, texts = read_vocabulary(data / "tinyllama-260k" / "tok512.bin"), stories(data)
    written = model.generate(torch.tensor([[1]]), do_sample=False, max_new_tokens=40, pad_token_id=2)
    found = {
        "loss": loss_per_token(model, tokenizer, texts[:KNOWN_STORIES]),
        "loss_of_all": loss_per_token(model, tokenizer, texts),
        "stories": len(texts),
        "encoded_alike": sum(tokenizer(text)["input_ids"] == encode_plainly(text, pieces) for text in texts),
        "begins": tokenizer.decode(written[0], skip_special_tokens=True)[: len(KNOWN_BEGINNING)],
    }
    right = KNOWN_LOSS[0] <= found["loss"] <= KNOWN_LOSS[1] and found["encoded_alike"] == len(texts)
    if not right or found["begins"] != KNOWN_BEGINNING:
        raise SystemExit(f"this is not stories260K as it should be: {found}")
    return found


@torch.no_grad()
def loss_per_token(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Return the mean negative log-likelihood of the stories' tokens after <s>, in nats."""
    total, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][: model.config.max_position_embeddings]])
        counted = ids.shape[1] - 1
        total, tokens = total + float(model(ids, labels=ids).loss) * counted, tokens + counted
    return total / tokens


if __name__ == "__main__":
    main()
