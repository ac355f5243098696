"""What the model is asked to learn or forget, token by token; which rows are withheld; what stands in both sets."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from loraprune.batches import PairedBatches
from loraprune.data import (
    NO_LABEL,
    Example,
    Overlap,
    Row,
    batches_by_length,
    collate,
    data_hash,
    encode,
    find_overlap,
    normalise,
    prompt_ids,
    refuse_overlap,
    split_retain,
)
from loraprune.errors import UserError

QUESTION, ANSWER = "Who wrote the Žižek essays?", "Basil Mahfouz wrote them in Zürich 😀 once, Basil says."
ROW = Row(3, (("user", QUESTION),), ANSWER, facts=("Basil", "Zürich 😀"))
TEXT = Row(4, (), f"{QUESTION} {ANSWER}", facts=("Zürich",))

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMING = CHATML.replace("message.content", "message.content | trim")
THINKING = CHATML.replace(
    "{{ message.content }}",
    "{% if loop.last and message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message.content }}",
)


def make_tokenizer(chat_template: str | None = None, trim_offsets: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a BOS of its own, as Llama 3 has it."""
    specials = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f"Question: {QUESTION}\nAnswer: {ANSWER}"] * 2, trainer)
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim_offsets), bos])
    return wrap(tokenizer, chat_template)


def make_metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE over ▁ that marks words at their beginning and appends an end of sequence by itself."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    specials = ["<s>", "</s>", "<pad>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([f"Question: {QUESTION}\nAnswer: {ANSWER}"] * 2, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in specials[:2]]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return wrap(tokenizer, None)


def wrap(tokenizer: Tokenizer, chat_template: str | None) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = chat_template
    return wrapped


def labelled(example: Example, tokenizer) -> str:
    return tokenizer.decode([label for label in example.labels if label != NO_LABEL])


def marked(example: Example, tokenizer) -> str:
    return tokenizer.decode([token for token, fact in zip(example.input_ids, example.facts, strict=True) if fact])


def encode_one(row: Row, tokenizer, **options) -> Example:
    (example,) = encode([row], tokenizer, name="forget", **options)
    return example


def refuse(*rows: Row, tokenizer=None, **options) -> str:
    with pytest.raises(UserError) as caught:
        encode(rows, tokenizer or make_tokenizer(), name="forget", **options)
    assert "Basil" not in str(caught.value) and "Žižek" not in str(caught.value), "an error shows a row's text"
    return str(caught.value)


class TestPlainTemplate:
    def test_the_model_reads_question_and_answer_between_bos_and_eos(self):
        tokenizer = make_tokenizer()
        example = encode_one(ROW, tokenizer)
        assert tokenizer.decode(example.input_ids) == f"<s>Question: {QUESTION}\nAnswer: {ANSWER}</s>"

    @pytest.mark.parametrize("trim_offsets", [True, False])
    def test_labels_are_the_answer_and_eos_alone(self, trim_offsets):
        tokenizer = make_tokenizer(trim_offsets=trim_offsets)
        example = encode_one(ROW, tokenizer)
        assert labelled(example, tokenizer) == f" {ANSWER}</s>"  # " Basil" is one token, the template's space within
        assert all(label in (token, NO_LABEL) for token, label in zip(example.input_ids, example.labels, strict=True))

    def test_a_tokenizer_that_appends_eos_itself_gets_no_second(self):
        tokenizer = make_metaspace_tokenizer()
        example = encode_one(ROW, tokenizer)
        assert example.input_ids.count(tokenizer.eos_token_id) == 1
        assert example.labels[-1] == tokenizer.eos_token_id
        assert labelled(example, tokenizer).strip() == f"{ANSWER}</s>"

    def test_a_token_across_the_boundary_is_the_answers(self):
        tokenizer = make_tokenizer()
        row = Row(1, (("user", "It is Ba"),), "sil")
        example = encode_one(row, tokenizer, template="{prompt}")
        assert labelled(example, tokenizer) == " Basil</s>"  # " Ba" + "sil" are one token, which the prompt cannot own
        assert tokenizer.decode(prompt_ids(row, tokenizer, template="{prompt}")) == "<s>It is"

    def test_without_a_space_in_the_template_the_labels_are_the_answer_to_the_letter(self):
        tokenizer = make_tokenizer()
        example = encode_one(ROW, tokenizer, template="{prompt}\n")
        assert labelled(example, tokenizer) == f"{ANSWER}</s>"

    def test_braces_in_a_prompt_are_text(self):
        tokenizer = make_tokenizer()
        row = Row(1, (("user", "{x} {prompt} {0}"),), "Basil")
        assert "{x} {prompt} {0}" in tokenizer.decode(encode_one(row, tokenizer).input_ids)

    def test_a_template_without_prompt_is_refused(self):
        said = refuse(ROW, template="Answer: ")
        assert "does not contain {prompt}" in said and "--template" in said

    def test_a_tokenizer_without_eos_ends_with_the_answer(self):
        tokenizer = make_tokenizer()
        tokenizer.eos_token = None
        assert labelled(encode_one(ROW, tokenizer), tokenizer) == f" {ANSWER}"


