"""Evaluation table: a number stands with its interval, and with its rows where these are not all."""

import pytest

from loraprune.evaluation_table import cell
from loraprune.evidence import ROLES, metric_rows

VALUE = {"value": 0.5, "interval": [0.25, 0.75]}


@pytest.mark.parametrize(
    ("entry", "rows", "written"),
    [
        ({"value": 0.5}, 8, "0.500"),
        ({**VALUE, "rows": 8}, 8, "0.500 (0.250 to 0.750)"),
        ({**VALUE, "rows": 6}, 8, "0.500 (0.250 to 0.750; 6 rows)"),
        ({"value": 0.5, "members": 6}, 8, "0.500 (6 rows)"),
        ({**VALUE, "rows": 6}, None, "0.500 (0.250 to 0.750)"),
        ({"missing": "no holdout"}, 8, ""),
    ],
)
def test_a_cell_says_on_what_its_value_stands(entry, rows, written):
    assert cell(entry, rows) == written


def test_beside_other_models_a_number_that_is_missing_says_why():
    missing = {"missing": "no holdout"}
    of_model = {"forget_quality": VALUE, "membership": {"min_k": missing}, "privleak": missing}
    rows = {role: {"model": of_model} for role in ROLES}
    assert {name: cells for name, *cells in metric_rows(rows)} == {
        "forget quality, p": ["0.500 (0.250 to 0.750)"] * 3,
        "min-k AUC, forget against holdout": ["not measured: no holdout"] * 3,
        "privleak, %": ["not measured: no holdout"] * 3,
    }
