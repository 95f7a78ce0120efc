"""The driver's log and those of the ranks put together: integers worked by hand, on four clocks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distbench import verify
from distbench.bounds import parse_bounds
from distbench.clock import ClockModel, Exchange
from distbench.joined import joined, official, to_peer
from distbench.pool import series, within
from distbench.run import RankRecord, Run, came, load_run
from distbench.salvage import merge
from distbench.samples import PENDING

from .dispatched import DRIVER_OFFSET_NS, PARTS, US, dispatched, store
from .synthetic import BOUND_NS, START_NS

pytestmark = pytest.mark.timeout(60)


def made_of(run: Run) -> dict[str, Any]:
    (driver,) = official(run)
    return dict(driver.made) | {"latency": driver.column("completed") - driver.column("scheduled")}


def test_each_part_is_what_it_was_made_to_be_and_they_sum_exactly() -> None:
    made = made_of(dispatched(100))
    wanted = {"lateness": 10 + 5, "queue": 37 - 10 - 5, "service": 400, "return": 500 - 437}
    for name, us in wanted.items():
        assert made[name].tolist() == [us * US] * 100, name
    assert made["latency"].tolist() == [500 * US] * 100
    assert made["in_time"].tolist() == [485 * US] * 100
    assert made["batch_latency"].tolist() == [405 * US] * 100
    parts = made["lateness"] + made["queue"] + made["service"] + made["return"]
    assert (parts == made["latency"]).all()


def test_the_result_names_clocks_bounds_and_definitions() -> None:
    run = dispatched()
    result = run.result()
    assert result["verdict"]["status"] == "VALID", result["verdict"]["findings"]
    found = result["metrics"]
    assert found["latency.p99"]["value"] == 500e-6
    assert found["latency.p99"]["n"] == 2_000
    assert "on the driver's clock" in found["latency.p99"]["definition"]
    assert "by the clocks" in found["queue.p50"]["definition"]
    driver = result["clock"]["driver"]
    assert driver["host"] == "control"
    assert driver["offset_s"] == DRIVER_OFFSET_NS / 1e9
    assert driver["bound_s"] >= BOUND_NS / 1e9
    # Rank 0 reads the reference clock; rank 1 and the driver are each known to a bound.
    # Their sum moves in the window, which lasts 2 s.
    models = [run.clock(each) for each in (run.driver, run.present[1])]  # type: ignore[arg-type]
    at = range(START_NS, START_NS + 2 * 10**9, 10**6)
    bounds = [sum(model.bound_ns(x) for model in models if model) for x in at]
    assert driver["parts_bound_s"] == pytest.approx(max(bounds) / 1e9, rel=0.01)
    assert max(bounds) > 1.2 * bounds[0]
    assert driver["late_s"] == 700e-9
    text = run.report()
    assert "driver         control, process 4711: latencies are on its clock" in text
    assert [row["metrics"]["latency.p50"] for row in result["per_rank"]] == [500e-6] * 2
    assert [row["samples"] for row in result["per_rank"]] == [1_000, 1_000]


def test_service_is_on_the_ranks_own_clock_whatever_its_drift() -> None:
    slow = made_of(dispatched(100, drift_ppm=(0, 90)))
    assert slow["service"].tolist() == [400 * US] * 100
    parts = slow["lateness"] + slow["queue"] + slow["service"] + slow["return"]
    assert (parts == slow["latency"]).all()


def test_a_group_is_one_group_and_its_stamps_hold_for_all() -> None:
    run = dispatched(100, ranks=1)
    (record,) = run.present
    assert record.rows is not None
    rows, columns = record.rows.copy(), record.before["columns"]
    rows[1::2, columns.index("count")] = 0  # pairs, the first of which has the stamps
    rows[0::2, columns.index("count")] = 2
    for name in ("ready", "issued", "started", "finished", "completed"):
        rows[0::2, columns.index(name)] = rows[1::2, columns.index(name)]
        rows[1::2, columns.index(name)] = 0
    rows[1::2, columns.index("completed")] = PENDING
    made = made_of(Run(1, (replace(record, rows=rows),), driver=run.driver))
    assert len(made["batch_latency"]) == 50
    assert made["service"].tolist() == [400 * US] * 100
    # The first of a pair waits for the second, 1 ms.
    assert made["queue"].tolist() == [22 * US + 1000 * US, 22 * US] * 50


def test_what_is_not_known_is_left_out_and_latency_stays() -> None:
    run = dispatched(100)
    one = run.present[1]
    columns = [c for c in one.before["columns"] if c not in ("started", "finished")]
    keep = [one.before["columns"].index(c) for c in columns]
    assert one.rows is not None
    bare = replace(one, rows=one.rows[:, keep], before=one.before | {"columns": columns})
    made = made_of(replace(run, records=(run.present[0], bare)))
    assert [len(made[n]) for n in ("latency", "lateness", "queue", "return")] == [100, 100, 50, 50]
    gone = made_of(replace(run, records=(run.present[0], None)))
    assert [len(gone[n]) for n in ("latency", "in_time", "lateness")] == [100, 100, 50]


def test_mapping_many_instants_is_mapping_each() -> None:
    model = ClockModel(
        (
            Exchange(0, 500, 1, 2, 9),
            Exchange(10**9, 90_700, 1, 2, 9),
            Exchange(3 * 10**9, 0, 1, 2, 9),
        )
    )
    at = np.arange(-(10**8), 4 * 10**9, 77_777_777)
    single = np.array([model.to_peer_ns(int(each)) for each in at])
    assert np.abs(to_peer(model, at) - single).max() <= 1
    assert to_peer(ClockModel(), at) is at


def with_tokens(run: Run, late_us: int = 0) -> Run:
    """Let every query have five tokens, the first 100 us after the engine began.

    The driver reads First and Done at once; the ranks issue ``late_us`` later than they could.
    """
    assert run.driver is not None and run.driver.rows is not None
    done = run.driver.column("completed")[:, None]
    rows = np.hstack([run.driver.rows, np.full_like(done, 5), done])
    columns = [*run.driver.before["columns"], "tokens", "first_token"]
    driver = replace(run.driver, rows=rows, before=run.driver.before | {"columns": columns})
    records = []
    for each in run.present:
        assert each.rows is not None
        own, columns = each.rows.copy(), each.before["columns"]
        own[:, columns.index("issued")] += late_us * US
        own[:, columns.index("tokens")] = 5
        own[:, columns.index("first_token")] = each.column("started") + 100 * US
        records.append(replace(each, rows=own))
    return replace(run, records=tuple(records), driver=driver)


def test_the_time_between_tokens_is_on_the_ranks_clock() -> None:
    (driver,) = official(with_tokens(dispatched(100)))
    # (ended - first token) / 4 on the rank; on the driver's clock it would be 0.
    assert series(driver, "tpot").tolist() == [(440 - 137) * US // 4] * 100
    assert series(driver, "ttft").tolist() == [500 * US] * 100
    assert within(driver, parse_bounds("tpot=75us@p99")) == 0
    assert within(driver, parse_bounds("tpot=76us@p99")) == 100


def test_what_a_rank_is_late_is_taken_from_the_first_token_too() -> None:
    (driver,) = official(with_tokens(dispatched(100), late_us=2))
    assert set(driver.made["lateness"].tolist()) == {17 * US}
    assert set(driver.made["ttft_in_time"].tolist()) == {(500 - 17) * US}


def test_without_exchanges_queue_and_return_are_not_made_up() -> None:
    run = dispatched(100)
    assert run.driver is not None and run.present[0].after is not None
    clock = {**run.driver.before["clock"], "exchanges": []}
    driver = replace(run.driver, before=run.driver.before | {"clock": clock})
    zero = replace(run.present[0], after=None)
    lost = replace(run, records=(zero, run.present[1]), driver=driver)
    made = made_of(lost)
    assert [len(made[n]) for n in ("latency", "queue", "return", "service")] == [100, 0, 0, 0]
    assert lost.result()["clock"]["driver"]["parts_bound_s"] is None
    assert "how it stands to the ranks' is not known" in lost.report()


def test_a_driver_whose_ranks_left_no_samples() -> None:
    run = dispatched(100)
    bare = [replace(each, rows=None, problem="damaged") for each in run.present]
    made = made_of(replace(run, records=tuple(bare)))
    assert [len(made[n]) for n in ("latency", "queue", "batch_latency")] == [100, 0, 0]


def test_waiting_for_a_processor_is_held_against_the_work() -> None:
    run = dispatched(2_000)
    one = run.present[1]
    assert one.after is not None
    # 1,000 queries take 0.5 s of a window of 2 s; 40 ms are 2 % of the window, and 8 % of these.
    one.after["quiet"]["run_delay_ns"] = 1_000 * 40 * US
    found = [f for f in run.result()["verdict"]["findings"] if f["code"] == "interference"]
    assert [f["rank"] for f in found] == [1]
    assert found[0]["value"] == pytest.approx((40 - 5) / 500)


# What goes wrong


def only(run: Run) -> Any:
    # 15 of 500 us are lateness, which is told as doubtful.
    found = [f for f in run.result()["verdict"]["findings"] if f["level"] != "doubtful"]
    assert len(found) == 1, found
    return found[0]


def test_a_driver_that_was_lost() -> None:
    run = dispatched()
    assert run.driver is not None and run.driver.after is not None
    end = {"code": "lost", "rank": -1, "host": "control", "sentence": "the driver was lost: cut"}
    after = {**run.driver.after, "end": end, "ended_ns": None}
    rows = run.driver.rows.copy()  # type: ignore[union-attr]
    rows[1_500:, run.driver.before["columns"].index("completed")] = PENDING
    lost = replace(run, driver=replace(run.driver, after=after, rows=rows))
    finding = only(lost)
    assert (finding["level"], finding["code"]) == ("incomplete", "driver-lost")
    assert finding["message"] == "the driver was lost: cut"
    result = lost.result()
    assert result["metrics"]["latency.p50"]["n"] == 1_500
    reason = result["metrics"]["throughput"]["reason"]
    assert reason == "the window of the driver was cut short"


def test_a_driver_that_left_nothing(tmp_path: Path) -> None:
    folder = store(tmp_path / "r", dispatched())
    shutil.rmtree(folder / "driver")
    run = load_run(folder)
    finding = only(run)
    assert (finding["level"], finding["code"]) == ("incomplete", "driver-incomplete")
    assert "the driver (?) left an incomplete record: " in finding["message"]
    assert run.result()["metrics"]["throughput"]["value"] is None
    assert verify.verify(folder)[0] == 6


def _served(record: RankRecord, row: int, number: int) -> RankRecord:
    assert record.rows is not None
    rows = record.rows.copy()
    rows[row, record.before["columns"].index("query")] = number
    return replace(record, rows=rows)


@pytest.mark.parametrize(("number", "twice"), [(10**6, 0), (1, 0), (2, 1), (-5, 0)])
def test_logs_that_do_not_agree(number: int, twice: int) -> None:
    run = dispatched(100)
    changed = _served(run.present[0], 0, number)
    one = (changed, run.present[1]) if number != 1 else (changed, _served(run.present[1], 0, 0))
    finding = only(replace(run, records=one))
    assert (finding["level"], finding["code"]) == ("invalid", "dispatch-differs")
    assert f"{twice:,} came twice" in finding["message"]


# Files


def test_a_stored_run_is_verified_and_every_file_counts(tmp_path: Path) -> None:
    folder = store(tmp_path / "r", dispatched())
    assert verify.verify(folder) == (0, [])
    samples = folder / "driver" / "samples.npy"
    data = bytearray(samples.read_bytes())
    data[-23] ^= 1  # of the last completion
    samples.write_bytes(data)
    status, lines = verify.verify(folder)
    assert status == 1
    assert any("driver/samples.npy" in line for line in lines)
    assert any("result.json" in line for line in lines)


@pytest.mark.parametrize("name", ["samples.npy", "after.json", "driver.json", "done.json"])
def test_a_missing_file_of_the_driver_is_missed(tmp_path: Path, name: str) -> None:
    folder = store(tmp_path / "r", dispatched())
    (folder / "driver" / name).unlink()
    status, lines = verify.verify(folder)
    assert status == 6, lines
    assert any(line.startswith(f"driver/{name}: missing") for line in lines)


def test_salvage_brings_the_drivers_folder_too(tmp_path: Path) -> None:
    one, other = (store(tmp_path / name, dispatched()) for name in ("a", "b"))
    shutil.rmtree(one / "driver")
    shutil.rmtree(one / "ranks" / "00001")
    (one / "result.json").unlink()
    merge([one, other])
    assert load_run(one).result() == load_run(other).result()


def test_salvage_takes_what_a_driver_left_alone(tmp_path: Path) -> None:
    one, other = (store(tmp_path / name, dispatched()) for name in ("a", "b"))
    shutil.rmtree(one / "driver")
    (one / "result.json").unlink()
    shutil.rmtree(other / "ranks")
    merge([one, other])
    assert load_run(one).result()["verdict"]["status"] == "VALID"


def test_salvage_takes_the_drivers_own_folder_for_rank_0s_note_of_its_loss(tmp_path: Path) -> None:
    """And LoadGen's logs beside it; one that was killed has neither after.json nor done.json."""
    one, other = (store(tmp_path / name, dispatched()) for name in ("a", "b"))
    (one / "driver" / "samples.npy").unlink()
    for name in ("after.json", "done.json"):
        (other / "driver" / name).unlink()
    shutil.rmtree(other / "ranks")
    (other / "loadgen").mkdir()
    (other / "loadgen" / "mlperf_log_detail.txt").write_text("torn")
    merge([one, other])
    names = sorted(path.name for path in (one / "driver").iterdir())
    assert names == ["driver.json", "samples.npy"], "nothing of the note is left beside them"
    assert (one / "loadgen" / "mlperf_log_detail.txt").read_text() == "torn"
    found = load_run(one).result()
    assert found["verdict"]["status"] == "INCOMPLETE"
    assert found["metrics"]["latency.p50"]["value"] == pytest.approx(500e-6)
    (code,) = {f["code"] for f in found["verdict"]["findings"] if f["level"] == "incomplete"}
    assert code == "driver-incomplete"