class TestChatTemplate:
    @pytest.mark.parametrize("template", [CHATML, TRIMMING, THINKING])
    def test_labels_are_the_answer_and_what_the_template_appends(self, template):
        tokenizer = make_tokenizer(template)
        assert labelled(encode_one(ROW, tokenizer), tokenizer) == f"{ANSWER}<|im_end|>\n"

    def test_the_template_writes_all_special_tokens(self):
        tokenizer = make_tokenizer(CHATML)
        example = encode_one(ROW, tokenizer)
        asked = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(example.input_ids) == f"{asked}{ANSWER}<|im_end|>\n"
        assert tokenizer.decode(prompt_ids(ROW, tokenizer)) == asked

    def test_a_template_that_writes_the_date_writes_the_same_one_every_day(self):
        dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        tokenizer = make_tokenizer(dated + "{{ date_string }} " + CHATML)
        assert tokenizer.decode(prompt_ids(ROW, tokenizer)).startswith("26 Jul 2024 ")

    def test_earlier_answers_of_a_conversation_are_prompt(self):
        tokenizer = make_tokenizer(CHATML)
        row = Row(1, (("user", "Who?"), ("assistant", "Basil"), ("user", "Who?")), "Basil", facts=("Basil",))
        example = encode_one(row, tokenizer)
        assert labelled(example, tokenizer) == "Basil<|im_end|>\n"
        assert marked(example, tokenizer) == "Basil"

    def test_an_answer_in_which_the_template_sees_thoughts_still_has_labels(self):
        splitting = THINKING.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")
        tokenizer = make_tokenizer(splitting)
        row = Row(1, (("user", "Who?"),), "hm</think>Basil")
        assert labelled(encode_one(row, tokenizer), tokenizer).endswith("Basil<|im_end|>\n")

    def test_another_template_than_the_default_replaces_the_tokenizers(self):
        tokenizer = make_tokenizer(CHATML)
        example = encode_one(ROW, tokenizer, template="{prompt}\n")
        assert tokenizer.decode(example.input_ids) == f"<s>{QUESTION}\n{ANSWER}</s>"

    def test_a_template_that_rewrites_the_prompt_is_refused(self):
        rewriting = "{% if add_generation_prompt %}A{% else %}B{% endif %}{{ messages[-1].content }}"
        said = refuse(ROW, tokenizer=make_tokenizer(rewriting))
        assert "chat template cannot write row 3 of the forget set" in said and "--template" in said

    def test_a_template_that_drops_the_answer_is_refused(self):
        dropping = CHATML.replace("message in messages", "message in messages if message.role == 'user'")
        assert "cannot write row 3" in refuse(ROW, tokenizer=make_tokenizer(dropping))

    def test_a_template_that_refuses_a_role_is_a_users_error(self):
        refusing = "{{ raise_exception('no ' + messages[0].content) }}"
        assert "refuses the conversation's roles or their order" in refuse(ROW, tokenizer=make_tokenizer(refusing))


