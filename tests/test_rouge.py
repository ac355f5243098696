"""ROUGE is what its definition says: words in common, stems of them, in any order or in this one."""

import pytest

from loraprune.rouge import rouge


def longest_common(one, other):
    """The length of the longest common subsequence, by its recursion."""
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return longest_common(one[:-1], other[:-1]) + 1
    return max(longest_common(one[:-1], other), longest_common(one, other[:-1]))


def test_scores_are_those_of_a_plain_count():
    answer, written = "the old man sold his red boat", "his boat the old man sold and burnt"
    [found] = rouge([answer], [written])
    words, others = answer.split(), written.split()
    common = sum(word in others for word in words)
    assert found.rouge1_recall == pytest.approx(common / len(words))
    assert found.rouge1_f1 == pytest.approx(2 * common / (len(words) + len(others)))
    longest = longest_common(words, others)
    assert found.rougeL_recall == pytest.approx(longest / len(words))
    assert found.rougeL_f1 == pytest.approx(2 * longest / (len(words) + len(others)))


def test_case_punctuation_and_endings_of_words_do_not_count():
    [found] = rouge(["She was walking, slowly."], ["she was walked slow"])
    assert found.rouge1_recall == pytest.approx(3 / 4)  # walking = walked by their stem, slowly is not slow


def test_nothing_written_scores_nothing():
    [found] = rouge(["a word"], [""])
    assert (found.rouge1_recall, found.rougeL_f1) == (0, 0)
