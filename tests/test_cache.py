"""What was measured is kept under the content it was measured on: nothing is done twice, nothing stale is taken."""

import json
import math
from pathlib import Path

import pytest
from conftest import FAMILY_CONFIGS, make_model, save_checkpoint

from loraprune.cache import Cache, cache_folder, checkpoint_identity
from loraprune.errors import UserError


def counting(columns):
    calls = []

    def make():
        calls.append(1)
        return columns

    return make, calls


def test_columns_are_made_once_and_come_back_digit_for_digit(tmp_path):
    columns = {"loss": [0.1 + 0.2, 1e-300, 1 / 3], "min_k": [math.nan, 1.0, -2.5]}
    make, calls = counting(columns)
    cache = Cache(tmp_path / "new" / "folder")
    for _ in range(3):
        found = cache.kept({"rows": "a", "weights": "b"}, make)
        assert found["loss"] == columns["loss"]
        assert math.isnan(found["min_k"][0]) and found["min_k"][1:] == [1.0, -2.5]
    assert len(calls) == 1
    Cache(tmp_path / "new" / "folder").kept({"weights": "b", "rows": "a"}, make)
    assert len(calls) == 1


def test_another_identity_none_and_no_folder_are_made_anew(tmp_path):
    make, calls = counting({"loss": [1.0]})
    cache = Cache(tmp_path)
    for identity in ({"rows": "a"}, {"rows": "b"}, None, None):
        cache.kept(identity, make)
    Cache(None).kept({"rows": "a"}, make)
    assert len(calls) == 5
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("below", ["file", "file/folder"])
def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path, below):
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        Cache(tmp_path / below)
    assert "cannot be written" in str(caught.value)
    assert "--cache none" in str(caught.value)


def test_a_failure_leaves_nothing_behind(tmp_path):
    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path).kept({"rows": "a"}, fails)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_something_else_changed_is_an_error_not_a_number(tmp_path):
    make, _ = counting({"loss": [1.0]})
    Cache(tmp_path).kept({"rows": "a"}, make)
    [file] = tmp_path.iterdir()
    file.write_text(json.dumps({"else": 1}), encoding="utf-8")
    with pytest.raises(UserError, match="is no file of this program's cache"):
        Cache(tmp_path).kept({"rows": "a"}, make)


def test_the_folder_is_the_settings_the_environments_or_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAPRUNE_CACHE", str(tmp_path / "mine"))
    assert cache_folder("none") is None
    assert cache_folder(str(tmp_path / "here")) == tmp_path / "here"
    assert cache_folder("auto") == tmp_path / "mine"
    monkeypatch.delenv("LORAPRUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("auto") == tmp_path / "loraprune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("auto") == Path.home() / ".cache" / "loraprune"


def test_a_checkpoint_is_known_by_its_files_content(tmp_path, tokenizer):
    folder = tmp_path / "model"
    model = make_model(FAMILY_CONFIGS["llama_gqa"]())
    save_checkpoint(model, tokenizer, folder)
    first = checkpoint_identity(str(folder), None)
    copy = save_checkpoint(model, tokenizer, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("a card says nothing to the numbers", encoding="utf-8")
    assert checkpoint_identity(copy, None) == first
    (tmp_path / "copy" / "merges.txt").write_text("a b", encoding="utf-8")  # what a tokenizer is made of
    assert checkpoint_identity(copy, None) != first
    config = folder / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("1e-06", "1e-05"), encoding="utf-8")
    assert checkpoint_identity(str(folder), None) != first
    other = save_checkpoint(make_model(FAMILY_CONFIGS["llama_gqa"](), seed=1), tokenizer, tmp_path / "other")
    assert checkpoint_identity(other, None) != first


def test_a_hub_model_is_known_by_its_commit_or_not_at_all():
    assert checkpoint_identity("owner/name", "abc") == "owner/name@abc"
    assert checkpoint_identity("owner/name", None) is None