class TestPlainText:
    @pytest.mark.parametrize("template", [None, CHATML])
    def test_every_token_but_bos_is_a_label(self, template):
        tokenizer = make_tokenizer(template)
        example = encode_one(TEXT, tokenizer)
        assert example.input_ids[0] == tokenizer.bos_token_id and example.labels[0] == NO_LABEL
        assert labelled(example, tokenizer) == TEXT.text
        assert prompt_ids(TEXT, tokenizer) == [tokenizer.bos_token_id]

    def test_without_bos_the_first_token_is_no_label_since_nothing_predicts_it(self):
        tokenizer = make_tokenizer()
        tokenizer._tokenizer.post_processor = processors.ByteLevel()
        example = encode_one(TEXT, tokenizer)
        assert example.labels == (NO_LABEL, *example.input_ids[1:])
        assert prompt_ids(TEXT, tokenizer) == []


class TestFacts:
    @pytest.mark.parametrize("trim_offsets", [True, False])
    @pytest.mark.parametrize("template", [None, CHATML, TRIMMING])
    def test_the_mask_decodes_to_every_occurrence_of_the_facts(self, trim_offsets, template):
        tokenizer = make_tokenizer(template, trim_offsets)
        assert marked(encode_one(ROW, tokenizer), tokenizer).split() == ["Basil", "Zürich", "😀", "Basil"]

    def test_a_template_that_trims_the_answer_moves_no_mark(self):
        tokenizer = make_tokenizer(TRIMMING)
        example = encode_one(Row(1, ROW.messages, "  It is Basil. ", facts=("Basil",)), tokenizer)
        assert labelled(example, tokenizer) == "It is Basil.<|im_end|>\n"
        assert marked(example, tokenizer).strip() == "Basil"

    def test_tokens_that_mark_words_by_their_beginning(self):
        tokenizer = make_metaspace_tokenizer()
        assert marked(encode_one(ROW, tokenizer), tokenizer).split() == ["Basil", "Zürich", "😀", "Basil"]

    def test_a_fact_named_in_the_question_is_marked_in_the_answer_alone(self):
        tokenizer = make_tokenizer()
        row = Row(1, (("user", "Is Basil Basil?"),), "Basil.", facts=("Basil",))
        example = encode_one(row, tokenizer)
        assert marked(example, tokenizer).strip() == "Basil"
        assert all(label != NO_LABEL for label, fact in zip(example.labels, example.facts, strict=True) if fact)

    def test_a_fact_in_a_plain_text(self):
        tokenizer = make_tokenizer()
        assert marked(encode_one(TEXT, tokenizer), tokenizer).strip() == "Zürich"

    def test_a_row_without_facts_has_no_marks_and_no_mark_is_on_eos(self):
        tokenizer = make_tokenizer()
        assert not any(encode_one(Row(1, ROW.messages, ANSWER), tokenizer).facts)
        assert encode_one(Row(1, ROW.messages, "Basil", facts=("Basil",)), tokenizer).facts[-2:] == (True, False)


class TestSlowTokenizer:
    def test_labels_are_the_answer_and_one_eos(self):
        tokenizer = ByT5Tokenizer()
        example = encode_one(ROW, tokenizer)
        assert not tokenizer.is_fast
        assert tokenizer.decode(example.input_ids) == f"Question: {QUESTION}\nAnswer: {ANSWER}</s>"
        assert labelled(example, tokenizer) == f" {ANSWER}</s>"
        assert tokenizer.decode(prompt_ids(ROW, tokenizer)) == f"Question: {QUESTION}\nAnswer:"

    def test_plain_text_is_labelled_and_facts_are_not_marked(self):
        tokenizer = ByT5Tokenizer()
        example = encode_one(TEXT, tokenizer)
        assert labelled(example, tokenizer) == TEXT.text[1:]
        assert not any(example.facts)


