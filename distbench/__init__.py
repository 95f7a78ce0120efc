"""distbench: collective-synchronized inference loops, with time that can be proven.

    import distbench

    run = distbench.run_offline(lambda indices: [f(i) for i in indices])
    print(run.report())

Names are resolved on first use, so ``import distbench`` loads neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distbench.collectives import run_collectives
    from distbench.coordinated import run_coordinated
    from distbench.distributed import run_distributed
    from distbench.layout import Layout, ShardPlan
    from distbench.load import Load
    from distbench.mlperf import run_mlperf
    from distbench.multistream import run_multistream
    from distbench.offline import run_offline
    from distbench.run import Run
    from distbench.server import run_server
    from distbench.singlestream import run_singlestream
    from distbench.sut import Done, SystemUnderTest
    from distbench.windows import Windows, load_run
    from distbench.world import World, join

__version__ = "0.1.0"

_HOMES = {
    "Done": "distbench.sut",
    "Layout": "distbench.layout",
    "Load": "distbench.load",
    "Run": "distbench.run",
    "ShardPlan": "distbench.layout",
    "SystemUnderTest": "distbench.sut",
    "Windows": "distbench.windows",
    "World": "distbench.world",
    "join": "distbench.world",
    "load_run": "distbench.windows",
    "run_collectives": "distbench.collectives",
    "run_coordinated": "distbench.coordinated",
    "run_distributed": "distbench.distributed",
    "run_mlperf": "distbench.mlperf",
    "run_multistream": "distbench.multistream",
    "run_offline": "distbench.offline",
    "run_server": "distbench.server",
    "run_singlestream": "distbench.singlestream",
}

__all__ = [
    "Done",
    "Layout",
    "Load",
    "Run",
    "ShardPlan",
    "SystemUnderTest",
    "Windows",
    "World",
    "join",
    "load_run",
    "run_collectives",
    "run_coordinated",
    "run_distributed",
    "run_mlperf",
    "run_multistream",
    "run_offline",
    "run_server",
    "run_singlestream",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'distbench' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
