"""The system under test: what every scenario drives, and stand-ins whose answers are known.

A SUT is issued groups of sample indices and later says that they are done. Four ways to have one:
the embedded models, ``FromCallable`` around a plain function, an object of your own that follows
``SystemUnderTest``, and the known-answer stand-ins ``Sleep`` and ``Echo``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, final, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from distbench.clock import Now, now_ns
from distbench.errors import ModelError, UsageError
from distbench.samples import FAILED, PENDING, SampleLog

FOREVER = 2**63 - 1
"""``until_ns`` of a ``poll`` that may wait for as long as the work takes."""

KEPT_ERRORS = 8
"""Messages of failed groups that a rank keeps."""

Indices = NDArray[np.int64]


@final
class Done(NamedTuple):
    """One issued group has ended.

    Attributes:
        row: as issued.
        count: as issued.
        outputs: a sequence, one per sample, on the host; the receiver may keep them.
        error: non-empty where the group failed.
        started_ns: the engine's stamp on this process's clock; 0: unknown.
        finished_ns: likewise, at the end.
        device_ns: time the device spent on the group; 0: unknown.
        token_ns: a stamp per token, from token engines.
    """

    row: int
    count: int  # type: ignore[assignment]  # the field's name is the contract's
    outputs: Any
    error: str = ""
    started_ns: int = 0
    finished_ns: int = 0
    device_ns: int = 0
    token_ns: Sequence[int] = ()


@final
class First(NamedTuple):
    """The first token of a row is out.

    Attributes:
        row: as issued.
        token_ns: when, on this process's clock.
        token: it; -1: not told. LoadGen logs it beside the whole answer, and TEST06 compares them.
    """

    row: int
    token_ns: int
    token: int = -1


@runtime_checkable
class SystemUnderTest(Protocol):
    """What a scenario needs of a system under test; see CONTRIBUTING.md.

    Optional attributes: ``held_out`` (sample indices, int64) and ``score(indices, outputs) ->
    (numerator, denominator)`` for accuracy, ``target_accuracy`` that it must reach,
    ``text_bits(part, parts, tell) -> (bits, bytes)`` (what one of so many parts of its held-out
    text costs by its probabilities; ``tell()`` after each piece), ``digest``
    (what the weights are, compared between ranks), ``dtype`` (what it computes in, such as "fp16",
    likewise), ``flops_per_sample`` (operations the model needs for a sample, held against what a
    known GPU can do), ``most_tokens`` of a token engine (tokens of a sample at most; without it the
    gaps between tokens are not recorded), ``prefix_caching`` (whether it keeps what it computed of
    one query's prompt for the next, which MLPerf forbids).

    Attributes:
        total: sample indices are 0 .. total-1.
        resident: how many fit in memory at once; a window draws from 0 .. resident-1.
        depth: groups it accepts before one is Done.
    """

    total: int
    resident: int
    depth: int

    def load(self, indices: Indices) -> None:
        """Bring samples into memory; untimed."""

    def unload(self, indices: Indices) -> None:
        """Let samples go; untimed."""

    def issue(self, row: int, indices: Indices, data: Sequence[bytes] | None = None) -> None:
        """Enqueue or launch a group; never waits."""

    def poll(self, until_ns: int) -> Sequence[Done | First]:
        """Work or wait, and return what ended; empty at ``until_ns``."""

    def close(self) -> None:
        """Release what it holds."""


class _Inline:
    """A SUT that computes in ``poll``, one group at a time, in the order of issue."""

    depth = 1

    def __init__(self, total: int) -> None:
        self.total = self.resident = total
        self.queue: deque[tuple[int, Indices]] = deque()

    def load(self, indices: Indices) -> None:
        """Nothing to bring in."""

    def unload(self, indices: Indices) -> None:
        """Nothing to let go."""

    def issue(self, row: int, indices: Indices, data: Sequence[bytes] | None = None) -> None:
        """Enqueue a group."""
        self.queue.append((row, indices))

    def close(self) -> None:
        """Drop what was not computed."""
        self.queue.clear()


class FromCallable(_Inline):
    """A plain function as a system under test.

    Args:
        function: from an int64 array of sample indices, shape (n,), to a sequence of n outputs.
            Tensors are copied to the host before the group counts as completed.
        total: sample indices are 0 .. total-1.
    """

    def __init__(self, function: Callable[[Indices], Sequence[Any]], total: int = 1024) -> None:
        super().__init__(total)
        self.function = function

    def poll(self, until_ns: int) -> list[Done]:
        """Compute the oldest group."""
        if not self.queue:
            return []
        row, indices = self.queue.popleft()
        return [Done(row, len(indices), on_host(self.function(indices)))]


def on_host(outputs: Any) -> Any:
    """Return outputs with every tensor, at the top or one level down, copied to host memory.

    On a GPU this waits until they exist.
    """
    if isinstance(outputs, (np.ndarray, str, bytes)):
        return outputs
    if hasattr(outputs, "detach") and hasattr(outputs, "cpu"):
        return outputs.detach().cpu()
    if isinstance(outputs, (list, tuple)) and outputs and hasattr(outputs[0], "cpu"):
        return [each.detach().cpu() for each in outputs]
    return outputs


class Echo(_Inline):
    """Returns each group's indices at once: what a run costs when the model costs nothing."""

    def __init__(self, total: int = 1024) -> None:
        super().__init__(total)

    def poll(self, until_ns: int) -> list[Done]:
        """Return the oldest group."""
        if not self.queue:
            return []
        row, indices = self.queue.popleft()
        return [Done(row, len(indices), indices)]


class Sleep(_Inline):
    """Takes a known time per sample, to an absolute deadline, and keeps stamps of its own.

    Args:
        per_sample_ns: time per sample.
        total: sample indices are 0 .. total-1.
        now: clock for its stamps.

    Attributes:
        stamps: (start, end) of each group in order, ns: what a report must agree with.
    """

    def __init__(self, per_sample_ns: int, total: int = 1024, now: Now = now_ns) -> None:
        super().__init__(total)
        self.per_sample_ns = per_sample_ns
        self.now = now
        self.stamps: list[tuple[int, int]] = []

    def poll(self, until_ns: int) -> list[Done]:
        """Sleep for the oldest group."""
        if not self.queue:
            return []
        row, indices = self.queue.popleft()
        started = self.now()
        deadline = started + len(indices) * self.per_sample_ns
        while (left := deadline - self.now()) > 0:
            time.sleep(left / 1e9)
        finished = self.now()
        self.stamps.append((started, finished))
        return [Done(row, len(indices), indices, started_ns=started, finished_ns=finished)]


def adapted(made: Any) -> SystemUnderTest:
    """Return a system under test as it is, and a plain function as one.

    Raises:
        UsageError: it is neither.
    """
    if hasattr(made, "issue") and hasattr(made, "poll"):
        return made  # type: ignore[no-any-return]
    if callable(made):
        return FromCallable(made)
    raise UsageError(
        f"a {type(made).__name__} is neither a SystemUnderTest (issue, poll, ...) nor a function "
        "of sample indices"
    )


Collect = Callable[[Sequence[Done | First]], int]


def collector(
    log: SampleLog, kept: dict[int, Any], errors: list[str], now: Now, wanted: Sequence[int] = ()
) -> Collect:
    """Return the function that stamps groups which the SUT says have ended.

    Args:
        log: the loop has stored ``count`` of every group that it issued.
        kept: takes outputs by row: those of the first group that ends at or behind each place in
            ``wanted``, wherever groups begin.
        errors: takes the first few messages of failed groups.
        now: the clock.
        wanted: rows, ascending.

    Returns:
        Takes what ``poll`` gave; returns how many groups ended. Raises ModelError for other rows.
    """
    cells, ended, places = log.cells(), log.ended, iter([*wanted, log.capacity])
    completed, counts = cells["completed"], cells["count"]
    started_at, finished_at = cells.get("started"), cells.get("finished")
    device_at, first_at = cells.get("device"), cells.get("first_token")
    tokens_at, stamps = cells.get("tokens"), log.token_ns
    place = next(places)

    def collect(done_groups: Sequence[Done | First]) -> int:
        nonlocal place
        groups = 0
        for done in done_groups:
            stamp = now()
            if type(done) is First:  # isinstance costs 0.7 clock reads more
                if first_at is not None:
                    first_at[done.row] = done.token_ns
                continue
            row, count, outputs, error, started_ns, finished_ns, device_ns, token_ns = done
            issued = counts[row]
            if issued == 0 or completed[row] != PENDING:
                raise ModelError(f"the model ended row {row}, which begins no group in flight")
            # What raises here leaves the row in flight: it fails with the others, unstamped.
            good = not error and count == issued == len(outputs)
            if started_ns and started_at is not None and finished_at is not None:
                started_at[row], finished_at[row] = started_ns, finished_ns
            if device_ns and device_at is not None:
                device_at[row] = device_ns
            if token_ns and tokens_at is not None and first_at is not None:
                tokens_at[row], first_at[row] = len(token_ns), token_ns[0]
                if stamps is not None:
                    stamps[row, : len(token_ns)] = token_ns
            if good:
                completed[row] = stamp
                if row >= place:
                    kept[row] = outputs
                    while place <= row:
                        place = next(places)
            else:
                completed[row] = FAILED
                _tell(errors, issued, done)
            ended[0] += issued
            groups += 1
        return groups

    return collect


def _tell(errors: list[str], issued: int, done: Done) -> None:
    """Keep the message of a group that failed."""
    if len(errors) < KEPT_ERRORS:
        wrong = f"the model ended a group of {issued} samples as one of {done.count}"
        if done.count == issued:
            wrong = f"{len(done.outputs)} outputs for {issued} samples"
        errors.append(f"{done.error}" or wrong)


def run_indices(
    sut: SystemUnderTest,
    indices: Indices,
    batch_size: int,
    tell: Callable[[], None] = lambda: None,
) -> list[Any]:
    """Compute outputs for many samples, untimed; the accuracy pass.

    Args:
        sut: nothing may be in flight.
        indices: shape (n,), int64.
        batch_size: samples a group.
        tell: called whenever groups have ended.

    Returns:
        n outputs, in the order of ``indices``.

    Raises:
        UsageError: a group failed or came back with another number of outputs.
    """
    outputs: list[Any] = [None] * len(indices)
    starts = deque(range(0, len(indices), batch_size))
    flying = 0
    while starts or flying:
        while starts and flying < sut.depth:
            sut.issue(starts[0], indices[starts[0] : starts[0] + batch_size])
            starts.popleft()
            flying += 1
        for done in sut.poll(FOREVER):
            if isinstance(done, First):
                continue
            flying -= 1
            tell()
            if done.error or len(done.outputs) != done.count:
                raise UsageError(
                    f"the model failed on samples {indices[done.row]} and following: "
                    f"{done.error or f'{len(done.outputs)} outputs for {done.count} samples'}"
                )
            outputs[done.row : done.row + done.count] = list(done.outputs)
    return outputs