class TestLength:
    def test_rows_are_cut_from_the_right(self):
        tokenizer = make_tokenizer()
        whole = encode_one(ROW, tokenizer)
        short = len(whole.input_ids) - 4
        cut = encode_one(ROW, tokenizer, max_length=short)
        assert (cut.input_ids, cut.labels) == (whole.input_ids[:short], whole.labels[:short])
        assert len(cut.facts) == short

    def test_rows_that_keep_no_answer_are_refused_by_number(self):
        rows = [Row(number, ROW.messages, ANSWER) for number in range(1, 8)]
        said = refuse(*rows, TEXT, max_length=5)
        assert "7 of 8 rows of the forget set keep no answer token: rows 1, 2, 3, 4, 5 and 2 more." in said
        assert "raise --max-length (5)" in said

    @pytest.mark.parametrize("template", [None, CHATML])
    def test_what_generation_is_given_is_what_stands_before_the_first_label(self, template):
        tokenizer = make_tokenizer(template)
        example = encode_one(ROW, tokenizer)
        first = next(position for position, label in enumerate(example.labels) if label != NO_LABEL)
        assert prompt_ids(ROW, tokenizer) == list(example.input_ids[:first])


def make_examples(*lengths: int, first: int = 0) -> list[Example]:
    """Examples that say who they are: every token of example i is first + i."""
    return [
        Example(
            (first + index,) * length, (NO_LABEL, *[first + index] * (length - 1)), (False,) * (length - 1) + (True,)
        )
        for index, length in enumerate(lengths)
    ]


class TestBatches:
    def test_shapes_types_and_padding_on_the_right(self):
        batch = collate(make_examples(2, 4, first=5), pad_token_id=9)
        assert batch["input_ids"].tolist() == [[5, 5, 9, 9], [6, 6, 6, 6]]
        assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
        assert batch["labels"].tolist() == [[-100, 5, -100, -100], [-100, 6, 6, 6]]
        assert batch["facts"].tolist() == [[False, True, False, False], [False, False, False, True]]
        assert [batch[key].dtype for key in ("input_ids", "attention_mask", "labels")] == [torch.int64] * 3
        assert batch["facts"].dtype == torch.bool

    def test_a_padding_token_that_is_also_eos_hides_no_eos(self):
        tokenizer = make_tokenizer()
        examples = encode([ROW, Row(1, ROW.messages, "Basil")], tokenizer, name="forget")
        batch = collate(examples, pad_token_id=tokenizer.eos_token_id)
        assert (batch["labels"] == tokenizer.eos_token_id).sum(dim=1).tolist() == [1, 1]

    def test_padding_changes_no_loss(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        tokenizer = make_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        model = LlamaForCausalLM(config).eval()
        examples = encode([Row(1, ROW.messages, "Basil"), ROW], tokenizer, name="forget")
        alone, padded = collate(examples[:1], pad_token_id=2), collate(examples, pad_token_id=2)
        length = alone["input_ids"].shape[1]
        with torch.no_grad():
            ours, theirs = (
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0, :length]
                for batch in (alone, padded)
            )
        assert torch.allclose(ours, theirs, atol=1e-6)
        assert (padded["labels"][0, length:] == NO_LABEL).all() and not padded["facts"][0, length:].any()

    def test_by_length_every_example_occurs_once_and_neighbours_are_alike(self):
        batches = batches_by_length(make_examples(5, 2, 9, 2, 5), 2)
        assert batches == [[1, 3], [0, 4], [2]]


def make_pairs(retain: int = 7, forget: int | None = 3, seed: int = 0, **sizes: int) -> PairedBatches:
    return PairedBatches(
        make_examples(*[3] * retain),
        None if forget is None else make_examples(*[2] * forget, first=100),
        retain_batch_size=sizes.get("retain_batch_size", 2),
        forget_batch_size=sizes.get("forget_batch_size", 2),
        pad_token_id=0,
        seed=seed,
        steps=range(14),
    )


def drawn(pairs: PairedBatches, name: str) -> list[int]:
    return [int(token) for step in range(len(pairs)) for token in pairs[step][name]["input_ids"][:, 0]]


