"""How a model is cut over ranks: what divides, who holds what, which layout should win."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbench.errors import UsageError
from distbench.layout import (
    Layout,
    ShardPlan,
    balanced,
    bubble,
    bubble_of_loop,
    check_shape,
    check_world,
    lanes_of,
    own_part,
    own_weights,
    parse_layout,
    stages,
)
from distbench.plan import main as plan
from distbench.predict import Link, Speed, Work, foresee, largest_share, reduce_of
from distbench.shape import TRAINED, NetConfig, llama_config
from distbench.shard_plan import bytes_per_s


@pytest.mark.parametrize(
    ("text", "degree", "layout"),
    [
        ("pp", None, Layout(pp=4)),
        ("pp", 2, Layout(pp=2)),
        ("tp3", None, Layout(tp=3)),
        ("tp2", 2, Layout(tp=2)),
        ("pp2xtp3", None, Layout(2, 3)),
        ("pp2xtp3", 6, Layout(2, 3)),
        ("replicas", 5, Layout()),
    ],
)
def test_a_layout_is_read(text: str, degree: int | None, layout: Layout) -> None:
    assert parse_layout(text, degree, 4) == layout
    assert parse_layout(layout.name, None, 4) == layout


@pytest.mark.parametrize(
    ("text", "degree", "words"),
    [
        ("", None, "is none of pp, tp"),
        ("dp2", None, "is none of pp, tp"),
        ("tp2xpp2", None, "is none of pp, tp"),
        ("pp2xpp2", None, "is none of pp, tp"),
        ("pp2x", None, "is none of pp, tp"),
        ("ppxtp2", None, "give both numbers"),
        ("pp1", None, "is no shard"),
        ("pp0xtp2", None, "is no shard"),
        ("pp2", 4, "contradict"),
        ("pp2xtp2", 2, "contradict"),
    ],
)
def test_what_is_no_layout_is_refused(text: str, degree: int | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_layout(text, degree, 4)


def test_ranks_are_numbered_replica_by_replica_and_stage_by_stage() -> None:
    layout = Layout(2, 2)
    places = [(layout.stage(rank), layout.part(rank)) for rank in range(8)]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1)] * 2
    assert layout.leaders(8) == [0, 4]


@pytest.mark.parametrize(
    ("layout", "ranks", "remedy"),
    [
        (Layout(pp=2), 3, "start 2 or 4, or give --degree 3"),
        (Layout(tp=4), 6, "start 4 or 8, or give --degree 3"),
        (Layout(2, 2), 6, r"\(pp2xtp2\): start 4 or 8$"),
        (Layout(pp=3), 2, "start 3, or give --degree 2"),
    ],
)
def test_ranks_that_make_no_replicas(layout: Layout, ranks: int, remedy: str) -> None:
    with pytest.raises(UsageError, match=remedy):
        check_world(layout, ranks)
    check_world(layout, 2 * layout.degree)


@pytest.mark.parametrize(
    ("layout", "lanes", "remedy"),
    [
        (Layout(pp=4), 4, "3 layers has no 4 stages: give --shard pp3"),
        (Layout(tp=3), 1, "give --shard tp2"),
        (Layout(tp=4), 1, "2 key and value heads do not divide into 4 .* give --shard tp2"),
        (Layout(pp=2), 3, r"8 slots do not divide into 3 micro-batches: give .*2, or slots=9"),
        (Layout(pp=2), 16, r"give --micro-batches 8, or slots=16"),
    ],
)
def test_what_does_not_divide_names_what_does(layout: Layout, lanes: int, remedy: str) -> None:
    with pytest.raises(UsageError, match=remedy):
        check_shape(layout, TRAINED, lanes, 8)


weights = st.lists(st.integers(1, 30), min_size=1, max_size=9)


@given(weights, st.data())
def test_no_other_cut_has_a_smaller_largest_part(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    found = balanced(values, count)
    assert len(found) == count
    assert [begin for begin, _ in found] == [0, *(end for _, end in found[:-1])]
    assert found[-1][1] == len(values)
    assert all(begin < end for begin, end in found)
    best = min(
        max(sum(values[a:b]) for a, b in zip((0, *ends), (*ends, len(values)), strict=True))
        for ends in combinations(range(1, len(values)), count - 1)
    )
    assert max(sum(values[begin:end]) for begin, end in found) == best


def test_the_trained_network_is_cut_in_mid_layer() -> None:
    """An attention has 12,352 weights, a feed-forward 30,784, the head 8,192; by hand."""
    assert (TRAINED.attention_weights, TRAINED.feed_weights) == (12_352, 30_784)
    assert TRAINED.weights == 3 * (12_352 + 30_784) + 8_192 + 64 == 137_664
    assert stages(TRAINED, 2) == [(0, 3), (3, 6)]
    first, last = (own_weights(TRAINED, *halves, 1) for halves in stages(TRAINED, 2))
    assert first == 2 * 12_352 + 30_784 + 8_192
    assert last == 12_352 + 2 * 30_784 + 8_192 + 64
    assert largest_share(TRAINED, 2) == (12_352 + 2 * 30_784 + 8_192) / (137_664 - 64)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("pp", [1, 2, 3])
def test_all_parts_together_hold_the_whole(pp: int, tp: int) -> None:
    """But for embedding and head, which are one matrix on both ends, and norms on every part."""
    held = sum(own_weights(TRAINED, *halves, tp) for halves in stages(TRAINED, pp)) * tp
    norms = (2 * TRAINED.layers + 1) * TRAINED.width
    twice = TRAINED.embedding_weights * (tp * (2 if pp > 1 else 1) - 1)
    assert held == TRAINED.weights + twice + norms * (tp - 1)


def test_a_part_keeps_its_own_keys_and_values() -> None:
    own = own_part(TRAINED, 1, 4, 2)  # feed-forward, attention, feed-forward
    assert (own.layers, own.kv_heads, own.head_dim) == (1, 1, TRAINED.head_dim)
    alike = own_part(NetConfig(heads=4, kv_heads=4), 0, 6, 4)  # as many of both kinds of heads
    assert (alike.layers, alike.heads, alike.kv_heads, alike.head_dim) == (3, 1, 1, 16)


def test_lanes_divide_what_they_cut() -> None:
    assert [lanes_of(Layout(pp=2), 0, slots) for slots in (8, 6, 5, 1)] == [4, 3, 1, 1]
    assert lanes_of(Layout(tp=2), 7, 8) == 1
    assert lanes_of(Layout(pp=2), 8, 8) == 8


def test_bubbles_at_best() -> None:
    assert [bubble(2, m) for m in (1, 2, 8)] == [1 / 2, 1 / 3, 1 / 9]
    assert bubble(4, 1) == 3 / 4
    assert [bubble_of_loop(4, m) for m in (1, 2, 4, 8)] == [3 / 4, 1 / 2, 0, 0]


def test_a_plan_of_layouts() -> None:
    with pytest.raises(UsageError, match="names a layout twice: pp2, pp2"):
        ShardPlan((Layout(pp=2), Layout(pp=2)))
    for rounds in (0, 1, 3):
        with pytest.raises(UsageError, match="every other one runs in reverse"):
            ShardPlan((Layout(),), rounds=rounds)


# What is foreseen, by hand: width 8 of 4 bytes, 10 tokens after a prompt of 4, 6 texts.
SMALL = NetConfig(vocabulary=2, width=8, layers=2, heads=2, kv_heads=2, hidden=8)
WORK = Work(SMALL, 4, prompt=4.0, output=10.0, slots=6)
FAST, SLOW = Link(0.0, 1e12), Link(0.001, 32_000.0)
SPEED = Speed({6: 0.012, 3: 0.009}, 0.004)


def test_replicas_are_held_by_what_they_compute() -> None:
    told = foresee(Layout(), 1, WORK, SPEED, FAST, FAST)
    assert told.text_s == pytest.approx(10 * 0.012 / 6 + 0.004)
    assert told.held_by == "computing"


def test_parts_pay_two_reduces_a_layer() -> None:
    """Six texts are 192 bytes, 7 ms a reduce; a prompt's four tokens 128 bytes, 5 ms."""
    told = foresee(Layout(tp=2), 1, WORK, SPEED, FAST, SLOW)
    reduces = 10 * 4 * 0.007 / 6 + 4 * 0.005
    assert told.text_s == pytest.approx(0.012 + reduces)
    assert told.held_by == "all-reduces"
    assert told.share == pytest.approx(reduces / told.text_s)