def test_salvage_keeps_a_driver_folder_that_is_worth_more(tmp_path: Path) -> None:
    one, other = (store(tmp_path / name, dispatched()) for name in ("a", "b"))
    (other / "driver" / "done.json").unlink()
    (other / "driver" / "samples.npy").write_bytes(b"")
    merge([one, other])
    assert load_run(one).result()["verdict"]["status"] == "VALID"


def test_a_killed_driver_of_loadgen_has_the_rows_that_it_issued() -> None:
    rows = np.zeros((9, 2), np.int64)
    rows[:4, 1] = 1
    columns = ["index", "count"]
    assert came(rows, {"columns": columns, "official": {}}) == 4
    assert came(rows, {"columns": columns}) == 9, "of a schedule all are due"


def test_a_rank_that_was_killed_has_the_rows_that_came(tmp_path: Path) -> None:
    folder = store(tmp_path / "r", dispatched(100))
    own = folder / "ranks" / "00001"
    (own / "after.json").unlink()
    record = load_run(folder).present[1]
    assert record.rows is not None and len(record.rows) == 50
    rows = np.lib.format.open_memmap(own / "samples.npy", mode="r+")
    rows[30:, record.before["columns"].index("query")] = -1
    rows.flush()
    record = load_run(folder).present[1]
    assert record.rows is not None and len(record.rows) == 30


def test_parts_are_named_in_the_order_in_which_they_happen() -> None:
    assert sorted(PARTS.values()) == list(PARTS.values())
    assert joined(dispatched(4), dispatched(4).driver).rank == -1  # type: ignore[arg-type]


def test_a_rank_that_took_no_query_waited_for_no_processor_with_one() -> None:
    """As of a driver that was lost with all its rows: 0.4 s by nothing is no share of anything."""
    from dataclasses import replace

    from distbench.pool import in_one_place
    from distbench.times import rank_times
    from distbench.trust import interference_found
    from distbench.verdict import facts

    run = dispatched(100)
    assert run.driver is not None and run.driver.after is not None
    quiet = {"run_delay_ns": 400_000_000, "window_ns": 10**9, "involuntary_switches": 9}
    record = replace(run.driver, after=run.driver.after | {"quiet": quiet})
    (found,) = in_one_place(run).gather(facts)[:1]
    times = rank_times(run, record, found)
    assert interference_found(record, times, open_loop=True)
    none = replace(times, series=dict.fromkeys(times.series, (0, 0, 0)))
    assert interference_found(record, none, open_loop=True) == []