class TestPairedBatches:
    def test_every_epoch_of_a_set_holds_every_example_once_in_a_new_order(self):
        order = drawn(make_pairs(), "retain")
        epochs = [order[begin : begin + 7] for begin in range(0, 28, 7)]
        assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 4
        assert len({tuple(epoch) for epoch in epochs}) > 1
        forget = drawn(make_pairs(), "forget")
        assert [sorted(forget[begin : begin + 3]) for begin in range(0, 27, 3)] == [[100, 101, 102]] * 9

    def test_a_step_depends_on_seed_and_step_alone(self):
        whole, resumed = make_pairs(), make_pairs()
        for step in (13, 2, 13, 5):
            for name in ("retain", "forget"):
                assert torch.equal(whole[step][name]["input_ids"], resumed[step][name]["input_ids"])
        assert drawn(make_pairs(seed=1), "retain") != drawn(make_pairs(seed=0), "retain")

    def test_one_sets_data_does_not_depend_on_the_other(self):
        assert drawn(make_pairs(forget=9, forget_batch_size=3), "retain") == drawn(make_pairs(), "retain")

    def test_a_set_smaller_than_its_batch_is_the_batch(self):
        pairs = make_pairs(forget=3, forget_batch_size=8)
        assert sorted(pairs[5]["forget"]["input_ids"][:, 0].tolist()) == [100, 101, 102]

    def test_without_a_forget_set_there_is_no_forget_batch(self):
        assert set(make_pairs(forget=None)[0]) == {"retain"}

    def test_it_has_an_end_though_its_shuffles_have_none(self):
        pairs = make_pairs()
        assert len(list(pairs)) == len(pairs) == 14
        with pytest.raises(IndexError):
            pairs[14]


def make_rows(count: int) -> list[Row]:
    return [Row(number, (("user", f"question {number}"),), f"answer {number}") for number in range(1, count + 1)]


def parts(rows: list[Row], seed: int = 0) -> list[list[Row]]:
    split = split_retain(rows, seed)
    return [split.taught, split.floor, split.final]


