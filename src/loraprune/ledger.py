"""Ledger: which requests a model has gone through, and what the model before the first of them knew.

Reads    the reproduce.json that an unlearned model brings along: in its folder, or in the run's folder around it
Gives    Ledger, read_ledger
Source   -
Symbols  an entry is one request; a set of rows is known by the hash of its content alone
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraprune.errors import UserError
from loraprune.records import Removal

Values = dict[str, Any]
FILE = "reproduce.json"


@dataclass(frozen=True)
class Ledger:
    """The requests so far, oldest first, and what the model before them knew of each set; empty for a first one."""

    entries: tuple[Values, ...] = ()
    original: Mapping[str, Values] | None = None  # by set: examples_sha256, performance, loss, row_performance
    of_other_weights: bool = False  # whether one lies beside the model that is not of it and was left aside

    def known(self, name: str, examples_sha256: str) -> Values | None:
        """Return the original model's numbers on a set, None where the ledger knows other rows, or in another form."""
        numbers = (self.original or {}).get(name)
        return numbers if numbers is not None and numbers["examples_sha256"] == examples_sha256 else None

    def next_id(self, asked: str | None) -> str:
        """Return the request's id: as asked, or its number; raise UserError for one that is taken."""
        taken = [one["request_id"] for one in self.entries]
        if asked in taken:
            raise UserError(
                f"the ledger of the model already holds a request {asked}.",
                "two requests under one id could not be told apart afterwards.",
                "choose another --request-id, or leave it out.",
            )
        return asked or f"request-{len(taken) + 1}"


def read_ledger(model: str, weights_sha256: str | None) -> Ledger:
    """Return the ledger of a model's folder; an empty one where there is none, or where it is of other weights."""
    folder = Path(model)
    found = [one / FILE for one in (folder, folder.parent) if folder.is_dir() and (one / FILE).exists()]
    ledgers = [values for path in found if (values := json.loads(path.read_text(encoding="utf-8"))).get("ledger")]
    for values in ledgers:
        if values["weights_sha256"]["after"] == weights_sha256:
            return Ledger(tuple(values["ledger"]), values["original"])
    return Ledger(of_other_weights=bool(ledgers))


def removed_by_layer(
    removals: Sequence[Removal], kept_by_layer: Mapping[str, Sequence[int]]
) -> dict[str, list[list[int]]]:
    """Return the removed groups' numbers, a list a layer for each kind; they count as in the parent model."""
    removed = {kind: [[] for _ in kept] for kind, kept in kept_by_layer.items()}
    for one in removals:
        removed[one.group.kind][one.group.layer].append(one.group.index)
    return {kind: [sorted(layer) for layer in layers] for kind, layers in removed.items()}
