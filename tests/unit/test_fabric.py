"""The judgement of collectives on hand-chosen integers, through saved directories."""

from __future__ import annotations

import contextlib
import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distbench import compare, verify
from distbench.errors import UsageError
from distbench.fabric import Seen, slowest
from distbench.files import read_json
from distbench.operations import Cell
from distbench.report import __main__ as report
from distbench.steady import memory
from distbench.student import t_quantile

from .fabrics import WINDOW_NS, Times, fabric, noise, pair, table
from .synthetic import OFFSET_NS, Rank, in_memory, make_run
from .test_verdict import reported

SIZE = 1 << 16
US = 1_000
SHAPE = {"groups": (1,), "ranks": 2}


def even(_rank: int, cell: int, _rep: int) -> int:
    """A block of 10 takes 500 us, a lone operation 80 us, on each rank alike."""
    return 80 * US if cell % 2 else 500 * US


def judged(cells: list[Cell], took: Times = even, ranks: int = 2, **more: Any) -> dict[str, Any]:
    return in_memory(ranks=ranks, groups=(1,), change=fabric(cells, took, **more)).result()


def codes(result: dict[str, Any]) -> list[str]:
    return [each["code"] for each in result["verdict"]["findings"]]


def test_bandwidths_by_hand() -> None:
    """50 us for 65,536 B are 1.31072 GB/s; times 2 * 3 / 4 on 4 ranks for an all-reduce."""
    result = judged(pair("all_reduce", SIZE) + pair("broadcast", SIZE), ranks=4)
    assert result["verdict"]["status"] == "VALID", codes(result)
    reduced, sent = table(result)
    assert reduced["time"] == pytest.approx(50e-6)
    assert reduced["algbw"] == pytest.approx(1.31072e9)
    assert reduced["busbw"] == pytest.approx(1.5 * 1.31072e9)
    assert sent["busbw"] == pytest.approx(1.31072e9)
    assert (reduced["times"], reduced["blocks"]) == (10, 4)
    assert (reduced["p50"], reduced["p90"], reduced["max"]) == (80e-6, 80e-6, 80e-6)
    assert reduced["p99"] is None, "20 repetitions do not tell one in a hundred"
    assert (reduced["checked"], reduced["wrong"]) == (2 * 4 * SIZE // 4, 0)
    assert reduced["device_time"] is None
    assert result["metrics"]["all_reduce.busbw"]["value"] == reduced["busbw"]
    assert result["metrics"]["all_reduce.latency"]["value"] == 80e-6
    assert [row["samples"] for row in result["per_rank"]] == [50] * 4


def test_the_last_rank_counts_whatever_its_clock_says() -> None:
    """Rank 1's clock is 7,000 s ahead; it ends 30 us after rank 0 in one block of four.

    The block before those, which only warms, takes ten times as long.
    """

    def took(rank: int, cell: int, rep: int) -> int:
        more = {0: 4_500 * US, 2: 30 * US * rank}.get(rep, 0) if cell == 0 else 0
        return even(rank, cell, rep) + more

    (row,) = table(judged(pair("broadcast", SIZE), took))
    blocks = np.array([50e-6, 50e-6, 53e-6, 50e-6])
    mean, spread = 50.75e-6, np.std(blocks, ddof=1) * np.sqrt(memory(blocks, 1))
    half = t_quantile(0.975, 3) * spread / 2
    assert row["time"] == pytest.approx(mean)
    assert row["time_median"] == pytest.approx(50e-6)
    assert row["time_low"] == pytest.approx(mean - half)
    assert row["time_high"] == pytest.approx(mean + half)
    assert row["clock_bound"] == pytest.approx(3e-6, rel=0.1), (
        "1 us, and 2 ppm of a second's wander"
    )


def test_a_repetition_that_began_late_on_any_rank_is_counted_and_left_out() -> None:
    """Rank 1 begins 11 us late in repetition 4 of the lone ones, and exactly on the limit in 5."""

    def late(rank: int, cell: int, rep: int) -> int:
        return {4: 10_001, 5: 10_000}.get(rep, 0) if (rank, cell) == (1, 1) else 0

    def took(rank: int, cell: int, rep: int) -> int:
        return 900 * US if (cell, rep) == (1, 4) else even(rank, cell, rep)

    (row,) = table(judged(pair("broadcast", SIZE), took, late_ns=late))
    assert (row["repetitions"], row["late"]) == (19, 1)
    assert (row["max"], row["late_rank"]) == (80e-6, 1)


def test_one_that_overran_its_window_is_a_latency_like_any_other() -> None:
    def took(rank: int, cell: int, rep: int) -> int:
        return WINDOW_NS + 1 if (cell, rep) == (1, 19) else even(rank, cell, rep)

    (row,) = table(judged(pair("broadcast", SIZE), took))
    assert (row["repetitions"], row["overran"], row["max"]) == (20, 1, (WINDOW_NS + 1) / 1e9)


def test_device_time_is_that_of_the_slowest_rank() -> None:
    (row,) = table(judged(pair("broadcast", SIZE), device_ns=400 * US))
    assert row["device_time"] == pytest.approx(40e-6)


def test_what_is_wrong_is_invalid_and_names_the_rank(tmp_path: Path) -> None:
    change = fabric(pair("all_reduce", SIZE), even, wrong={(1, 1): 3})
    status, findings = reported(make_run(tmp_path / "r", report=False, change=change, **SHAPE))
    assert status == "INVALID"
    (finding,) = findings
    assert (finding.level, finding.code, finding.rank) == ("invalid", "collective-wrong", 1)
    assert "rank 1 (node-1): 3 of 65,536 elements" in finding.message


def test_a_cell_without_a_start_on_time_is_unknown_and_names_who_was_late(tmp_path: Path) -> None:
    cells = pair("all_reduce", SIZE)
    change = fabric(cells, even, late_ns=lambda rank, cell, _: 50_000 * rank * (cell == 1))
    folder = make_run(tmp_path / "r", change=change, **SHAPE)
    status, findings = reported(folder)
    assert status == "INVALID"
    assert [each.code for each in findings] == ["collective-unknown", "starts-late"]
    assert "no repetition began on time" in findings[0].message
    (row,) = table(read_json(folder / "result.json"))
    assert row["p50"] is None and row["max"] is None and row["time"] == pytest.approx(50e-6)
    change = fabric(cells, even, late_ns=lambda rank, _, rep: 50_000 * rank * (rep != 5))
    status, findings = reported(make_run(tmp_path / "s", report=False, change=change, **SHAPE))
    assert [(each.level, each.code, each.rank) for each in findings] == [
        ("doubtful", "starts-late", 1)
    ]
    assert "19 of 20 lone operations" in findings[0].message and "19 times" in findings[0].message


def test_what_was_never_compared_is_unknown() -> None:
    def forget(ranks: list[Rank]) -> None:
        assert ranks[1].after is not None
        ranks[1].after["checks"] = []

    result = judged(pair("all_reduce", SIZE), change=forget)
    assert codes(result) == ["collective-unknown"]
    assert "rank 1 compared nothing" in result["verdict"]["findings"][0]["message"]
    assert table(result)[0]["wrong"] is None


@pytest.mark.parametrize(
    ("bound_ns", "level"), [(10_000, None), (40_000, "doubtful"), (120_000, "invalid")]
)
def test_blocks_that_clocks_do_not_resolve(bound_ns: int, level: str | None) -> None:
    """Four blocks of 500 us: 1 % of them are 20 us, 5 % 100 us; 2 us more are for wander."""
    change = fabric(pair("all_reduce", SIZE), even)
    result = in_memory(bound_ns=(0, bound_ns), change=change, **SHAPE).result()
    found = [(each["level"], each["code"]) for each in result["verdict"]["findings"]]
    assert found == ([(level, "clock-bound")] if level else [])


# The slowest rank


def ends(*ranks: Any) -> Seen:
    end = np.array(np.broadcast_arrays(*ranks), np.int64)
    late = np.zeros_like(end)
    return Seen(late, end, late, np.ones(end.shape[1], np.bool_), 0)


def test_the_slowest_rank_is_named_by_what_it_costs() -> None:
    """Rank 2 ends 10 us after 100 and 101 us, and in a quarter of the repetitions 2 us before."""
    third = np.where(np.arange(40) % 4 == 0, 99_000, 111_000)
    found = slowest(ends(100_000, 101_000 + np.arange(40) % 2, third))
    assert found is not None
    assert (found.place, found.last) == (2, 0.75)
    before = 101_000 + np.arange(40) % 2
    assert found.cost_ns == pytest.approx((third - before).mean())


def test_nobody_is_named_for_luck_ties_or_what_clocks_may_hide() -> None:
    assert slowest(ends(np.full(40, 100_000), 100_000)) is None
    assert slowest(ends(np.full(40, 100_000), 100_999)) is None, "less than 1 %"
    found = ends(np.full(40, 100_000), 102_000)
    assert slowest(found) is not None
    hidden = Seen(found.late_ns, found.end_ns, found.device_ns, found.valid, 501)
    assert slowest(hidden) is None, "twice 501 ns of 2,000 are the clocks'"
    assert slowest(ends(np.full(9, 100_000), 150_000)) is None, "too few"


def test_of_equal_ranks_one_is_named_in_one_cell_of_a_hundred_at_most() -> None:
    rng = np.random.default_rng(1)
    named = 0
    for _ in range(1000):
        end = 100_000 + rng.exponential(10_000, (4, 60)).astype(np.int64)
        named += slowest(ends(*end)) is not None
    assert named <= 20  # of 1,000 at 1 %: above that by chance in 1 of 1,000


def test_a_rank_that_is_last_nearly_everywhere_is_noted(tmp_path: Path) -> None:
    jitter = noise(3, 2 * US)
    cells = [cell for size in (8, 1024, SIZE) for cell in pair("broadcast", size)]

    def took(rank: int, cell: int, rep: int) -> int:
        slow = 16 * US if rank == 1 and cell != 1 else 0
        return even(rank, cell, rep) + slow + jitter(rank, cell, rep)

    run = make_run(tmp_path / "r", report=False, change=fabric(cells, took), **SHAPE)
    status, findings = reported(run)
    assert status == "VALID"
    assert [(each.level, each.code, each.rank) for each in findings] == [
        ("info", "slowest-rank", 1)
    ]
    assert "in 2 of 3 operations and sizes" in findings[0].message
    assert findings[0].value == pytest.approx(0.17, abs=0.03)


# The fit


def lined(bend: float) -> Times:
    """10 us + 1 ns per 64 B a lone operation, the largest size longer by ``bend``."""
    sizes = [SIZE, 4 * SIZE, 16 * SIZE]

    def took(_rank: int, cell: int, _rep: int) -> int:
        size = sizes[cell // 2]
        once = 10_000 + size // 64 + (int(bend * size) if size == sizes[-1] else 0)
        return once * (1 if cell % 2 else 100)

    return took


def test_alpha_and_bandwidth_come_out_of_known_times(tmp_path: Path) -> None:
    sizes = (SIZE, 4 * SIZE, 16 * SIZE)
    cells = [cell for size in sizes for cell in pair("send_recv", size, times=100)]
    folder = make_run(tmp_path / "r", change=fabric(cells, lined(0)), **SHAPE)
    result = read_json(folder / "result.json")
    (row,) = table(result, "fit")
    assert (row["operation"], row["sizes"], row["reason"]) == ("send_recv", 3, "")
    assert row["alpha"] == pytest.approx(10e-6, rel=1e-6)
    assert row["bandwidth"] == pytest.approx(64e9, rel=1e-6)
    assert row["r2"] == pytest.approx(1, abs=1e-9)
    assert result["metrics"]["send_recv.alpha"]["value"] == row["alpha"]
    assert codes(result) == []
    text = (folder / "report.txt").read_text()
    assert "64.0 GB/s" in text and "1.0000" in text and "192.0.2.1" in text
    change = fabric(
        cells, lambda rank, cell, rep: 12_000 * (10 - cell) * (1 + 99 * (cell % 2 == 0))
    )
    status, findings = reported(make_run(tmp_path / "s", report=False, change=change, **SHAPE))
    assert [each.code for each in findings] == ["fit-poor"]
    assert (status, findings[0].level) == ("VALID", "info")


def test_fewer_than_three_sizes_give_no_line() -> None:
    result = judged(pair("broadcast", 8) + pair("broadcast", SIZE) + pair("broadcast", 2 * SIZE))
    (row,) = table(result, "fit")
    assert row["alpha"] is None and row["r2"] is None
    assert row["reason"].startswith("2 sizes of 64 KiB or more are known")
    assert result["metrics"]["broadcast.alpha"]["value"] is None


# Losses, and other commands


def test_a_lost_rank_leaves_no_figures_but_those_of_whole_cells(tmp_path: Path) -> None:
    """Rank 1 was killed in the last cell: its log is there, its after.json is not."""

    def cut(ranks: list[Rank]) -> None:
        ranks[1].after = None
        ranks[1].log.completed[-5:] = -1

    cells = pair("broadcast", 8) + pair("broadcast", SIZE)
    run = make_run(tmp_path / "r", change=fabric(cells, even, change=cut), **SHAPE)
    result = read_json(run / "result.json")
    assert result["verdict"]["status"] == "INCOMPLETE"
    assert codes(result) == ["rank-incomplete"]
    whole, part = table(result)
    assert whole["p50"] == 80e-6
    assert part["p50"] is None and part["reason"] == "not every rank came to its end"
    assert verify.main([str(run)]) == 6


def test_a_missing_rank_leaves_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", change=fabric(pair("broadcast", 8), even), **SHAPE)
    for path in (run / "ranks" / "00001").iterdir():
        path.unlink()
    assert verify.main([str(run)]) == 6
    result = in_memory(change=fabric(pair("broadcast", 8), even), **SHAPE)
    lost = type(result)(2, (result.records[0], None)).result()
    assert codes(lost) == ["rank-missing"]
    assert table(lost)[0]["time"] is None
    assert table(lost)[0]["reason"] == "a rank's samples are missing"


def test_every_format_and_verify_take_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", change=fabric(pair("broadcast", SIZE), even), **SHAPE)
    assert verify.main([str(run)]) == 0
    out = tmp_path / "out"
    with contextlib.redirect_stdout(io.StringIO()):
        report.main([str(run), "--format", "text,json,csv,md", "--output-dir", str(out)])
    rows = list(csv.DictReader(io.StringIO((out / "report.csv").read_text())))
    assert {row["name"] for row in rows} == {
        f"broadcast.{name}" for name in ("busbw", "latency", "alpha", "bandwidth", "r2")
    }
    ranks = csv.DictReader(io.StringIO((out / "report-ranks.csv").read_text()))
    assert [row["rank"] for row in ranks] == ["0", "1"]
    assert "### Table: collectives" in (out / "report.md").read_text()


def test_the_report_names_the_ways_of_nccl() -> None:
    def ways(ranks: list[Rank]) -> None:
        for rank, each in enumerate(ranks):
            told = each.before["transport"] | {"backend": "nccl", "reason": ""}
            way = {"source": rank, "target": 1 - rank, "via": "NET/Socket/0", "channels": 2}
            told["nccl"] = {
                "version": "2.27.3",
                "interfaces": "[0]eth0:192.0.2.1<0>",
                "ways": [way],
            }
            each.before["transport"] = told
        if len(ranks) == 3:
            ranks[2].before["transport"] |= {"reason": "NCCL's log names no way: it broke"}
            ranks[2].before["transport"]["nccl"]["ways"] = []

    change = fabric(pair("broadcast", SIZE), even, change=ways)
    text = in_memory(ranks=3, groups=(1,), change=change).report()
    lines = [line for line in text.splitlines() if line.startswith("transport")]
    assert lines == [
        "transport        rank 0, 1: NCCL 2.27.3: via NET/Socket, interfaces [0]eth0:192.0.2.1<0>",
        "transport        rank 2: unknown: NCCL's log names no way: it broke",
    ]


def test_launches_are_compared_by_a_named_metric_alone() -> None:
    results = []
    for number in range(4):
        run = judged(pair("broadcast", SIZE), lambda r, c, k, n=number: even(r, c, k) + n * 1000)
        results.append({**run, "run_id": f"20260101T000000Z-collectives-0000000{number}"})
    with pytest.raises(UsageError, match=r"name one with --metric, such as broadcast\.busbw"):
        compare.compare(results[:2], results[2:])
    found = compare.compare(results[:2], results[2:], metric="broadcast.busbw")
    assert found.unit == "B/s" and not found.lower_is_better
    assert found.ratio < 1, "the later ones take longer"


def test_the_clock_of_a_rank_is_needed(tmp_path: Path) -> None:
    def lose(ranks: list[Rank]) -> None:
        ranks[1].before["clock"]["exchanges"] = []
        assert ranks[0].after is not None
        ranks[0].after["exchanges"] = {}

    result = judged(pair("broadcast", SIZE), change=lose)
    assert table(result)[0]["reason"] == "a rank's clock was not measured"
    assert "collective-unknown" in codes(result)
    assert OFFSET_NS > 0