def test_stages_are_held_by_the_slowest_of_three() -> None:
    half = largest_share(SMALL, 2)
    told = foresee(Layout(pp=2), 2, WORK, SPEED, FAST, FAST)
    assert told.text_s == pytest.approx(half * (10 * 0.009 / 3 + 0.004))
    assert told.held_by == "the slowest stage's computing"
    told = foresee(Layout(pp=2), 2, WORK, SPEED, Link(0.0, 1_000.0), FAST)
    assert told.text_s == pytest.approx(14 * 32 / 1_000)
    assert told.held_by == "the link between stages"
    told = foresee(Layout(pp=2), 2, WORK, SPEED, Link(0.1, 1e12), FAST)
    assert told.text_s == pytest.approx(10 * (0.009 + 2 * 0.1) / 6)
    assert told.held_by == "micro-batches on their way round"


def test_an_all_reduce_by_its_links() -> None:
    """A ring of 4: six messages of a quarter of the data."""
    told = reduce_of(Link(0.001, 1000.0), 4)
    assert told.time_s(400) == pytest.approx(6 * (0.001 + 100 / 1000))


def test_a_plan_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    slow = ["--link-rate", "100Mbit/s", "--flops", "5e9", "--memory-rate", "5GB/s"]
    assert plan(["--shard", "pp,tp,replicas", *slow]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith("replicas should win: ")
    assert [line.split()[0] for line in out[2:5]] == ["pp2", "tp2", "replicas"]
    with pytest.raises(UsageError, match="--flops is needed"):
        plan(["--shard", "pp", "--link-rate", "1Gbit/s"])
    with pytest.raises(UsageError, match="--ranks is of --shard"):
        plan(["--ranks", "4", "--target-qps", "1"])
    with pytest.raises(UsageError, match="--shard plans token models"):
        plan(["--shard", "pp", "--model", "digits", *slow])


def test_rates_have_units() -> None:
    assert bytes_per_s("8kbit/s") == 1000
    assert bytes_per_s("2.5GB/s") == 2.5e9
    for wrong in ("1", "1Gb/s", "xGbit/s", "-1Gbit/s", "0bit/s", "1.2.3GB/s"):
        with pytest.raises(UsageError, match="is no rate"):
            bytes_per_s(wrong)


def test_sizes_of_a_llama() -> None:
    config = llama_config({"layers": 2, "d": 96, "heads": 6, "kv_heads": 3})
    assert (config.hidden, config.vocabulary, config.head_dim) == (256, 256, 16)
    with pytest.raises(UsageError, match="heads do not divide"):
        llama_config({"d": 100, "heads": 8})
