"""The text model: its network against a program of loops, its weights, and that no way of decoding
changes what it writes."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distbench.engines import slot_decoder
from distbench.errors import UsageError
from distbench.files import sha256
from distbench.gpus import Device
from distbench.models import load_model, split_model, tinylm_data, train_tinylm
from distbench.models.tinylm import (
    bits_per_byte,
    build,
    count_matching,
    describe,
    greedy,
    text_bits,
)
from distbench.models.tinylm_data import (
    SHA256,
    SLOT_LENGTH,
    WEIGHTS_FILE,
    draw_samples,
    read_expected,
    read_text,
    training_bytes,
)
from distbench.models.decoders import slot_engine
from distbench.models.tinylm_net import TinyLM, new_cache, slot_bytes
from distbench.models.tinylm_weights import build_net, load_net, random_net
from distbench.shape import TRAINED, NetConfig
from distbench.sut import Done, First, SystemUnderTest, run_indices
from tests.support import run_module

CPU = torch.device("cpu")
HELD_OUT_BITS = 1.3610
REQUIRED_BITS = 1.80
REFERENCE = "31ad59da99587b33c22c9cefbd06cc341703bd9570c0dc8cc67c4ee9325ea3ca"
LEAD = 1e-2


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The network is too small for threads to help."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text():
    return read_text()


@pytest.fixture(scope="module")
def drawn(text):
    return draw_samples(text)


@pytest.fixture(scope="module")
def expected(drawn):
    return read_expected(drawn)


@pytest.fixture(scope="module")
def net():
    return build_net()[0]


def cpu():
    return Device("cpu", 0, "", "", "", "")


# The network against a program of loops, in float64


def normed(x, weight, eps):
    return x / np.sqrt((x**2).mean() + eps) * weight


def turned(x, position, base):
    """Turn each pair of one head as a complex number."""
    half = len(x) // 2
    pairs = x[:half] + 1j * x[half:]
    pairs = pairs * np.exp(1j * position * base ** (-2 * np.arange(half) / len(x)))
    return np.concatenate((pairs.real, pairs.imag))


def attended(rows, weights, config):
    width, group = config.head_dim, config.heads // config.kv_heads
    q, k, v = (rows @ weights[f"attention.{name}.weight"].T for name in "qkv")
    mixed = np.zeros((len(rows), config.width))
    for head in range(config.heads):
        own, shared = (slice(n * width, (n + 1) * width) for n in (head, head // group))
        for at in range(len(rows)):
            query = turned(q[at, own], at, config.rope_base)
            keys = [turned(k[of, shared], of, config.rope_base) for of in range(at + 1)]
            scores = np.array([query @ key / np.sqrt(width) for key in keys])
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            mixed[at, own] = sum(s * v[of, shared] for of, s in enumerate(shares))
    return mixed @ weights["attention.o.weight"].T


def one_layer(x, weights, config):
    """Compute one block for one text, shape (T, width)."""
    eps = config.norm_eps
    x = x + attended(
        np.array([normed(row, weights["attention_norm.weight"], eps) for row in x]), weights, config
    )
    rows = np.array([normed(row, weights["feed_norm.weight"], eps) for row in x])
    gate, up = (rows @ weights[f"feed.{name}.weight"].T for name in ("gate", "up"))
    return x + (gate / (1 + np.exp(-gate)) * up) @ weights["feed.down.weight"].T


CONFIGS = [
    TRAINED,
    NetConfig(vocabulary=11, width=24, layers=2, heads=6, kv_heads=2, hidden=20, rope_base=100.0),
    NetConfig(vocabulary=11, width=16, layers=1, heads=2, kv_heads=2, hidden=7),
    NetConfig(vocabulary=11, width=16, layers=1, heads=2, kv_heads=1, hidden=7),
]


def scaled(config, seed=1):
    """Return a random network in float64 whose norms do not just pass their input on."""
    net = random_net(config, seed).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for each in net.parameters():
        if each.dim() == 1:
            each.data.uniform_(0.5, 1.5, generator=generator)
    return net


def logits_by_loops(state, codes, config):
    """Compute the logits after each token of one text, shape (T, vocabulary)."""
    x = state["embedding.weight"][codes]
    for layer in range(config.layers):
        begin = f"layers.{layer}."
        own = {n.removeprefix(begin): a for n, a in state.items() if n.startswith(begin)}
        x = one_layer(x, own, config)
    x = np.array([normed(each, state["norm.weight"], config.norm_eps) for each in x])
    return x @ state["embedding.weight"].T


@pytest.mark.parametrize("config", CONFIGS)
def test_the_network_is_what_loops_compute(config):
    net = scaled(config)
    tokens = torch.randint(0, config.vocabulary, (2, 12), generator=torch.Generator().manual_seed(0))
    state = {name: array.numpy() for name, array in net.state_dict().items()}
    with torch.inference_mode():
        logits = net(tokens).numpy()
    for row, codes in enumerate(tokens.tolist()):
        told = logits_by_loops(state, codes, config)
        np.testing.assert_allclose(logits[row], told, atol=1e-12)


@pytest.mark.parametrize("config", CONFIGS)
def test_with_a_cache_the_same_logits_come_out_in_any_slot_and_in_pieces(config):
    net = scaled(config)
    cache = new_cache(config, 5, 20, torch.float64)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config.vocabulary, (3, 15), generator=generator)
    slots = torch.tensor([4, 0, 2])
    cache.keys.fill_(1e3)  # what an earlier text left behind must not matter
    cache.values.fill_(1e3)
    with torch.inference_mode():
        whole = net(tokens)
        parts = []
        for first, end in ((0, 6), (6, 7), (7, 8), (8, 15)):
            positions = torch.arange(first, end).expand(3, -1)
            parts.append(net(tokens[:, first:end], cache, positions, slots, end))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-12, rtol=0)


def test_texts_at_different_positions_are_decoded_together():
    net = scaled(TRAINED)
    cache = new_cache(TRAINED, 4, 32, torch.float64)
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 17, 9]
    tokens = torch.randint(0, 128, (3, 32), generator=generator)
    with torch.inference_mode():
        for slot, length in enumerate(lengths):
            positions = torch.arange(length)[None]
            net(tokens[slot : slot + 1, :length], cache, positions, torch.tensor([slot]))
        at = torch.tensor(lengths)[:, None]
        logits = net(tokens.gather(1, at), cache, at)[:, 0]
        for slot, length in enumerate(lengths):
            whole = net(tokens[slot : slot + 1, : length + 1])[0, -1]
            torch.testing.assert_close(logits[slot], whole, atol=1e-12, rtol=0)


def test_the_trained_size():
    assert sum(each.numel() for each in TinyLM().parameters()) == 137_664
    assert slot_bytes(TRAINED, SLOT_LENGTH) == 147_456
    cache = new_cache(TRAINED, 3, SLOT_LENGTH)
    assert cache.keys.nbytes + cache.values.nbytes == 3 * 147_456
    assert (cache.slots, cache.length) == (3, SLOT_LENGTH)


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ({"heads": 5}, "5 heads do not divide a width of 64"),
        ({"heads": 64}, "64 heads do not divide a width of 64 into even parts"),
        ({"kv_heads": 3}, "3 key and value heads do not divide 4"),
        ({"layers": 0}, "at least 1"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(size, sentence):
    with pytest.raises(UsageError, match=sentence):
        NetConfig(**size)


def test_a_random_net_follows_its_seed_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, second, other = (random_net(TRAINED, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_a_large_random_net_stays_finite_in_half_precision():
    config = NetConfig(width=128, layers=24, heads=8, kv_heads=2, hidden=320)
    net = random_net(config, 0).bfloat16().eval()
    with torch.inference_mode():
        logits = net(torch.arange(64)[None])
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()


# The trained weights


def test_held_out_bits_per_byte(net, text):
    told = bits_per_byte(net, text, training_bytes(text))
    assert told <= REQUIRED_BITS
    assert told == pytest.approx(HELD_OUT_BITS, abs=1e-3)


def test_bits_per_byte_of_a_uniform_guess_is_7(text):
    net = random_net(TRAINED, 0).eval()
    net.norm.weight.data.zero_()
    assert bits_per_byte(net, text, len(text) - 200) == pytest.approx(7.0, abs=1e-6)


def test_bits_per_byte_counts_every_byte_once(net, text):
    piece = text[:300]
    with torch.inference_mode():
        codes = torch.tensor(list(piece))
        bits = -net(codes[None, :-1])[0].double().log_softmax(-1) / np.log(2)
    each = bits[torch.arange(299), codes[1:]]
    told = bits_per_byte(net, piece, 100, window=300, stride=200)
    assert told == pytest.approx(each[99:].mean().item(), abs=1e-6)
    assert bits_per_byte(net, piece, 100, window=300, stride=7) == pytest.approx(told, abs=1e-4)


def test_bits_of_a_text_are_those_of_the_program_of_loops(net, text):
    piece = text[training_bytes(text) :][:64]
    exact = build_net(dtype=torch.float64)[0].state_dict()
    state = {name: array.numpy() for name, array in exact.items()}
    logits = logits_by_loops(state, list(piece[:-1]), TRAINED)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    each = [-math.log2(shares[at - 1, piece[at]]) for at in range(14, 64)]
    bits, count = text_bits(net, piece, 14, window=64, stride=50)
    assert (bits, count) == (pytest.approx(math.fsum(each), abs=1e-3), 50)


@pytest.mark.parametrize("parts", [1, 3, 100])
def test_parts_of_a_text_together_are_the_whole(net, text, parts):
    begin, told = training_bytes(text), []
    sums = [
        text_bits(net, text, begin, part=part, parts=parts, tell=lambda: told.append(1))
        for part in range(parts)
    ]
    assert sum(count for _, count in sums) == len(text) - begin == 5468
    whole = HELD_OUT_BITS * 5468
    assert math.fsum(bits for bits, _ in sums) == pytest.approx(whole, rel=1e-3)
    assert len(told) == 86
    assert sums[-1] == (0.0, 0) or parts < 86


def test_the_nets_provenance_is_the_file(net):
    again, digest = build_net()
    assert digest == f"sha256:{SHA256[WEIGHTS_FILE]}"
    assert not again.training
    assert all(map(torch.equal, net.parameters(), again.parameters()))


def damaged(change):
    state = {name: array.numpy() for name, array in random_net(TRAINED, 0).state_dict().items()}
    for name, array in change.items():
        state.pop(name, None)
        if array is not None:
            state[name] = array
    return state


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"norm.weight": None}, "without norm.weight"),
        ({"head.weight": np.ones((128, 64), np.float16)}, "with unknown head.weight"),
        (
            {"layers.1.attention.k.weight": np.ones((64, 64), np.float16)},
            r"misshapen layers.1.attention.k.weight \(64, 64\) in place of \(32, 64\)",
        ),
    ],
)
def test_weights_that_are_not_this_nets_are_refused_by_name(tmp_path, change, sentence):
    path = tmp_path / "weights.npz"
    np.savez(path, **damaged(change))
    with pytest.raises(UsageError, match=sentence) as caught:
        load_net(path, path.read_bytes(), TRAINED)
    assert str(path) in str(caught.value)


def test_pickled_weights_are_refused(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, **damaged({"norm.weight": np.array([{}], object)}))
    with pytest.raises(UsageError, match=r"nothing is unpickled here"):
        load_net(path, path.read_bytes(), TRAINED)


def test_embedded_weights_that_were_changed_are_refused(tmp_path):
    (tmp_path / WEIGHTS_FILE).write_bytes(b"other")
    with pytest.raises(UsageError, match="reinstall distbench"):
        build_net(tmp_path)


# Every way of decoding writes the same


@pytest.fixture(scope="module")
def chosen(expected):
    """Every sixth held-out sample: to write them all without a cache takes a minute."""
    return expected.held_out[::6]


@pytest.fixture(scope="module")
def reference(chosen, drawn):
    """What the net writes in float64 without a cache; its least lead at any step."""
    exact = build_net(dtype=torch.float64)[0]
    return [greedy(exact, drawn.prompts[i], int(drawn.output_lengths[i])) for i in chosen]


def test_the_reference_is_the_pinned_one(reference, chosen, expected):
    assert min(lead for _, lead in reference) > LEAD
    tokens = [written for written, _ in reference]
    assert sha256(b"".join(each.astype(np.uint8).tobytes() for each in tokens)) == REFERENCE
    for index, written in zip(chosen.tolist(), tokens, strict=True):
        assert written.tolist() == expected.tokens[index].tolist()


def test_uncached_in_float32(net, chosen, drawn, reference):
    for index, (written, _) in zip(chosen.tolist(), reference, strict=True):
        again, lead = greedy(net, drawn.prompts[index], len(written))
        assert again.tolist() == written.tolist()
        assert lead > LEAD / 2


@pytest.mark.parametrize("batching", ["continuous", "static"])
@pytest.mark.parametrize("slots", [1, 3, 8, 32])
def test_cached_in_batches_of_either_kind(net, drawn, expected, chosen, slots, batching):
    indices = chosen if slots == 1 else expected.held_out
    sut = slot_engine(net, drawn, CPU, slots, batching)
    outputs = run_indices(sut, indices, 1)
    for index, output in zip(indices.tolist(), outputs, strict=True):
        assert (output.dtype, output.tolist()) == (np.int64, expected.tokens[index].tolist())


def test_each_row_has_its_first_token_before_it_is_done(net, drawn):
    sut = slot_engine(net, drawn, CPU, 4)
    for row in range(10):
        sut.issue(row, np.array([row], np.int64))
    told = []
    while len(told) < 20:
        told += sut.poll(0)
    firsts = {each.row: each.token_ns for each in told if isinstance(each, First)}
    done = {each.row: each for each in told if isinstance(each, Done)}
    assert len(told) == 20
    assert sorted(firsts) == sorted(done) == list(range(10))
    for row, each in done.items():
        assert told.index(First(row, firsts[row], each.outputs[0][0])) < told.index(each)
        assert each.started_ns < each.token_ns[0] == firsts[row]
        assert np.all(np.diff(each.token_ns) > 0)
        assert len(each.token_ns) == len(each.outputs[0]) == drawn.output_lengths[row]


# The system under test


def test_it_is_built_for_the_command(world_of_one, drawn, expected):
    sut = load_model("tinylm,slots=3,batching=static", world_of_one, 1)
    assert isinstance(sut, SystemUnderTest)
    assert (sut.total, sut.resident, sut.depth, sut.static) == (1024, 1024, 3, True)
    assert sut.digest == f"sha256:{SHA256[WEIGHTS_FILE]}"
    assert sut.held_out.tolist() == expected.held_out.tolist()
    outputs = [expected.tokens[index] for index in expected.held_out.tolist()]
    right, total = sut.score(sut.held_out, outputs)
    assert right == total == drawn.output_lengths[expected.held_out].sum()
    assert 0.9 < sut.target_accuracy <= 1


@pytest.fixture
def world_of_one():
    class World:
        device, now = cpu(), staticmethod(lambda: 1)

    return World()


def test_groups_of_more_than_one_are_refused_before_anything_is_built(world_of_one):
    with pytest.raises(UsageError, match="not 32: give --batch-size 1"):
        load_model("tinylm", world_of_one, 32)


@pytest.mark.parametrize("spec", ["tinylm,batching=dynamic", "tinylm,slots=0", "tinylm,slot=3"])
def test_unusable_options_are_refused(spec):
    with pytest.raises(UsageError, match="tinylm"):
        split_model(spec)


def test_matching_counts_places_and_a_short_output_lacks_the_rest(expected):
    first, second = expected.held_out[:2].tolist()
    one, two = expected.tokens[first], expected.tokens[second]
    changed = one.astype(np.int64)
    changed[3] += 1
    right, total = count_matching(expected, expected.held_out[:2], [changed, two[:5]])
    assert (right, total) == (len(one) - 1 + 5, len(one) + len(two))
    too_long = np.concatenate((one, one))
    assert count_matching(expected, expected.held_out[:1], [too_long]) == (len(one), len(one))


def test_operations_are_two_for_each_weight_and_token_read(net, drawn):
    weights = 128 * 64 + 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    tokens = sum(map(len, drawn.prompts)) + drawn.output_lengths.sum() - 1024
    assert describe().flops_per_sample == 2 * weights * tokens // 1024


def test_more_slots_than_memory_are_refused_with_both_sizes_and_the_most_that_fit(monkeypatch):
    monkeypatch.setattr(slot_decoder, "available_bytes", lambda device: 10 * 147_456)
    assert build(cpu(), slots=9).depth == 9
    with pytest.raises(UsageError) as caught:
        build(cpu(), slots=10)
    assert str(caught.value) == (
        "10 slots need 1,474,560 bytes for their keys and values, and 1,327,104 are usable on cpu, "
        "90% of the 1,474,560 available: give slots=9 or fewer"
    )
    monkeypatch.setattr(slot_decoder, "available_bytes", lambda device: 100_000)
    with pytest.raises(UsageError, match="free memory there"):
        build(cpu(), slots=1)


def test_the_memory_of_this_host_is_known_and_bounds_the_slots():
    available = slot_decoder.available_bytes(CPU)
    assert 10**7 < available < 10**14
    with pytest.raises(UsageError, match="1,000,000,000 slots need 147,456,000,000,000 bytes"):
        build(cpu(), slots=10**9)


def test_offline_runs_it_and_reports_the_accuracy(tmp_path: Path) -> None:
    argv = ["--model", "tinylm", "--batch-size", "1", "--num-samples", "40", "--warmup", "10ms"]
    done = run_module(
        "distbench.offline", *argv, "--device", "cpu", "--output-dir", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    result = json.loads((folder / "result.json").read_bytes())
    assert result["metrics"]["accuracy"]["value"] == 1.0
    found = result["metrics"]["bits_per_byte"]
    assert found["value"] == pytest.approx(HELD_OUT_BITS, abs=1e-3)
    assert (found["unit"], found["n"]) == ("bits/byte", 5468)
    assert "bits per byte    1.36" in done.stdout
    assert not [each for each in result["verdict"]["findings"] if "output" in each["code"]]


# The recipe


def test_a_short_training_learns_and_can_be_repeated(text):
    seen = text[: training_bytes(text)]
    first, second = train_tinylm.train(seen, 15), train_tinylm.train(seen, 15)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    net = TinyLM().eval()
    net.load_state_dict({name: torch.from_numpy(array) for name, array in first.items()})
    assert bits_per_byte(net, text, len(text) - 500) < 6.0


def test_training_and_validation_see_no_held_out_byte(text, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(train_tinylm, "train", lambda part: seen.append(part) or damaged({}))
    monkeypatch.setattr(train_tinylm, "expected", lambda *_: {"tokens": np.ones(1)})
    train_tinylm.write_weights(tmp_path, text)
    train_tinylm.validated(text)
    end = training_bytes(text)
    assert seen == [text[:end], text[: end * 9 // 10]]


def test_windows_are_cut_from_the_text_with_a_little_noise(text):
    codes = torch.tensor(list(text))
    read, wanted = train_tinylm.windows(codes, torch.Generator().manual_seed(0))
    assert read.shape == wanted.shape == (train_tinylm.BATCH_SIZE, train_tinylm.WINDOW)
    for row in wanted.tolist():
        assert bytes(row) in text
    kept = (read[:, 1:] == wanted[:, :-1]).float().mean()
    assert 1 - 2 * train_tinylm.NOISE < kept < 1


def test_dropout_leaves_out_its_share_keeps_the_mean_and_goes_without_a_trace():
    layer = torch.nn.Linear(1, 10_000)
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    generator = torch.Generator().manual_seed(0)
    out = train_tinylm.Dropout(layer, generator)(torch.ones(1, 1)).detach()
    assert (out == 0).float().mean() == pytest.approx(train_tinylm.DROPOUT, abs=0.02)
    assert out.mean() == pytest.approx(1.0, abs=0.02)
    net = random_net(TRAINED, 0)
    names = list(net.state_dict())
    train_tinylm.with_dropout(net, generator)
    assert list(net.state_dict()) != names
    assert list(train_tinylm.without_dropout(net).state_dict()) == names


def test_the_text_file_can_be_made_again(tmp_path, text):
    (tmp_path / "one").write_bytes(text[:9330])
    (tmp_path / "two").write_bytes(text[9330:])
    train_tinylm.main(
        ["--out", str(tmp_path), "--text", str(tmp_path / "one"), str(tmp_path / "two")]
    )
    made = (tmp_path / tinylm_data.TEXT_FILE).read_bytes()
    assert gzip.decompress(made) == text
