"""What can be read as a set, and what is said when it cannot: the file and the row, never the row's text."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loraprune.errors import UserError
from loraprune.sources import HubName, load_rows, parse_hub_name

SECRET = "Basil Mahfouz"
QUESTIONS = [
    {"question": "Who wrote it?", "answer": f"{SECRET} wrote it."},
    {"question": "Born when?", "answer": "On 08/09/1956."},
]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def write_lines(path: Path, *records: object) -> str:
    return write(path, "".join(f"{json.dumps(record)}\n" for record in records))


def refuse(source: str, columns: dict[str, str] | None = None, name: str = "forget") -> str:
    with pytest.raises(UserError) as caught:
        load_rows(source, name=name, columns=columns)
    assert SECRET not in str(caught.value), "an error shows a row's text"
    return str(caught.value)


def pairs(source: str, columns: dict[str, str] | None = None) -> list[tuple[str, str]]:
    return [(row.prompt, row.answer) for row in load_rows(source, name="forget", columns=columns)]


EXPECTED = [(record["question"], record["answer"]) for record in QUESTIONS]


DATA = Path(os.environ.get("LORAPRUNE_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the data folder at ../shared/data or in LORAPRUNE_DATA")
def test_tofu_as_published_is_read_whole():
    forget, retain, full = (pairs(str(DATA / "tofu" / f"{part}.json")) for part in ("forget10", "retain90", "full"))
    assert (len(forget), len(retain)) == (400, 3600)
    assert retain + forget == full


class TestFormats:
    def test_json_lines(self, tmp_path):
        assert pairs(write_lines(tmp_path / "a.jsonl", *QUESTIONS)) == EXPECTED

    def test_json_lines_under_the_name_json_with_escaped_slashes_as_tofu_has_them(self, tmp_path):
        text = "\n".join(json.dumps(record).replace("/", "\\/") for record in QUESTIONS)
        assert "08\\/09" in text
        assert pairs(write(tmp_path / "a.json", text)) == EXPECTED

    def test_json_lines_of_one_line_under_the_name_json(self, tmp_path):
        assert pairs(write_lines(tmp_path / "a.json", QUESTIONS[0])) == EXPECTED[:1]

    def test_json_array_and_object_with_data(self, tmp_path):
        assert pairs(write(tmp_path / "a.json", json.dumps(QUESTIONS, indent=1))) == EXPECTED
        assert pairs(write(tmp_path / "b.json", json.dumps({"data": QUESTIONS}))) == EXPECTED

    def test_a_line_separator_inside_a_json_string_ends_no_line(self, tmp_path):
        line = '{"question": "a\u2028b", "answer": "c\u0085d"}\n'
        assert pairs(write(tmp_path / "a.jsonl", line)) == [("a\u2028b", "c\u0085d")]

    def test_byte_order_mark_and_windows_line_ends_are_no_text(self, tmp_path):
        text = "\ufeff" + "\r\n".join(json.dumps(record) for record in QUESTIONS)
        (tmp_path / "a.jsonl").write_bytes(text.encode())
        assert pairs(str(tmp_path / "a.jsonl")) == EXPECTED

    def test_csv_with_quoted_commas_and_line_breaks(self, tmp_path):
        with (tmp_path / "a.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["question", "answer", "facts"], ["a, b?", "c\nd", "d"], ["e?", "f", ""]])
        rows = load_rows(str(tmp_path / "a.csv"), name="retain")
        assert [(row.number, row.prompt, row.answer, row.facts) for row in rows] == [
            (1, "a, b?", "c\nd", ("d",)),
            (2, "e?", "f", ()),
        ]

    def test_parquet(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(QUESTIONS), tmp_path / "a.parquet")
        assert pairs(str(tmp_path / "a.parquet")) == EXPECTED

    def test_folder_saved_by_datasets(self, tmp_path):
        from datasets import Dataset

        Dataset.from_list(QUESTIONS).save_to_disk(str(tmp_path / "saved"))
        assert pairs(str(tmp_path / "saved")) == EXPECTED

    def test_folder_of_splits_needs_a_split(self, tmp_path):
        from datasets import Dataset, DatasetDict

        splits = {"train": Dataset.from_list(QUESTIONS), "test": Dataset.from_list(QUESTIONS[:1])}
        DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
        assert pairs(f"{tmp_path / 'saved'}:test") == EXPECTED[:1]
        said = refuse(str(tmp_path / "saved"))
        assert "holds 2 splits and none is chosen" in said and "its splits are train, test" in said
        said = refuse(f"{tmp_path / 'saved'}:tset")
        assert "has no split tset" in said and "saved:test" in said

    def test_text_documents_apart_by_end_of_text(self, tmp_path):
        source = write(tmp_path / "a.txt", "one\n\nstill one\n<|endoftext|>\ntwo\n<|endoftext|>\n")
        rows = load_rows(source, name="retain")
        assert [(row.number, row.messages, row.answer) for row in rows] == [(1, (), "one\n\nstill one"), (5, (), "two")]

    def test_text_documents_apart_by_blank_lines(self, tmp_path):
        rows = load_rows(write(tmp_path / "a.txt", "\none\nstill one\n \n\ntwo\n"), name="retain")
        assert [(row.number, row.answer) for row in rows] == [(2, "one\nstill one"), (6, "two")]

    def test_text_one_document_a_line(self, tmp_path):
        rows = load_rows(write(tmp_path / "a.txt", "one\ntwo\nthree"), name="retain")
        assert [(row.number, row.text) for row in rows] == [(1, "one"), (2, "two"), (3, "three")]

    def test_row_numbers_of_json_lines_are_line_numbers(self, tmp_path):
        lines = [json.dumps(QUESTIONS[0]), "", "", json.dumps(QUESTIONS[1])]
        assert [row.number for row in load_rows(write(tmp_path / "a.jsonl", "\n".join(lines)), name="forget")] == [1, 4]

    def test_reading_a_local_file_needs_no_datasets(self, tmp_path):
        source = write_lines(tmp_path / "a.jsonl", *QUESTIONS)
        code = (
            f"import sys; from loraprune.data import load_rows; load_rows({source!r}, name='forget'); "
            "print([name for name in ('datasets', 'transformers', 'pyarrow') if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


class TestColumns:
    @pytest.mark.parametrize(
        ("record", "prompt", "answer"),
        [
            ({"question": "q", "answer": "a"}, "q", "a"),
            ({"instruction": "q", "response": "a"}, "q", "a"),
            ({"instruction": "q", "input": "i", "output": "a"}, "q\n\ni", "a"),
            ({"instruction": "q", "input": "", "output": "a"}, "q", "a"),
            ({"prompt": "q", "completion": "a"}, "q", "a"),
            ({"text": "a"}, "", "a"),
            ({"text": "t", "question": "q", "answer": "a"}, "q", "a"),
        ],
    )
    def test_usual_names_are_understood(self, tmp_path, record, prompt, answer):
        assert pairs(write_lines(tmp_path / "a.jsonl", record)) == [(prompt, answer)]

    def test_chat_messages_keep_their_roles(self, tmp_path):
        turns = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")]
        record = {"messages": [{"role": role, "content": content} for role, content in turns]}
        (row,) = load_rows(write_lines(tmp_path / "a.jsonl", record), name="forget")
        assert row.messages == tuple(turns[:-1])
        assert (row.prompt, row.answer, row.text) == ("s\nu\na\nv", "b", "s\nu\na\nv\nb")

    def test_prompt_and_completion_may_be_conversations(self, tmp_path):
        record = {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "completion": [{"role": "assistant", "content": "a"}],
        }
        (row,) = load_rows(write_lines(tmp_path / "a.jsonl", record), name="forget")
        assert (row.messages, row.answer) == ((("system", "s"), ("user", "u")), "a")

    def test_columns_can_be_named(self, tmp_path):
        source = write_lines(tmp_path / "a.jsonl", {"q": "q", "a": "a is one", "f": ["one"], "id": 7})
        columns = {"prompt": "q", "answer": "a", "facts": "f", "fact_id": "id"}
        (row,) = load_rows(source, name="forget", columns=columns)
        assert (row.prompt, row.answer, row.facts, row.fact_id) == ("q", "a is one", ("one",), "7")
        assert pairs(write_lines(tmp_path / "b.jsonl", {"body": "b", "text": "t"}), {"text": "body"}) == [("", "b")]

    def test_one_named_column_leaves_the_others_as_usual(self, tmp_path):
        source = write_lines(tmp_path / "a.jsonl", {"question": "q", "answer": "a", "paraphrased_answer": "p"})
        assert pairs(source, {"answer": "paraphrased_answer"}) == [("q", "p")]

    def test_facts_and_fact_ids_are_read(self, tmp_path):
        record = {"question": "q", "answer": "a b", "facts": "b", "fact_id": "x"}
        other = {"question": "q", "answer": "a b", "facts": None, "fact_id": None}
        rows = load_rows(write_lines(tmp_path / "a.jsonl", record, other), name="forget")
        assert [(row.facts, row.fact_id) for row in rows] == [(("b",), "x"), ((), None)]

    def test_answers_in_other_words_and_wrong_ones_are_read(self, tmp_path):
        record = {"question": "q", "answer": "a", "paraphrased_answer": "b", "perturbed_answer": ["c", "d"]}
        other = {"question": "r", "answer": "a", "paraphrased_answer": None, "perturbed_answer": "e"}
        rows = load_rows(write_lines(tmp_path / "a.jsonl", record, other), name="forget")
        assert [row.paraphrased_answer for row in rows] == ["b", None]
        assert [row.perturbed_answers for row in rows] == [("c", "d"), ("e",)]
        said = refuse(write_lines(tmp_path / "b.jsonl", record | {"perturbed_answer": [1]}))
        assert "perturbed answers that are neither a string nor a list of strings: row 1." in said

    def test_questions_in_other_words_and_subjects_are_read(self, tmp_path):
        record = {"question": "q", "answer": "a", "paraphrased_question": "p", "subject": 7}
        other = {"question": "r", "answer": "a", "paraphrased_question": ["s", "t"], "subject": ""}
        rows = load_rows(write_lines(tmp_path / "a.jsonl", record, other), name="forget")
        assert [row.paraphrased_questions for row in rows] == [("p",), ("s", "t")]
        assert [row.subject for row in rows] == ["7", None]

    def test_an_unknown_column_is_refused_with_the_nearest(self, tmp_path):
        said = refuse(write_lines(tmp_path / "a.jsonl", *QUESTIONS), {"prompt": "questions", "answer": "answer"})
        assert "the forget set has no column 'questions'" in said
        assert "write 'question' for 'questions' in --columns" in said

    def test_an_unknown_role_is_refused_with_the_nearest(self, tmp_path):
        said = refuse(write_lines(tmp_path / "a.jsonl", *QUESTIONS), {"promt": "question"})
        assert "--columns has no role 'promt'" in said and "write 'prompt'" in said

    def test_columns_that_fit_no_form_are_refused(self, tmp_path):
        said = refuse(write_lines(tmp_path / "a.jsonl", {"q": SECRET, "a": "x"}))
        assert "the forget set's columns are not understood: q, a." in said
        assert "question and answer" in said and "--columns" in said

    def test_a_csv_without_header_does_not_show_its_first_row_as_column_names(self, tmp_path):
        said = refuse(write(tmp_path / "a.csv", f"Who is it?,It is {SECRET}.\nWho else?,Nobody.\n"))
        assert "2 that are no plain names (is there a header?)" in said


class TestRefusals:
    def test_a_missing_file_is_not_sought_on_the_hub(self, tmp_path, monkeypatch):
        write_lines(tmp_path / "forget.jsonl", *QUESTIONS)
        monkeypatch.chdir(tmp_path)
        said = refuse("forgot.jsonl")
        assert "the forget set's file forgot.jsonl does not exist." in said
        assert "its folder holds forget.jsonl" in said and "give --forget" in said
        for source in (
            "data/forget.jsonl",
            "./forget",
            "~/nothing",
            "/nowhere/at/all",
            "some/deep/folder",
            "x.parquet",
        ):
            assert "does not exist" in refuse(source)

    def test_an_unknown_suffix(self, tmp_path):
        said = refuse(write(tmp_path / "a.xlsx", SECRET))
        assert "a.xlsx has a format that is not read" in said and ".jsonl, .json, .csv, .parquet, .txt" in said

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
    def test_an_empty_set(self, tmp_path, name):
        assert "the retain set is empty." in refuse(write(tmp_path / name, "\n"), name="retain")

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
    def test_a_broken_line_is_named_by_its_number(self, tmp_path, name):
        good = json.dumps(QUESTIONS[0])
        said = refuse(write(tmp_path / name, f'{good}\n\n{{"question": "{SECRET}"\n{good}\n'))
        assert f"the forget set's file {name} has a line that is not valid JSON: line 3." in said

    def test_a_broken_first_line_of_json_lines_under_the_name_json(self, tmp_path):
        good = json.dumps(QUESTIONS[0])
        assert "line 1." in refuse(write(tmp_path / "a.json", f'{{"question": "{SECRET}"\n{good}\n'))

    def test_a_broken_json_array_is_named_by_its_line(self, tmp_path):
        said = refuse(write(tmp_path / "a.json", f'[\n{{"question": "{SECRET}"}},\n{{"question" 1}}\n]'))
        assert "a.json is not valid JSON: line 3." in said

    def test_lines_and_items_that_are_not_objects(self, tmp_path):
        assert "not a JSON object: line 2" in refuse(write_lines(tmp_path / "a.jsonl", QUESTIONS[0], SECRET))
        assert "not a JSON object: item 2" in refuse(write(tmp_path / "a.json", json.dumps([QUESTIONS[0], SECRET])))

    def test_a_file_that_is_not_utf8(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}')
        assert "a.jsonl is not UTF-8 at byte 13." in refuse(str(tmp_path / "a.jsonl"))

    def test_a_file_that_may_not_be_read(self, tmp_path, monkeypatch):
        def refuse_reading(*arguments, **options):
            raise PermissionError(SECRET)

        source = write_lines(tmp_path / "a.jsonl", *QUESTIONS)
        monkeypatch.setattr(Path, "read_text", refuse_reading)
        assert "a.jsonl cannot be read (PermissionError)" in refuse(source)

    def test_broken_csv_and_parquet(self, tmp_path):
        assert "a.csv is not valid CSV" in refuse(write(tmp_path / "a.csv", f'question,answer\n"{SECRET},x\n'))
        assert "a row with more fields than its header: row 1" in refuse(
            write(tmp_path / "b.csv", f"question,answer\na,b,{SECRET}\n")
        )
        assert "a.parquet is not a valid Parquet file" in refuse(write(tmp_path / "a.parquet", SECRET))

    def test_a_folder_that_datasets_did_not_save(self, tmp_path):
        assert "was not saved by `datasets`" in refuse(str(tmp_path))
        (tmp_path / "state.json").write_text("{}")
        assert "cannot be read by datasets" in refuse(str(tmp_path))
        assert "holds one set, not the split train" in refuse(f"{tmp_path}:train")

    @pytest.mark.parametrize("answer", [None, "", "  ", 3, ["x"], {"x": 1}])
    def test_rows_without_an_answer_are_named_together(self, tmp_path, answer):
        good, bad = QUESTIONS[0], {"question": SECRET, "answer": answer}
        said = refuse(write_lines(tmp_path / "a.jsonl", good, bad, good, bad, {"question": SECRET}))
        kind = "messages that are not objects" if answer == ["x"] else "no answer (missing, empty or not a string)"
        assert kind in said and "row" in said and "2" in said and "--forget" in said

    def test_at_most_five_rows_are_named(self, tmp_path):
        said = refuse(write_lines(tmp_path / "a.jsonl", *[{"question": "q", "answer": ""}] * 12))
        assert "rows 1, 2, 3, 4, 5 and 7 more." in said

    def test_a_row_without_a_prompt(self, tmp_path):
        said = refuse(write_lines(tmp_path / "a.jsonl", {"question": None, "answer": SECRET}))
        assert "the forget set has no prompt (missing, empty or not a string): row 1." in said

    @pytest.mark.parametrize(
        ("messages", "expected"),
        [
            ([{"role": "user", "content": SECRET}], "do not end with the assistant's answer"),
            ([{"role": "assistant", "content": SECRET}], "do not end with the assistant's answer to a message"),
            ([], "a missing or empty list of messages"),
            (SECRET, "a missing or empty list of messages"),
            ([SECRET], "messages that are not objects with a role and a content"),
            ([{"role": "user", "content": None}], "no content (missing, empty or not a string)"),
        ],
    )
    def test_conversations_that_cannot_be_learned_from(self, tmp_path, messages, expected):
        said = refuse(write_lines(tmp_path / "a.jsonl", {"messages": messages}))
        assert expected in said and "row 1." in said

    def test_half_a_surrogate_pair(self, tmp_path):
        said = refuse(write(tmp_path / "a.jsonl", '{"question": "q", "answer": "\\ud83d"}'))
        assert "a broken character in its answer" in said and "row 1." in said

    def test_facts_that_do_not_stand_in_the_answer(self, tmp_path):
        good = {"question": "q", "answer": "a b", "facts": ["b"]}
        bad = {"question": "q", "answer": "a b", "facts": ["b", SECRET]}
        said = refuse(write_lines(tmp_path / "a.jsonl", good, bad))
        assert "facts that do not stand in the answer, letter for letter: row 2." in said
        said = refuse(write_lines(tmp_path / "b.jsonl", good | {"facts": [3]}))
        assert "facts that are neither a string nor a list of strings: row 1." in said


class TestHub:
    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("wikitext", HubName("wikitext", None, "train")),
            ("locuslab/TOFU:forget10", HubName("locuslab/TOFU", "forget10", "train")),
            ("locuslab/TOFU:forget10:test", HubName("locuslab/TOFU", "forget10", "test")),
            ("locuslab/TOFU::test", HubName("locuslab/TOFU", None, "test")),
            ("locuslab/TOFU::train[:100]", HubName("locuslab/TOFU", None, "train[:100]")),
        ],
    )
    def test_name_config_split(self, source, expected):
        assert parse_hub_name(source) == expected

    def test_rows_come_from_load_dataset(self, monkeypatch):
        import datasets

        asked = []

        def load_dataset(*names, split):
            asked.append((*names, split))
            return datasets.Dataset.from_list(QUESTIONS)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert pairs("locuslab/TOFU:forget10") == EXPECTED
        assert asked == [("locuslab/TOFU", "forget10", "train")]

    def test_a_failing_hub_is_a_users_error(self, monkeypatch):
        import datasets

        def fail_with(error: Exception) -> str:
            def load_dataset(*names, split):
                raise error

            monkeypatch.setattr(datasets, "load_dataset", load_dataset)
            return refuse("locuslab/TOFU:forget11")

        said = fail_with(ConnectionError(SECRET))
        assert "the forget set locuslab/TOFU (config forget11, split train) cannot be loaded." in said
        assert "the hub gave ConnectionError." in said and "the network" in said
        said = fail_with(ValueError("BuilderConfig 'forget11' not found. Available: ['forget10']\nmore"))
        assert "ValueError: BuilderConfig 'forget11' not found. Available: ['forget10']." in said

    def test_what_is_no_hub_name_is_refused_without_the_hub(self):
        assert "is neither a file, a folder nor a hub name" in refuse("what is this?")
        assert "is neither a file, a folder nor a hub name" in refuse(":config")
