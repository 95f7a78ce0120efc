"""The launcher's command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from options import given, parse

RUN = ("--", "-m", "distbench.offline")
MLPERF = ("--", "-m", "distbench.mlperf", "--payload", "data")
SERVER = ("--", "-m", "distbench.server")
AWAY = ("--hosts", "jw2", "--loadgen-host", "jw1")


def test_hosts_env_and_command_are_read() -> None:
    made = parse(["--hosts", "jw2,bench@jw3:4", "--env", "A=b=c", "--env", "B=", *RUN, "--x"], "")
    assert [(host.name, host.processes) for host in made.hosts] == [("jw2", 0), ("bench@jw3", 4)]
    assert made.env == {"A": "b=c", "B": ""}
    assert made.command == ("-m", "distbench.offline", "--x")
    assert (made.repeat, made.swap, made.dry_run, made.print_env) == (1, False, False, False)


def test_a_hostfile_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("jw2  # the first\n\n# none here\njw3:2 jw4\n")
    made = parse(["--hostfile", str(path), *RUN], "")
    assert [(h.name, h.processes) for h in made.hosts] == [("jw2", 0), ("jw3", 2), ("jw4", 0)]


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--hosts", "jw2"], "say what to run behind --"),
        (["--hosts", "-oProxyCommand=x", *RUN], "--hosts"),
        (["--hosts", "jw2,-x", *RUN], "'-x' is no HOST"),
        (["--hosts", "jw2:0", *RUN], "'jw2:0' is no HOST"),
        (["--hosts", "jw2:x", *RUN], "'jw2:x' is no HOST"),
        (["--hosts", ",", *RUN], "no host was named"),
        (["--hosts", "jw2,jw2:2", *RUN], "named twice"),
        (["--hosts", "jw2", "--env", "A", *RUN], "NAME=VALUE, not 'A'"),
        (["--hosts", "jw2", "--env", "1A=x", *RUN], "NAME=VALUE"),
        (["--hosts", "jw2,jw3", "--swap", *RUN], "--repeat 4, 8"),
        (["--hosts", "jw2", "--swap", "--repeat", "4", *RUN], "takes two hosts"),
        (["--hosts", "jw2", "--repeat", "0", *RUN], "at least one run"),
        (["--hostfile", "/nowhere/hosts", *RUN], "No such file"),
        ([*RUN], "--hosts --hostfile is required"),
        (["--hosts", "jw2", "--", "distbench.offline"], "not 'distbench.offline'"),
        (["--hosts", "jw2", *RUN, "--repeat", "2"], "before the --"),
        (["--hosts", "jw2", "--print-env", *RUN], "--print-env starts nothing"),
        (["--hosts", "jw2", *RUN, "--loadgen-host", "jw1"], "--loadgen-host goes before the --"),
        (["--hosts", "jw2", "--loadgen-host", "-x", *MLPERF], "expected one argument"),
        (["--hosts", "jw2", "--loadgen-host", "a b", *MLPERF], "'a b' is no HOST"),
        (["--hosts", "jw1,jw2", "--loadgen-host", "jw1", *MLPERF], "jw1 has ranks: leave the opt"),
        (["--hosts", "jw2", "--loadgen-host", "jw1", *RUN], "is for -m distbench.mlperf and"),
        (["--hosts", "jw2", "--loadgen-host", "jw1", *SERVER], "is for -m distbench.mlperf and"),
        (["--hosts", "jw2", "--loadgen-host", "jw1", "--deploy"], "is for -m distbench.mlperf and"),
        (["--hosts", "jw2", "--loadgen-host", "jw1", "--print-env"], "is for -m distbench.mlperf"),
        ([*AWAY, *MLPERF, "--driver", "a:1"], "leave out one of the two"),
        ([*AWAY, *MLPERF, "--driver_token=t"], "leave out one of the two"),
        ([*AWAY, *MLPERF[:-2]], "give --payload data"),
        ([*AWAY, *MLPERF, "--payload=index"], "give --payload data"),
        (["--hosts", "jw2", "--loadgen-dir", "x", *MLPERF], "are of --loadgen-host"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_sentence(
    capsys: pytest.CaptureFixture[str], argv: list[str], word: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(argv, "")
    assert stop.value.code == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("command", [MLPERF, (*SERVER, "--dispatch=central")])
def test_a_host_that_drives_has_the_others_python_and_folder_unless_told(
    command: tuple[str, ...],
) -> None:
    given = ["--hosts", "jw2,jw3", "--python", "py", "--dir", "d", "--loadgen-host", "me@jw1"]
    made = parse([*given, *command], "")
    assert (made.loadgen_host, made.loadgen_python, made.loadgen_dir) == ("me@jw1", "py", "d")
    made = parse([*given, "--loadgen-python", "own", "--loadgen-dir", "clone", *command], "")
    assert (made.loadgen_python, made.loadgen_dir, made.python) == ("own", "clone", "py")
    assert made.command == command[1:]


def test_options_of_the_command_are_read_as_distbench_reads_them() -> None:
    command = ["-m", "distbench.offline", "--output_dir", "a", "--output-dir=b c", "--device=cpu"]
    assert given(command, "output-dir", "results") == "b c"
    assert given(command, "device") == "cpu"
    assert given(command, "name", "none") == "none"
    assert given([*command, "--name"], "name", "none") == ""
