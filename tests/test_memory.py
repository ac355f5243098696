"""Memory: what is tracked is what a hand counts, and a few rows foretell many."""

import subprocess
import sys

import psutil
import pytest
import torch

from loraprune import memory
from loraprune.memory import (
    FEW,
    Private,
    StorageTracker,
    affordable,
    fewer,
    footprint_of,
    peak_bytes,
    private_bytes,
    resident_bytes,
    traced,
)

FLOAT = 4  # bytes


def two_matrices(rows, gradients=False):
    x = torch.randn(rows, 4)
    first, second = torch.randn(4, 8, requires_grad=gradients), torch.randn(8, 2, requires_grad=gradients)
    return x, first, second


def test_a_trace_is_the_sum_that_a_hand_counts():
    x, first, second = two_matrices(rows=5)
    hidden, result = 5 * 8 * FLOAT, 5 * 2 * FLOAT
    assert traced(lambda: x @ first @ second) == (hidden, hidden + result)


def test_what_dies_is_given_back_and_gradients_stay():
    x, first, second = two_matrices(rows=5, gradients=True)
    with StorageTracker() as tracker:
        (x @ first @ second).sum().backward()
    assert tracker.live == (first.numel() + second.numel()) * FLOAT
    # back at the second product: the hidden states, the gradient of the result (a view of one number) and its copy
    assert max(tracker.trace) >= 5 * 8 * FLOAT + tracker.live


def test_views_and_what_was_there_before_count_nothing():
    x = torch.randn(6, 4)
    assert traced(lambda: x.view(4, 6).t()[1:].add_(1)) == (0, 0, 0, 0)


def test_two_rows_and_one_more_foretell_any_number_for_each_set():
    x, first, second = two_matrices(rows=50, gradients=True)
    y = torch.randn(50, 7)

    def run(rows):
        loss = (x[list(rows["a"])] @ first @ second).tanh().sum() + y[list(rows["b"])].exp().sum()
        loss.backward()
        first.grad = second.grad = None

    rows = {"a": list(range(50)), "b": list(range(50))}
    labels = {name: dict.fromkeys(range(50), 1) for name in rows}
    footprint = footprint_of(run, rows, labels)
    for counts in ({"a": 5, "b": 5}, {"a": 2, "b": 50}, {"a": 50, "b": 3}):
        direct = max(traced(lambda counts=counts: run({name: rows[name][:count] for name, count in counts.items()})))
        assert footprint.peak(counts) == direct


def test_a_pass_of_two_rows_is_not_extended():
    footprint = footprint_of(lambda rows: torch.ones(len(rows["a"]), 10), {"a": [3, 4]}, {"a": {3: 1, 4: 1}})
    assert (footprint.growth, footprint.peak({"a": 2})) == ({}, 2 * 10 * FLOAT)


def test_where_the_operations_differ_the_peak_is_extended():
    def run(rows):
        first = torch.ones(len(rows["a"]), 10)
        return first.clone() if len(rows["a"]) > FEW else first

    footprint = footprint_of(run, {"a": [0, 1, 2, 3]}, {"a": dict.fromkeys(range(4), 1)})
    assert footprint.trace == (80,) and footprint.growth == {"a": (160,)}


def test_fewer_rows_are_the_longest_and_the_one_of_middle_size():
    labels = {"a": {7: 90, 3: 1, 5: 6, 9: 10}}
    assert fewer({"a": [7, 3, 5, 9]}, {"a": 3}, labels) == {"a": [7, 5, 5]}
    assert fewer({"a": [7, 3, 5, 9]}, {"a": 4}, labels) == {"a": [7, 3, 5, 9]}


def test_a_trial_is_halved_until_it_fits():
    footprint = footprint_of(
        lambda rows: torch.ones(len(rows["a"]), 10), {"a": list(range(64))}, {"a": dict.fromkeys(range(64), 1)}
    )
    assert affordable(footprint, {"a": 64}, 64 * 40) == {"a": 64}
    assert affordable(footprint, {"a": 64}, 64 * 40 - 1) == {"a": 32}
    assert affordable(footprint, {"a": 64}, 1) == {"a": 2}


def test_what_the_process_holds_grows_with_what_it_fills():
    before = resident_bytes()
    held = torch.ones(50_000_000, dtype=torch.uint8)
    assert resident_bytes() - before >= 0.9 * held.nbytes


@pytest.mark.skipif(not psutil.LINUX, reason="other systems tell only what getrusage tells")
def test_a_process_does_not_begin_with_the_peak_of_the_one_that_started_it():
    filler = torch.ones(500_000_000, dtype=torch.uint8)
    asked = [sys.executable, "-c", "from loraprune.memory import peak_bytes; print(peak_bytes())"]
    peak = int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    assert 0 < peak < peak_bytes() - 0.5 * filler.nbytes


@pytest.mark.skipif(not psutil.LINUX, reason="other systems tell only what getrusage tells")
def test_where_the_system_tells_no_peak_it_is_what_getrusage_tells(tmp_path, monkeypatch):
    told, status = peak_bytes(), tmp_path / "status"
    status.write_bytes(b"Name:\tpyth\xc3\xb6n\nVmRSS:\t1 kB\n")
    monkeypatch.setattr(memory, "STATUS", status)
    assert peak_bytes() >= 0.9 * told


@pytest.mark.skipif(not psutil.LINUX, reason="other systems do not tell a process's own memory from mapped files")
def test_growth_is_seen_although_it_was_given_back():
    filler = torch.ones(max(0, private_bytes().most - private_bytes().now), dtype=torch.uint8)  # as full as ever
    before = private_bytes()
    size = torch.ones(60_000_000, dtype=torch.uint8).nbytes  # too large a piece for the C library to keep
    assert private_bytes().now - before.now < 0.2 * size <= 0.9 * size <= private_bytes().grown(before)
    del filler


def test_where_it_was_larger_before_growth_is_what_is_held_now():
    assert Private(now=120, most=500).grown(Private(now=100, most=500)) == 20
    assert Private(now=120, most=510).grown(Private(now=100, most=500)) == 410
