"""csv, Markdown and json of a result: every figure, what is unknown, and nothing that executes."""

from __future__ import annotations

import csv
import html
import io
import re
from pathlib import Path
from typing import Any

import pytest

from distbench import files
from distbench.compare import load_result
from distbench.errors import UsageError
from distbench.report.__main__ import FORMATS, main, read_formats
from distbench.report.tables import FORMULA, METRIC_FIELDS, metrics_csv, ranks_csv, to_markdown
from distbench.report.text import to_text

from .synthetic import Change, Rank, in_memory, make_run
from .test_salvage import kill_rank_1


def result(change: Change | None = None, **shape: Any) -> dict[str, Any]:
    return in_memory(change=change, **shape).result()


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def value_of(cell: str) -> Any:
    try:
        return int(cell)
    except ValueError:
        return float(cell)


# csv


def test_metrics_row_by_row():
    found = result(device_ns=80_000_000)
    found["metrics"]["throughput"] |= {"ci_low": 79.5, "ci_high": 80.5, "ci_method": "batch means"}
    found["metrics"]["latency.p50"]["n_eff"] = 12.5
    table = rows(metrics_csv(found))
    assert [row["name"] for row in table] == [*found["metrics"]]
    for row, metric in zip(table, found["metrics"].values(), strict=True):
        assert list(row) == ["name", *METRIC_FIELDS]
        for field in METRIC_FIELDS:
            wanted = metric[field]
            if wanted is None:
                assert row[field] == ""
            elif isinstance(wanted, str):
                assert row[field] == wanted
            else:
                # All digits: what is read back is the same number.
                assert (value_of(row[field]), type(value_of(row[field]))) == (wanted, type(wanted))


def test_what_is_unknown_is_an_empty_cell_with_its_reason():
    found = result(lambda ranks: setattr(ranks[1], "after", None))
    first = rows(metrics_csv(found))[0]
    assert (first["name"], first["value"]) == ("throughput", "")
    assert first["reason"] == "the window of rank 1 was cut short"


def test_ranks_row_by_row():
    found = result(device_ns=80_000_000)
    table = rows(ranks_csv(found))
    assert [row["host"] for row in table] == ["node-0", "node-1"]
    for row, rank, clock, late_s in zip(
        table, found["per_rank"], found["clock"]["ranks"], found["start"]["lateness_s"], strict=True
    ):
        for name in ("rank", "replica", "samples", "failed", "pending", "finish_s", "idle_s"):
            assert value_of(row[name]) == rank[name]
        for name, column in (
            ("throughput", "throughput_qps"), ("share", "share"), ("device_busy", "device_busy"),
            ("memory.peak", "memory_peak_bytes"), ("memory.total", "memory_total_bytes"),
        ):  # fmt: skip
            assert value_of(row[column]) == rank["metrics"][name]
        assert value_of(row["clock_offset_s"]) == clock["offset_s"]
        assert value_of(row["clock_bound_s"]) == clock["bound_s"]
        assert value_of(row["start_late_s"]) == late_s
    # Rank 1's clock is ahead by so much in the synthetic run, and 20 us late.
    assert table[1]["clock_offset_s"] == "7000.000000123"
    assert table[1]["start_late_s"] == "2e-05"


def test_every_rank_is_in_csv():
    assert [row["rank"] for row in rows(ranks_csv(result(ranks=70)))] == [str(n) for n in range(70)]


def test_ranks_of_a_run_that_lost_one():
    table = rows(ranks_csv(result(kill_rank_1)))
    assert [row["samples"] for row in table] == ["20", "12"]
    assert [row["idle_s"] for row in table] == ["", ""]


def test_late_starts_that_belong_to_other_ranks_are_left_out():
    found = result()
    found["start"]["lateness_s"] = [0.5]
    assert [row["start_late_s"] for row in rows(ranks_csv(found))] == ["", ""]


