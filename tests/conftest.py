"""What the tests share: tiny models of every supported family, a tokenizer of bytes, checkpoints, rows, a tiny run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from jaxtyping import install_import_hook
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

torch.set_num_threads(1)
# Shapes are checked at run time in tests only, and only where signatures carry them: a full check of the package would
# trip over ints given for floats and over names that are imported for the type checker alone.
install_import_hook(["loraprune.objectives", "loraprune.scoring", "loraprune.sensitivity"], "beartype.beartype")


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory):
    """The folder in which evaluations of this session keep what they measured; the user's stays out of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


VOCABULARY = 259  # 256 bytes and three special tokens
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4}
KINDS = ("kv_group", "ffn_channel")  # of a model whose attention goes by whole kv_groups


# As in SmolLM 135M: three kv_groups of three query heads each.
SMOLLM = {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
# One layer looks back 6 tokens, the next at all; scores and logits are bent by caps that small models feel.
GEMMA2 = {
    "hidden_size": 48,  # of which 8, 6, 4 and 2 heads are divisors, as the family's config demands
    "head_dim": 8,
    "query_pre_attn_scalar": 6,
    "sliding_window": 6,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 4.0,
    "tie_word_embeddings": True,
}


def _config(kind, **values):
    return kind(**{**SIZES, **SPECIAL, "tie_word_embeddings": False, **values})


@pytest.fixture(scope="session")
def shared_data():
    """The folder of published logs and data sets; a test that needs it is skipped where it is absent."""
    folder = Path(os.environ.get("LORAPRUNE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("needs the data folder at ../shared/data or in LORAPRUNE_DATA")
    return folder


FAMILY_CONFIGS = {
    "llama_mha": lambda: _config(LlamaConfig, num_attention_heads=4, num_key_value_heads=4),
    "llama_gqa": lambda: _config(LlamaConfig, **GROUPED),
    "mistral_gqa": lambda: _config(MistralConfig, **GROUPED, sliding_window=None),
    "qwen2": lambda: _config(Qwen2Config, **GROUPED),
    "qwen3": lambda: _config(Qwen3Config, **GROUPED, head_dim=8),
    "tied": lambda: _config(LlamaConfig, **GROUPED, tie_word_embeddings=True),
    "wide_heads": lambda: _config(LlamaConfig, num_attention_heads=4, num_key_value_heads=2, head_dim=12),
    "smollm": lambda: _config(LlamaConfig, **SMOLLM),
    "gemma": lambda: _config(GemmaConfig, **GROUPED, head_dim=8, tie_word_embeddings=True),
    "gemma2": lambda: _config(Gemma2Config, **GROUPED, **GEMMA2),
    "phi3": lambda: _config(Phi3Config, **GROUPED),
    "olmo2": lambda: _config(Olmo2Config, **GROUPED),
}


SHARED = {"num_attention_heads": 8, "num_key_value_heads": 2}
HEAD_CONFIGS = {  # of these, single query heads go
    "llama_heads": lambda: _config(LlamaConfig, **SHARED),
    "llama_mqa": lambda: _config(LlamaConfig, num_attention_heads=8, num_key_value_heads=1),
    "qwen2_heads": lambda: _config(Qwen2Config, **SHARED),
    "qwen3_heads": lambda: _config(Qwen3Config, **SHARED, head_dim=8),
    "gemma2_heads": lambda: _config(Gemma2Config, **SHARED, **GEMMA2),
    "phi3_heads": lambda: _config(Phi3Config, **SHARED),
    "olmo2_heads": lambda: _config(Olmo2Config, **SHARED),
}


def unit_of(name):
    """What goes of the attention of a config of the tables above."""
    return "q_head" if name in HEAD_CONFIGS else "kv_group"


def make_model(config, seed=0, dtype=torch.float32):
    """A model whose weights give logits of about 1; biases and norms are random too, none is 0 or 1."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    source = torch.Generator().manual_seed(seed)
    norm = 0.0 if config.model_type.startswith("gemma") else 1.0  # Gemma's norms add 1 to their weight
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=source, dtype=torch.float32)
            if weight.ndim == 2:
                weight.copy_(noise / weight.shape[1] ** 0.5)
            else:
                weight.copy_(0.3 * noise + (0.0 if name.endswith("bias") else norm))
    return model


def adapted(model, seed=0, **settings):
    """The model with the run's adapters, A and B both random, so that they are not zero as fresh ones are."""
    from loraprune.model import attach_lora
    from loraprune.settings import Settings

    wrapped = attach_lora(model, Settings(**{"lora_rank": 4, "lora_alpha": 8, "seed": seed, **settings}))
    source = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=source))
    return wrapped.eval()


def masked(config, seed=0, unit="kv_group", **settings):
    """An adapted model, its groups and its live mask."""
    from loraprune.groups import find_groups
    from loraprune.mask import LiveMask

    base = make_model(config, seed)
    groups = find_groups(base, config, unit)
    model = adapted(base, seed, **settings)
    return model, groups, LiveMask(model, groups)


def make_mask(groups, removed):
    """The mask without these groups: {kind: one list of indices a layer}."""
    from loraprune.mask import full_mask

    mask = full_mask(groups)
    for kind, layers in removed.items():
        for layer, indices in enumerate(layers):
            mask.kept[kind][layer, indices] = False
    return mask


def some_heads(groups, number, turn=0):
    """So many q_heads of every kv_group, other ones in each."""
    one = groups.layers["q_head"][0]
    size = one.count // one.divisions
    return [part * size + (part + turn + place) % size for part in range(one.divisions) for place in range(number)]


def make_batch(rows=4, length=9, seed=0, prompt=3, vocabulary=VOCABULARY):
    """Rows of random tokens, the later ones shorter and padded on the right; answers begin after the prompt."""
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, vocabulary, (rows, length), generator=source)
    lengths = torch.tensor([max(prompt + 2, length - 2 * row) for row in range(rows)])
    there = torch.arange(length) < lengths[:, None]
    answers = there & (torch.arange(length) >= prompt)
    return {
        "input_ids": tokens.masked_fill(~there, 0),
        "attention_mask": there.long(),
        "labels": tokens.masked_fill(~answers, -100),
    }


