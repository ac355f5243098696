"""A checkpoint that cannot be pruned is refused in three lines before anything of it is loaded."""

import json

import pytest
import torch
from conftest import FAMILY_CONFIGS, adapted, make_model, save_checkpoint

from loraprune.errors import UserError
from loraprune.model import (
    attach_lora,
    checked_config,
    checkpoint_bytes,
    load_model,
    load_tokenizer,
    merged,
    pad_token_id,
    parameter_count,
    weight_files,
    weight_shapes,
    weights_hash,
)
from loraprune.settings import Settings


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A name that is no folder is looked for on the hub; here that fails at once."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    return save_checkpoint(make_model(FAMILY_CONFIGS["llama_gqa"]()), tokenizer, tmp_path / "checkpoint")


def settings(name):
    return Settings(model=str(name), device="cpu")


def refusal(function, name):
    with pytest.raises(UserError) as caught:
        function(str(name), settings(name))
    assert all((caught.value.what, caught.value.why, caught.value.fix))
    return caught.value


def test_a_model_that_is_not_there_is_refused(tmp_path):
    error = refusal(checked_config, tmp_path / "nowhere")
    assert error.what.startswith(f"there is no model {tmp_path / 'nowhere'}")
    assert error.why == "a model is a folder with config.json and *.safetensors, or a name on the hub."
    assert error.fix == "correct the path of the model."


def test_a_folder_without_config_is_refused(tmp_path):
    error = refusal(checked_config, tmp_path)
    assert str(tmp_path) in error.what


def test_a_broken_config_is_refused(checkpoint, tmp_path):
    (tmp_path / "checkpoint" / "config.json").write_text('{"model_type": "llama", ')
    assert checkpoint in refusal(checked_config, checkpoint).what


def test_an_architecture_that_is_not_in_the_table_is_refused_by_name(checkpoint, tmp_path):
    (tmp_path / "checkpoint" / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    )
    error = refusal(checked_config, checkpoint)
    assert error.what == "the architecture GPT2LMHeadModel is not known to loraprune."
    assert error.why == "cutting a model whose structure is guessed gives a broken one."
    assert error.fix == (
        "use a model of one of these: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, "
        "GemmaForCausalLM, Gemma2ForCausalLM, Phi3ForCausalLM, Olmo2ForCausalLM."
    )


def test_a_model_type_that_transformers_does_not_know_is_refused(checkpoint, tmp_path):
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps({"model_type": "neverheardof"}))
    error = refusal(checked_config, checkpoint)
    assert error.what.startswith(f"the architecture of {checkpoint} is not known:")
    assert "neverheardof" in error.what
    assert "LlamaForCausalLM" in error.fix and "Olmo2ForCausalLM" in error.fix


def test_a_model_without_safetensors_is_refused_and_its_pickle_is_not_opened(checkpoint, tmp_path):
    (tmp_path / "checkpoint" / "model.safetensors").unlink()
    (tmp_path / "checkpoint" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    error = refusal(checked_config, checkpoint)
    assert error.what == f"{checkpoint} holds no *.safetensors."
    assert error.why == "weights in other formats are pickles, which run code when they are read."
    assert error.fix == "convert the model to safetensors first."


def test_a_model_without_tokenizer_is_refused(tmp_path):
    folder = save_checkpoint(make_model(FAMILY_CONFIGS["llama_gqa"]()), None, tmp_path / "mute")
    error = refusal(load_tokenizer, folder)
    assert error.what == f"{folder} has no tokenizer that can be loaded."
    assert error.why == "without the tokenizer the model was trained with, every number would be about other text."
    assert error.fix == "put tokenizer.json and tokenizer_config.json beside the weights."


def test_every_familys_checkpoint_passes_and_loads_as_it_was(family, tmp_path, tokenizer):
    model = make_model(FAMILY_CONFIGS[family]())
    folder = save_checkpoint(model, tokenizer, tmp_path)
    config = checked_config(folder, settings(folder))
    loaded = load_model(folder, settings(folder))
    assert config.model_type == model.config.model_type
    assert not loaded.training
    assert loaded.dtype == torch.float32
    for name, one in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], one)


def test_headers_say_the_shape_of_every_weight(checkpoint):
    shapes = weight_shapes(checkpoint)
    assert shapes == {
        name: tuple(one.shape) for name, one in make_model(FAMILY_CONFIGS["llama_gqa"]()).state_dict().items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_loaded_in_the_format_that_is_asked_for_and_adapters_stay_float32(checkpoint, dtype):
    asked = Settings(model=checkpoint, device="cpu", dtype=dtype)
    model = load_model(checkpoint, asked)
    assert {one.dtype for one in model.parameters()} == {getattr(torch, dtype)}
    adapters = [one for one in attach_lora(model, asked).parameters() if one.requires_grad]
    assert {one.dtype for one in adapters} == {torch.float32}


def test_auto_takes_the_checkpoints_own_format(tmp_path, tokenizer):
    folder = save_checkpoint(make_model(FAMILY_CONFIGS["llama_gqa"](), dtype=torch.bfloat16), tokenizer, tmp_path)
    assert load_model(folder, settings(folder)).dtype == torch.bfloat16


def test_gradient_checkpointing_is_switched_on_where_it_is_asked_for(checkpoint):
    plain, saving = (
        attach_lora(load_model(checkpoint, settings(checkpoint)), Settings(gradient_checkpointing=one))
        for one in (False, True)
    )
    assert not plain.is_gradient_checkpointing
    assert saving.is_gradient_checkpointing


def test_padding_is_the_pad_token_or_else_the_end_or_else_anything(tokenizer):
    class Bare:
        pad_token_id = None
        eos_token_id = None

    class Ends(Bare):
        eos_token_id = 7

    assert [pad_token_id(one) for one in (tokenizer, Ends(), Bare())] == [0, 7, 0]


def test_a_checkpoints_hash_changes_with_any_bit_of_its_weights(checkpoint, tmp_path):
    before = weights_hash(checkpoint)
    assert weights_hash(checkpoint) == before
    file = tmp_path / "checkpoint" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert weights_hash(checkpoint) != before
    assert weights_hash("some/hub-name") is None


def test_sizes_are_counted_from_the_files_and_the_parameters(checkpoint, tmp_path):
    assert weight_files(tmp_path / "checkpoint") == [tmp_path / "checkpoint" / "model.safetensors"]
    assert checkpoint_bytes(checkpoint) == (tmp_path / "checkpoint" / "model.safetensors").stat().st_size
    assert checkpoint_bytes("some/hub-name") is None
    model = make_model(FAMILY_CONFIGS["tied"]())
    assert parameter_count(model) == sum({one.data_ptr(): one.numel() for one in model.parameters()}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_those_that_are_written_and_the_old_ones_come_back_bit_for_bit(dtype):
    model = adapted(make_model(FAMILY_CONFIGS["llama_gqa"](), dtype=dtype))
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    tokens = torch.arange(3, 12)[None]
    apart = model(input_ids=tokens).logits
    with merged(model):
        inside = model(input_ids=tokens).logits
    assert all(torch.equal(one, before[name]) for name, one in model.named_parameters())
    assert torch.equal(model(input_ids=tokens).logits, apart)
    written = model.merge_and_unload()(input_ids=tokens).logits
    assert torch.equal(inside, written)