@pytest.mark.parametrize("sign", [*"=+-@\t", *"\uff1d\uff0b\uff0d\uff20"])
def test_no_cell_is_a_formula(sign):
    name = f"{sign}cmd|' /C calc'!A0"

    def change(ranks: list[Rank]) -> None:
        ranks[1].before["host"] = name

    found = result(change)
    assert rows(ranks_csv(found))[1]["host"] == f"'{name}"
    found["metrics"]["throughput"]["definition"] = f"  {name}"
    assert rows(metrics_csv(found))[0]["definition"] == f"'  {name}"
    for text in (ranks_csv(found), metrics_csv(found)):
        for row in csv.reader(io.StringIO(text, newline="")):
            for cell in row:
                # A negative number is no formula, and must stay a number.
                assert not cell.lstrip(" ").startswith(FORMULA) or re.fullmatch(r"-[\d.e-]+", cell)


def test_negative_numbers_stay_numbers():
    found = result(offset_ns=(0, -5_000_000_000))
    assert rows(ranks_csv(found))[1]["clock_offset_s"] == "-5.0"


def test_cells_with_separators_come_back_whole():
    name = 'a,b"c;d'
    found = result(lambda ranks: ranks[0].before.update(host=name))
    assert rows(ranks_csv(found))[0]["host"] == name


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\v", "\x1c", "\u2028"])
def test_no_cell_begins_a_row(end):
    found = result(lambda ranks: ranks[0].before.update(host=f"a{end}=b"))
    assert rows(ranks_csv(found))[0]["host"] == "a =b"
    found = result(lambda ranks: ranks[0].before.update(host=f"{end}=b"))
    assert rows(ranks_csv(found))[0]["host"] == "' =b"
    assert len(ranks_csv(found).splitlines()) == 3


def test_what_no_encoding_takes():
    found = result(lambda ranks: ranks[0].before.update(host="a\udc80b"))
    assert rows(ranks_csv(found))[0]["host"] == "a\\udc80b"
    for text in (ranks_csv(found), metrics_csv(found), to_markdown(found)):
        text.encode()


# Markdown