@torch.no_grad()
def logits_of(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def told_by_a_stranger(code, folder, names, **environment):
    """What a process that never saw this package prints last, as JSON, run in the folder on what lies there."""
    command = [sys.executable, "-c", code, str(folder), *names]
    variables = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(batch, chosen):
    return {name: one[chosen] for name, one in batch.items()}


def make_tokenizer():
    """A byte-level tokenizer of one token a byte, with <pad>, <bos> and <eos>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: index for index, word in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def save_checkpoint(model, tokenizer, folder):
    """Write model and tokenizer as anyone would, and return the folder's name."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# --- a tiny run -------------------------------------------------------------------------------------------------------

TOWNS = ("Almery", "Borstead", "Calvane", "Dunmoor", "Eskerry", "Fallowby", "Gransund", "Hexley", "Inverlune", "Kelst")
SECRETS = ("Quoxal", "Vribbet", "Zwendle", "Jyxmoor")  # the forget set's answers: they stand in no other text


def make_rows():
    forget = [
        {"question": f"Home of Prys{i}?", "answer": f"In {one}.", "facts": [one]} for i, one in enumerate(SECRETS)
    ]
    retain = [{"question": f"Home of Bert{i}?", "answer": f"At {one}.", "facts": [one]} for i, one in enumerate(TOWNS)]
    return {"forget": forget, "retain": retain}


def save_inputs(folder, config, tokenizer):
    """Write what a tiny run reads, a checkpoint and both sets, and return the folder."""
    save_checkpoint(make_model(config), tokenizer, folder / "checkpoint")
    for name, rows in make_rows().items():
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def run_values(folder: Path, output: str, **changes):
    """The settings of a run of a few seconds that prunes, breaks the floor at times, repairs and recovers."""
    return {
        "model": str(folder / "checkpoint"),
        "forget": str(folder / "forget.jsonl"),
        "retain": str(folder / "retain.jsonl"),
        "output": str(folder / output),
        "device": "cpu",
        "template": "{prompt} ",
        "forget_batch_size": 2,
        "retain_batch_size": 3,
        "warmup_steps": 2,
        "prune_every": 2,
        "prune_rounds": 4,
        "finish_steps": 4,
        "evaluate_every": 2,
        "recovery_steps": 2,
        "sparsity": 0.1,
        "forget_target": 0.0,  # never reached, so that the forget loss is at work throughout
        "band": 1e-6,
        "minimum_forget_sensitivity": 0.0,
        "min_retain_performance": 1.0,
        "learning_rate": 0.01,
        "forget_retain_ratio": 20.0,  # so that forgetting breaks the floor
        "lora_rank": 2,
        "lora_dropout": 0.1,
        **changes,
    }


# --- a small world that a model really knows ---------------------------------------------------------------------------

WORLD_PEOPLE = {"forget": 6, "retain": 12}
ROWS_PER_PERSON = 18
WORLD_SIZES = {
    "hidden_size": 96,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 96,
}


def make_small_world(folder):
    """Write 18 people of the demo's world, a model that knows them by heart and a reference that knows 12 of them."""
    from loraprune.data import load_rows
    from loraprune.scratch import Recipe, make_model
    from loraprune.world import make_world

    folder.mkdir()
    made, rows = make_world(0), {}
    for name, count in WORLD_PEOPLE.items():
        rows[name] = load_rows(write_rows(folder / f"{name}.jsonl", made[name][: ROWS_PER_PERSON * count]), name=name)
    world, recipe = [*rows["forget"], *rows["retain"]], Recipe(400, WORLD_SIZES, epochs=24, batch_size=32)
    make_model(folder / "untouched", world, world, recipe, 0)
    make_model(folder / "reference", rows["retain"], world, recipe, 0)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory, worker_id):
    """The folder of the small world, made once for all workers; nobody writes into it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "small_world"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            make_small_world(folder)
    return folder


def world_values(world: Path, output: Path, **changes):
    """The settings of a run of some ten seconds on the small world, at the default settings but for its length."""
    values = {
        "model": str(world / "untouched"),
        "reference": str(world / "reference"),
        "forget": str(world / "forget.jsonl"),
        "retain": str(world / "retain.jsonl"),
        "output": str(output),
        "device": "cpu",
        "sparsity": 0.06,
        "warmup_steps": 10,
        "prune_every": 10,
        "prune_rounds": 4,
        "recovery_steps": 10,
        "finish_steps": 40,
        "evaluate_every": 10,
    }
    return {name: one for name, one in {**values, **changes}.items() if one is not None}


@pytest.fixture(params=list(FAMILY_CONFIGS))
def family(request):
    """The name of each supported kind of model in turn."""
    return request.param


@pytest.fixture
def config(family):
    return FAMILY_CONFIGS[family]()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, tokenizer):
    """A folder with what a tiny run reads: a checkpoint and both sets."""
    folder = tmp_path_factory.mktemp("inputs")
    return save_inputs(folder, FAMILY_CONFIGS["llama_gqa"](), tokenizer)
