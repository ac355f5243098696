"""What a model writes by itself depends neither on its neighbours in the batch nor on how they are padded."""

import pytest
import torch
from conftest import FAMILY_CONFIGS, adapted, make_model, make_tokenizer

from loraprune.generation import end_tokens, generate

PROMPTS = [[5, 6, 7], [9], [30, 2, 31, 32, 33, 34], [5, 6], [41, 42, 43, 44], [100] * 9]
OPTIONS = {"pad_token_id": 0, "end_token_ids": [2], "max_new_tokens": 12}


def model_of(family="llama_gqa"):
    return make_model(FAMILY_CONFIGS[family]())


@torch.no_grad()
def slow_greedy(model, prompt, ends=(2,), count=12):
    """The most likely token over and over, nothing cached, one prompt alone."""
    written = []
    while len(written) < count:
        token = int(model(input_ids=torch.tensor([[*prompt, *written]])).logits[0, -1].argmax())
        if token in ends:
            break
        written.append(token)
    return written


@pytest.mark.parametrize("family", ["llama_gqa", "qwen2", "mistral_gqa"])
@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_greedy_answers_are_those_of_a_plain_loop_whatever_the_batch(family, batch_size):
    model = model_of(family)
    found = generate(model, PROMPTS, batch_size=batch_size, **OPTIONS)
    assert found == [[slow_greedy(model, prompt)] for prompt in PROMPTS]


def test_an_answer_ends_before_the_first_end_token():
    model = model_of()
    whole = slow_greedy(model, PROMPTS[0])
    ends = [whole[3], whole[7]]
    [[cut], *_] = generate(model, PROMPTS, batch_size=6, **{**OPTIONS, "end_token_ids": ends})
    assert cut == slow_greedy(model, PROMPTS[0], ends)
    assert len(cut) < len(whole)


def test_the_checkpoints_own_defaults_of_generation_count_for_nothing_and_stay():
    model = model_of()
    plain = generate(model, PROMPTS, batch_size=6, **OPTIONS)
    own = model.generation_config
    own.do_sample, own.temperature, own.repetition_penalty, own.max_new_tokens = True, 5.0, 9.0, 2
    own.suppress_tokens = plain[0][0][:2]
    assert generate(model, PROMPTS, batch_size=6, **OPTIONS) == plain
    assert model.generation_config is own


def test_samples_are_the_same_for_a_seed_and_differ_between_seeds():
    model = model_of()
    options = {**OPTIONS, "samples": 3, "temperature": 1.0, "batch_size": 4}
    first = generate(model, PROMPTS, seed=1, **options)
    before = torch.get_rng_state()
    assert generate(model, PROMPTS, seed=1, **options) == first
    assert (torch.get_rng_state() == before).all()
    assert generate(model, PROMPTS, seed=2, **options) != first
    assert all(len(one) == 3 and len({tuple(each) for each in one}) == 3 for one in first)


def test_samples_follow_the_whole_distribution_at_the_temperature():
    model = model_of()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    count = 3000
    for temperature in (0.5, 2.0):
        options = {**OPTIONS, "max_new_tokens": 1, "end_token_ids": [], "samples": count, "temperature": temperature}
        [drawn] = generate(model, PROMPTS[:1], batch_size=1000, **options)
        shares = torch.tensor([token for [token] in drawn]).bincount(minlength=259) / count
        assert (shares - (logits / temperature).softmax(-1)).abs().max() < 0.03
        assert (shares > 0).sum() > 50  # no tail is cut off


def test_adapters_take_part_and_the_mode_is_left_as_it_was():
    model = adapted(model_of())
    model.train()
    found = generate(model, PROMPTS, batch_size=6, **OPTIONS)
    assert model.training
    model.eval()
    assert found == [[slow_greedy(model, prompt)] for prompt in PROMPTS]
    assert found != generate(model_of(), PROMPTS, batch_size=6, **OPTIONS)


def test_compat_hides_what_equals_the_padding():
    model = model_of()
    options = {**OPTIONS, "pad_token_id": 2, "batch_size": 6}
    right, quirk = generate(model, PROMPTS, **options), generate(model, PROMPTS, compat="open-unlearning", **options)
    assert right == generate(model, PROMPTS, batch_size=1, **OPTIONS)
    assert [one != other for one, other in zip(right, quirk, strict=True)] == [2 in prompt for prompt in PROMPTS]


def test_progress_counts_every_answer_once():
    seen = []
    generate(model_of(), PROMPTS, batch_size=4, samples=2, advance=seen.append, **OPTIONS)
    assert seen == [4, 4, 4]


def test_a_prompt_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no token"):
        generate(model_of(), [[]], batch_size=1, **OPTIONS)


def test_all_tokens_that_end_an_answer_are_known():
    model = model_of()
    assert end_tokens(model, make_tokenizer()) == [2]
    model.generation_config.eos_token_id = [2, 9]
    assert end_tokens(model, make_tokenizer()) == [2, 9]