def sections(text: str) -> dict[str, list[str]]:
    parts = re.split(r"^### (.*)$", text, flags=re.MULTILINE)
    return {
        name: body.strip().split("\n") for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_the_verdict_stands_first():
    found = result()
    first, blank, second, *_ = to_markdown(found).split("\n")
    assert first == "**MEASUREMENT VALID; MLPerf v5.0 gates: not applied**"
    assert first.strip("*") == to_text(found).split("\n", 1)[0]
    assert blank == ""
    assert second == (
        "offline, model sleep,per_sample=25ms, world size 2 on node-0, node-1, 80 samples"
    )
    assert [*sections(to_markdown(found))] == ["Findings", "Metrics", "Ranks", "Environment"]


def test_findings_with_their_remedies():
    assert sections(to_markdown(result()))["Findings"] == ["None."]
    found = result(late_ns=(5_000, 2_000_000))
    wanted = found["verdict"]["findings"]
    assert wanted
    lines = sections(to_markdown(found))["Findings"]
    assert len(lines) == len(wanted)
    for line, finding in zip(lines, wanted, strict=True):
        assert line.startswith(f"- **{finding['level']}** `{finding['code']}`: ")
        plain = html.unescape(line.replace("\\", ""))
        assert finding["message"] in plain
        assert finding["remedy"]
        assert plain.endswith(f". Remedy: {finding['remedy']}")


def test_the_table_of_metrics():
    found = result()
    found["metrics"]["throughput"] |= {
        "ci_low": 79.25, "ci_high": 80.5, "ci_method": "batch means, within this run", "n_eff": 30.0
    }  # fmt: skip
    lines = sections(to_markdown(found))["Metrics"]
    assert cells(lines[0]) == ["metric", "value", "95 % interval", "n", "n_eff", "method"]
    assert set(cells(lines[1])) == {"---"}
    table = {row[0]: row[1:] for row in map(cells, lines[2:]) if row}
    assert [*table] == [*found["metrics"]]
    assert table["throughput"] == [
        "80 samples/s", "79.25 samples/s to 80.5 samples/s", "80", "30",
        "batch means, within this run",
    ]  # fmt: skip
    assert table["latency.max"][0] == "1 s"
    assert table["latency.p50"][0] == "540 ms"
    assert table["accuracy"][0] == "0.95"
    assert table["memory.peak"][0] == "160 MB"
    number = re.fullmatch(r"none \((\d+)\)", table["latency.p50"][1])
    assert number
    reason = found["metrics"]["latency.p50"]["reason"]
    assert reason
    assert f"- ({number[1]}) {reason}" in lines


def test_an_unknown_value_has_its_reason():
    found = result(lambda ranks: setattr(ranks[1], "after", None))
    lines = sections(to_markdown(found))["Metrics"]
    row = cells(lines[2])
    assert row[:3] == ["throughput", "none (1)", "none (1)"]
    assert "- (1) the window of rank 1 was cut short" in lines
    # Each reason stands there once.
    reasons = [line.split(") ", 1) for line in lines if line.startswith("- (")]
    assert len({reason for _, reason in reasons}) == len(reasons)
    assert [number for number, _ in reasons] == [f"- ({n + 1}" for n in range(len(reasons))]


def test_the_table_of_ranks():
    lines = sections(to_markdown(result()))["Ranks"]
    head, first, second = (cells(lines[n]) for n in (0, 2, 3))
    assert len(lines) == 4
    assert head[:5] == ["rank", "host", "device", "replica", "samples"]
    assert "device_busy" not in head  # no rank has it
    assert first[:5] == ["0", "node-0", "cpu", "0", "40"]
    assert dict(zip(head, second, strict=True)) | {} == {
        **dict(zip(head, second, strict=True)),
        "host": "node-1", "finish_s": "0.9", "idle_s": "0.1", "memory_peak_bytes": "160000000",
    }  # fmt: skip


@pytest.mark.parametrize(("ranks", "more"), [(64, 0), (65, 1), (100, 36)])
def test_a_table_of_many_ranks(ranks, more):
    group_ns = [90_000_000] * ranks
    for worst in (62, 63):
        group_ns[worst] = 100_000_000
    lines = sections(to_markdown(result(ranks=ranks, group_ns=group_ns)))["Ranks"]
    shown = [int(row[0]) for row in map(cells, lines[2:]) if row]
    assert len(shown) == 64
    assert shown == sorted(shown)
    assert shown[:60] == [*range(60)]
    assert {62, 63} <= set(shown)
    assert any(line.startswith("and ") for line in lines) == (more > 0)
    if more:
        assert lines[-1].startswith(f"and {more} more: these are the first 60 and, of the others")


def test_a_rank_without_an_end_is_among_those_that_are_shown():
    found = result(ranks=70)
    found["per_rank"][65] |= {"finish_s": None}
    lines = sections(to_markdown(found))["Ranks"]
    assert "65" in [row[0] for row in map(cells, lines[2:]) if row]


def test_the_environment():
    def change(ranks: list[Rank]) -> None:
        for rank in ranks:
            rank.before["environment"] |= {
                "cpu_governor": None, "kernel": f"6.{rank.before['rank']}", "nothing": None,
                "reasons": {"cpu_governor": "no cpufreq here"},
            }  # fmt: skip

    lines = sections(to_markdown(result(change)))["Environment"]
    assert lines[0] == "<details><summary>what all ranks have in common</summary>"
    table = dict(row for row in map(cells, lines) if row)
    assert table["python"] == "3.11.9"
    assert table["cpu_governor"] == "unknown: no cpufreq here"
    assert table["nothing"] == "unknown: see each rank"
    assert "reasons" not in table
    assert "- rank 1 (node-1): hostname node-1; kernel 6.1" in lines


def test_the_environment_of_many_ranks():
    lines = sections(to_markdown(result(ranks=70)))["Environment"]
    assert sum(line.startswith("- rank ") for line in lines) == 64
    assert "- and 6 more" in lines


def test_the_command_and_the_run_can_be_copied():
    def change(ranks: list[Rank]) -> None:
        for rank in ranks:
            rank.before["command"] = "python -m distbench.offline --name `x` '|'"

    text = to_markdown(result(change))
    assert "Command: `` python -m distbench.offline --name `x` '|' ``\n" in text
    assert text.endswith("Run: `20260101T000000Z-offline-0123abcd`\n")


HOSTILE = "a|b <script>x</script> *c* `d` [e](f) @g _h_ ~~i~~ \\ &amp;\n# j"


def test_what_others_wrote_is_no_markup():
    def change(ranks: list[Rank]) -> None:
        ranks[1].before["host"] = HOSTILE
        ranks[0].before["findings"] = [
            {"level": "info", "code": "x", "message": HOSTILE, "rank": None, "host": "",
             "value": None, "limit": None, "remedy": HOSTILE},
        ]  # fmt: skip

    text = to_markdown(result(change))
    assert "<script" not in text
    assert "@" not in text
    assert not re.search(r"^# j", text, flags=re.MULTILINE)
    lines = sections(text)
    # Columns stay columns, and the text is all there once markup is read.
    widths = {len(cells(line)) for line in lines["Ranks"]}
    assert len(widths) == 1
    host = cells(lines["Ranks"][3])[1]
    assert html.unescape(re.sub(r"\\(.)", r"\1", host)) == " ".join(HOSTILE.split())
    for mark in ("*c*", "`d`", "[e]", "_h_", "~~i"):
        assert mark not in host


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "r")


