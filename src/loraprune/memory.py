"""Memory: how many bytes a pass needs, found by running it on a few rows and extending to its real size.

Reads    a pass (a function of rows), its rows by set; the process's own size
Gives    traced, Footprint, footprint_of, peak_bytes, resident_bytes, Private, private_bytes
Source   -
Symbols  trace = bytes of the storages that a pass made and that are still alive, after each of its operations
"""

import re
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from weakref import ref

import psutil
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Rows = Mapping[str, Sequence[int]]  # of each set, by their places in it
Labels = Mapping[str, Mapping[int, int]]  # how many labels each row has
STATUS = Path("/proc/self/status")
FEW = 2  # rows of the smallest trial; operations on a single row sometimes need no copy, so one would mislead


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of storages that are made inside the block, until they die; `trace` is what lives when.

    What a kernel takes and gives back within one operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.trace: list[int] = []
        self._known: dict[int, ref[UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._meet((args, kwargs), made=False)
        result = func(*args, **(kwargs or {}))
        self._meet(result, made=True)
        self.trace.append(self.live)
        return result

    def _meet(self, values: Any, *, made: bool) -> None:
        for one in tree_leaves(values):
            if isinstance(one, Tensor):
                self._count(one.untyped_storage(), made)

    def _count(self, storage: UntypedStorage, made: bool) -> None:
        key, size = id(storage), storage.nbytes() if made else 0
        if key in self._known:
            return

        def forget(dead: object) -> None:
            self.live -= size
            del self._known[key]

        self.live += size
        self._known[key] = ref(storage, forget)


def traced(action: Callable[[], object]) -> tuple[int, ...]:
    """Return the bytes alive after each operation of an action; what was there before it is not counted."""
    with StorageTracker() as tracker:
        action()
    return tuple(tracker.trace)


@dataclass(frozen=True)
class Footprint:
    """What a pass takes with `rows` rows of each set, and how every moment of it grows with one row more of a set."""

    rows: Mapping[str, int]
    trace: tuple[int, ...]
    growth: Mapping[str, tuple[int, ...]]

    def peak(self, rows: Mapping[str, int]) -> int:
        """Return the most bytes alive at once with so many rows of each set; every moment is linear in them."""
        more = {name: rows[name] - self.rows[name] for name in self.growth}
        return max(
            here + sum(more[name] * one[moment] for name, one in self.growth.items())
            for moment, here in enumerate(self.trace)
        )


def footprint_of(run: Callable[[Rows], object], rows: Rows, labels: Labels) -> Footprint:
    """Return the footprint of `run` on rows of this kind, from passes on two rows of each set and one more of each.

    `labels` choose the row that stands for the others. Where a pass takes other operations for another number of rows,
    its peak alone is extended.
    """
    base = {name: min(FEW, len(one)) for name, one in rows.items()}
    grown = [name for name, one in rows.items() if len(one) > FEW]
    trials = [base, *({**base, name: FEW + 1} for name in grown)]
    traces = [traced(lambda some=some: run(fewer(rows, some, labels))) for some in trials]
    if len(set(map(len, traces))) > 1:
        traces = [(max(one),) for one in traces]
    growth = {
        name: tuple(more - less for more, less in zip(one, traces[0], strict=True))
        for name, one in zip(grown, traces[1:], strict=True)
    }
    return Footprint(base, traces[0], growth)


def fewer(rows: Rows, counts: Mapping[str, int], labels: Labels) -> dict[str, list[int]]:
    """Return so many rows of each set: the first, then the one of middle size over and over; all where all are asked.

    The first row of each set is to be its longest, so that padding stays as it is.
    """
    return {
        name: list(one) if counts[name] >= len(one) else [one[0], *[_typical(one, labels[name])] * (counts[name] - 1)]
        for name, one in rows.items()
    }


def _typical(rows: Sequence[int], labels: Mapping[int, int]) -> int:
    """Return the row, the first aside, whose number of labels is nearest to their mean."""
    rest = rows[1:] or rows
    mean = sum(labels[row] for row in rest) / len(rest)
    return min(rest, key=lambda row: abs(labels[row] - mean))


def affordable(footprint: Footprint, counts: Mapping[str, int], limit: int) -> dict[str, int]:
    """Return the counts, halved until they need no more than `limit` bytes or nothing is left to halve."""
    counts = dict(counts)
    while footprint.peak(counts) > limit and any(one > FEW for one in counts.values()):
        counts = {name: max(min(FEW, one), one // 2) for name, one in counts.items()}
    return counts


def peak_bytes() -> int:
    """Return the most memory that this process ever held.

    On Linux not getrusage's ru_maxrss: the kernel hands a parent's on to its child, through exec too, so that a run
    started by a large process would begin with what that once held.
    """
    status = STATUS.read_bytes() if psutil.LINUX else b""
    if found := re.search(rb"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE):  # some sandboxes have no such line
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_bytes() -> int:
    """Return what this process holds of the machine's memory."""
    return psutil.Process().memory_info().rss


class Private(NamedTuple):
    """What a process holds that is no file's, weights mapped from a checkpoint being a file's: now, and at most."""

    now: int
    most: int  # since it began, with its files as they are mapped now

    def grown(self, before: "Private") -> int:
        """Return by how much it has grown at most; by how much it is larger now where it was larger before still."""
        return max(self.now, self.most if self.most > before.most else 0) - before.now


def private_bytes() -> Private | None:
    """Return what this process holds of its own; None on systems that do not tell it from mapped files."""
    if not psutil.LINUX:
        return None
    held: Any = psutil.Process().memory_info()
    return Private(held.rss - held.shared, peak_bytes() - held.shared)
