"""Which line goes where, and behind which name."""

from __future__ import annotations

import pytest
from checks import Host
from streams import Streams


def test_lines_are_told_by_host_and_rank(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """One rank of a host needs no mark; of several torchrun marks each, and its own lines not."""
    streams = Streams([Host("jw2", 1), Host("jw3", 2), Host("jw4", 1), Host("jw1 driver", 0)])
    streams.seat([1, 0, 2], [2, 1, 1])
    streams.take(1, b"O", b"the report\nin parts")
    streams.take(1, b"E", b"[r1]:distbench: rank 1 broke\ntorchrun says so\n[r0]:warned\n")
    streams.take(0, b"E", b"half a")
    streams.take(0, b"E", b" line\n")
    streams.take(0, b"O", b"printed\n")
    streams.take(2, b"E", b"  exitcode  : 6 (pid: 12)\nno line feed")
    streams.take(3, b"O", b"distbench: driver listens on 10.0.0.1:7\n")
    streams.end()
    out, err = capfdbinary.readouterr()
    assert out == b"the report\nin parts\n"
    assert err.decode().splitlines() == [
        "[jw3 r1] distbench: rank 1 broke",
        "[jw3] torchrun says so",
        "[jw3 r0] warned",
        "[jw2 r2] half a line",
        "[jw2 r2] printed",
        "[jw4 r3]   exitcode  : 6 (pid: 12)",
        "[jw1 driver] distbench: driver listens on 10.0.0.1:7",
        "[jw4 r3] no line feed",
    ]
    assert streams.sentences == {"rank 1 broke": "jw3"}
    assert streams.exit_told == 6
    streams.seat([0, 1, 2], [1, 2, 1])
    assert (streams.first, streams.exit_told, streams.sentences) == (0, 0, {})
    streams.take(2, b"E", b"again\n")
    assert capfdbinary.readouterr().err == b"[jw4 r3] again\n"