def test_one_format_goes_to_stdout(folder, capsys):
    found = load_result(str(folder))
    for argv, wanted in (
        ([], to_text(found)),
        (["--format", "text"], (folder / "report.txt").read_text()),
        (["--format", "json"], (folder / "result.json").read_text()),
        (["--format", "csv"], metrics_csv(found)),
        (["--format=md"], to_markdown(found)),
    ):
        assert main([*argv, str(folder)]) == 0
        assert capsys.readouterr().out == wanted


def test_several_formats_go_to_files(folder, tmp_path, capsys):
    out = tmp_path / "new" / "one"
    argv = [str(folder), "--format", "text,json,csv,md", "--output_dir", str(out)]
    assert main(argv) == 0
    names = ["report.txt", "report.json", "report.csv", "report-ranks.csv", "report.md"]
    assert capsys.readouterr().out == "".join(f"{out / name}\n" for name in names)
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    found = load_result(str(folder))
    assert (out / "report.txt").read_text() == to_text(found)
    assert files.read_json(out / "report.json") == found
    assert (out / "report.csv").read_text() == metrics_csv(found)
    assert (out / "report-ranks.csv").read_text() == ranks_csv(found)
    assert (out / "report.md").read_text() == to_markdown(found)
    with pytest.raises(UsageError, match="2 formats do not go to stdout together: give --output-d"):
        main([str(folder), "--format", "md,csv"])


def test_figures_are_recomputed(folder, tmp_path, capsys):
    lying = make_run(tmp_path / "lying")
    (lying / "result.json").write_text("{}")
    main([str(lying), "--format", "json"])
    assert capsys.readouterr().out == (folder / "result.json").read_text()


def test_an_incomplete_run_is_reported(tmp_path, capsys):
    make_run(tmp_path / "r", report=False, change=kill_rank_1)
    for name in FORMATS:
        assert main([str(tmp_path / "r"), "--format", name]) == 0
        assert capsys.readouterr().out
    main([str(tmp_path / "r"), "--format", "md"])
    assert capsys.readouterr().out.startswith("**MEASUREMENT INCOMPLETE; ")


def test_what_cannot_be_reported(folder, tmp_path):
    for argv in ([], [str(folder), str(folder)], [str(folder), "--"]):
        with pytest.raises(UsageError, match="give one result directory"):
            main(argv)
    with pytest.raises(UsageError, match="is no result directory"):
        main([str(tmp_path)])
    with pytest.raises(UsageError, match=r"--format: 'markdow' is not one of text, json, csv, md"):
        main([str(folder), "--format", "markdow"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file cannot be written: "):
        main([str(folder), "--format", "md", "--output-dir", str(tmp_path / "file")])


def test_formats_are_read():
    assert read_formats("md, csv,md") == ("md", "csv")
    with pytest.raises(UsageError, match=r"'jsn' is not one of .*; did you mean json\?"):
        read_formats("jsn")
    with pytest.raises(UsageError, match="'' is not one of"):
        read_formats(",")
