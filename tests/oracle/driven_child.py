"""Lets LoadGen drive distbench's own end of it, with a trace; writes what LoadGen recorded.

python driven_child.py CASES.json RESULTS.json, in a process of its own: LoadGen cannot be stopped.
The ranks are a queue in this process, which answers after known delays. Each case has:

    official   of ``official.settled``, which has the conf that LoadGen gets
    takes_s    how long the ranks take for what they are sent together
    late       rows that are answered ``late_s`` after all others of Server
    tokens     how many tokens a text has; 0: no token model
"""

import json
import os
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import mlperf_loadgen as lg

from distbench.clock import now_ns
from distbench.dispatch import COLUMNS, TOKEN_COLUMNS
from distbench.frames import DONE, DONES, FIRST, LOAD, LOADED, UNLOAD, packed
from distbench.loadgen import Session, run_loadgen
from distbench.mllog import read_detail
from distbench.samples import SampleLog
from tests.oracle.loadgen_child import read_trace


class Traced:
    """LoadGen, but that it writes a trace whatever it is told."""

    def __getattr__(self, name):
        return getattr(lg, name)

    @staticmethod
    def StartTestWithLogSettings(sut, library, settings, log, audit):
        log.enable_trace = True
        lg.StartTestWithLogSettings(sut, library, settings, log, audit)


class Ranks:
    """Two replicas that answer on the reading thread, in the place of a hub."""

    channels = (None, None)

    def __init__(self, case):
        self.case = case
        self.sent, self.held = deque(), []

    def post(self, place, seq, _index):
        self.sent.append((place, seq, 1))

    def post_many(self, place, first, indices):
        self.sent.append((place, first, len(indices)))

    def flush(self):
        """Everything is there at once."""

    def tell(self, kind, count, _blob):
        if kind in (LOAD, UNLOAD):
            self.sent += [(place, -1, count) for place in (0, 1)]

    def wake(self):
        """It looks every millisecond."""

    def wait(self, _until_ns):
        if not self.sent:
            time.sleep(1e-4)
            if self.held and now_ns() > self.held[0][0]:
                return [self.answer(*self.held.pop(0)[1])]
            return []
        place, first, count = self.sent.popleft()
        if first < 0:
            return [(place, [(LOADED, count, 0, b"")])]
        time.sleep(self.case["takes_s"])
        if first in self.case["late"]:
            self.held.append((now_ns() + int(self.case["late_s"] * 1e9), (place, first, count)))
            return []
        return [self.answer(place, first, count)]

    def answer(self, place, first, count):
        tokens = self.case["tokens"]
        if count > 1 and not tokens:
            return place, [(DONES, first, count, packed([b""] * count))]
        rows = range(first, first + count)
        began = [(FIRST, row, now_ns(), b"") for row in rows] if tokens else []
        return place, [*began, *((DONE, row, tokens, b"") for row in rows)]


def failed(error):
    sys.stderr.write(f"{error}\n")
    sys.stderr.flush()
    os._exit(1)


def run(case):
    official, tokens = case["official"], case["tokens"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        columns = [*COLUMNS, *(TOKEN_COLUMNS if tokens else ())]
        log = SampleLog.create(folder / "samples.npy", official["capacity"], columns)
        session = Session(Ranks(case), log, 0, now_ns, failed, official["tokens"])
        session.lg = Traced()
        run_loadgen(session, official, folder)
        judged = tokens and official["scenario"] == "server"
        found, bracket = read_trace(folder / "mlperf_log_trace.json", judged)
        if tokens:
            found["tokens"] = [tokens] * len(found["latency_ns"])
        detail = read_detail(folder)
        plain = {k: v for k, v in detail.keys.items() if isinstance(v, str | int | float)}
        return {
            "columns": found,
            "start_before_ns": bracket,
            "keys": plain,
            "errors": list(detail.errors),
        }


def main():
    cases = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([run(case) for case in cases]))


if __name__ == "__main__":
    main()