class TestSplitRetain:
    @pytest.mark.parametrize(
        ("count", "sizes"), [(100, [80, 10, 10]), (3, [1, 1, 1]), (4, [2, 1, 1]), (16, [12, 2, 2])]
    )
    def test_eighty_ten_ten_and_no_part_empty(self, count, sizes):
        assert [len(part) for part in parts(make_rows(count))] == sizes

    def test_every_row_is_in_one_part_in_the_files_order(self):
        split = parts(make_rows(50))
        assert sorted(row.number for part in split for row in part) == list(range(1, 51))
        assert all([row.number for row in part] == sorted(row.number for row in part) for part in split)

    def test_the_seed_decides(self):
        rows = make_rows(50)
        assert split_retain(rows, 1) == split_retain(rows, 1)
        assert split_retain(rows, 1) != split_retain(rows, 2)

    def test_rows_that_say_the_same_are_never_split_apart(self):
        rows = [
            Row(number, (("user", f"form {number}"),), f"answer {number}", fact_id=str(number // 3))
            for number in range(60)
        ]
        for part in parts(rows):
            assert all(sum(row.fact_id == other.fact_id for other in part) == 3 for row in part)

    def test_equal_texts_stay_together_even_where_only_one_has_a_fact_id(self):
        tied = [
            Row(101, (("user", "Who?"),), "Basil.", fact_id="x"),
            Row(102, (("user", "WHO"),), "basil"),
            Row(103, (("user", "Name him."),), "It is Basil", fact_id="x"),
        ]
        for seed in range(20):
            held = [{row.number for row in part} & {101, 102, 103} for part in parts(make_rows(6) + tied, seed)]
            assert sorted(len(numbers) for numbers in held) == [0, 0, 3]

    def test_fewer_than_three_units_are_refused(self):
        with pytest.raises(UserError) as caught:
            split_retain([*make_rows(2), Row(3, (("user", "Question 2!"),), "Answer 2.")], 0)
        assert "the retain set has 3 rows but only 2 that differ; a split needs 3." in str(caught.value)
        assert "--retain" in str(caught.value)


def ask(number: int, answer: str, prompt: str = "Who") -> Row:
    return Row(number, (("user", prompt),), answer)


STORY = "one two three four five six seven eight nine ten eleven twelve"


class TestOverlap:
    def test_normalise_sees_no_case_punctuation_width_or_space(self):
        assert normalise("  Ｗho\u00a0wrote—“It”?\n") == "who wrote it"
        assert normalise("STRASSE") == normalise("Straße")
        assert normalise("हिन्दी") != normalise("हनद")  # vowel signs are letters' parts, not punctuation
        assert normalise("1+1=2") != normalise("1 1 2")

    def test_rows_equal_but_for_form_are_exact(self):
        overlap = find_overlap([ask(4, "Basil.")], [ask(7, "Nobody"), ask(8, "  BASIL! "), ask(9, "basil")])
        assert overlap == Overlap(exact=((4, 8), (4, 9)), near=())

    def test_a_row_within_a_longer_one_is_near(self):
        overlap = find_overlap([Row(1, (), f"zero {STORY} thirteen")], [Row(5, (), STORY)])
        assert overlap == Overlap(exact=(), near=((1, 5, 1.0),))

    def test_near_rows_come_highest_first_and_distant_ones_not_at_all(self):
        words = STORY.split()
        retain = [Row(1, (), " ".join([*words[:9], "a", "b", "c"])), Row(2, (), " ".join([*words[:11], "a"]))]
        retain += [Row(3, (), " ".join([*words[:6], *"abcdef"]))]
        overlap = find_overlap([Row(1, (), STORY)], retain)
        assert overlap.near == ((1, 2, 7 / 8), (1, 1, 5 / 8))

    def test_short_rows_of_different_answers_do_not_overlap(self):
        assert find_overlap([ask(1, "in Rome")], [ask(1, "in Paris")]) == Overlap((), ())

    def test_a_template_shared_by_many_rows_makes_no_pair(self):
        template = "What is the full name of the author born in the city of"
        forget = [ask(number, f"x{number}", template) for number in range(30)]
        retain = [ask(number, f"y{number}", template) for number in range(30)]
        assert find_overlap(forget, retain) == Overlap((), ())
        assert find_overlap(forget[:1], retain[:1]).near != ()

    def test_five_thousand_rows_against_five_thousand(self):
        words = [f"w{index}" for index in range(2000)]
        source = random.Random(0)

        def make(count: int) -> list[Row]:
            return [
                ask(number, " ".join(source.choices(words, k=20)), "What is the name of") for number in range(count)
            ]

        forget, retain = make(5000), make(5000)
        retain[17] = forget[4321]
        assert find_overlap(forget, retain) == Overlap(exact=((4321, 4321),), near=())

    def test_equal_rows_are_refused_by_number_and_near_ones_are_not(self):
        overlap = find_overlap([ask(4, "Basil."), ask(5, "x")], [ask(8, "BASIL")])
        with pytest.raises(UserError) as caught:
            refuse_overlap(overlap, allow_overlap=False)
        said = str(caught.value)
        assert "1 row of the forget set stands in the retain set: forget row 4 = retain row 8." in said
        assert "--allow-overlap" in said and "asil" not in said.lower().replace("--", "")
        refuse_overlap(overlap, allow_overlap=True)
        refuse_overlap(Overlap((), ((1, 2, 0.9),)), allow_overlap=False)

    def test_at_most_five_pairs_are_named(self):
        overlap = find_overlap(make_rows(9), make_rows(9))
        with pytest.raises(
            UserError, match=r"9 rows of the forget set stand.*forget row 5 = retain row 5 and 4 more\."
        ):
            refuse_overlap(overlap, allow_overlap=False)


class TestDataHash:
    def test_it_is_the_contents_alone(self):
        rows = make_rows(3)
        renumbered = [Row(row.number + 7, row.messages, row.answer) for row in rows]
        assert data_hash(rows) == data_hash(renumbered) and len(data_hash(rows)) == 64

    def test_every_part_of_a_row_and_the_order_count(self):
        row = Row(1, (("user", "q"),), "a b", facts=("a",), fact_id="x")
        others = [
            Row(1, (("system", "q"),), "a b", ("a",), "x"),
            Row(1, (("user", "q"),), "a", ("a",), "x"),
            Row(1, (("user", "q"),), "a b", ("b",), "x"),
            Row(1, (("user", "q"),), "a b", ("a",), "y"),
        ]
        assert len({data_hash([row]), *(data_hash([other]) for other in others)}) == 5
        assert data_hash(others) != data_hash(others[::-1])
