"""The digits network: its accuracy, and that neither batch size nor other code changes it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from distbench.errors import UsageError
from distbench.models import digits_data, train_digits
from distbench.models.digits_data import SHA256, WEIGHTS_FILE
from distbench.models.digits_net import DigitsNet, build_net, random_net, read_data

# What the one training run gave. The closest call among all images is 0.21 apart in the logits, so
# float32 rounding, which differs between machines, cannot change it.
HELD_OUT_RIGHT = 360
REQUIRED_RIGHT = 357


@pytest.fixture(scope="module")
def data():
    return read_data()


@pytest.fixture(scope="module")
def net():
    return build_net()[0]


def logits(net, images):
    with torch.inference_mode():
        return net(torch.as_tensor(images))


def test_held_out_accuracy(net, data):
    answers = logits(net, data.images[data.held_out]).argmax(dim=1).numpy()
    right = np.count_nonzero(answers == data.labels[data.held_out])
    assert right >= REQUIRED_RIGHT
    assert right == HELD_OUT_RIGHT


def test_no_answer_hangs_on_rounding(net, data):
    best, second = logits(net, data.images).topk(2, dim=1).values.unbind(dim=1)
    assert (best - second).min() > 0.1


def test_answers_do_not_depend_on_the_batch(net, data):
    images = torch.from_numpy(data.images)
    one = torch.cat([logits(net, batch).argmax(dim=1) for batch in images.split(1)])
    many = torch.cat([logits(net, batch).argmax(dim=1) for batch in images.split(64)])
    assert torch.equal(one, many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 5])
def test_bytes_go_in_and_float32_logits_come_out(data, dtype, count):
    out = logits(build_net()[0].to(dtype), data.images[:count])
    assert (out.shape, out.dtype) == ((count, 10), torch.float32)


def test_pixels_become_the_parameters_dtype_between_0_and_1(data):
    net = build_net()[0].to(torch.bfloat16)
    seen = []
    net.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    logits(net, data.images)
    assert (seen[0].shape, seen[0].dtype) == ((1797, 1, 8, 8), torch.bfloat16)
    assert (seen[0].min(), seen[0].max()) == (0, 1)


def test_images_go_to_the_device_of_the_model(data):
    out = build_net()[0].to("meta")(torch.from_numpy(data.images))
    assert out.device.type == "meta"


def test_trained_net_is_named_by_its_file_whatever_the_seed():
    first, provenance = build_net()
    second, again = build_net(seed=7)
    assert provenance == again == f"sha256:{SHA256[WEIGHTS_FILE]}"
    assert not first.training
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_random_net_follows_its_seed():
    first, provenance = build_net(width=8, depth=5, seed=3)
    second, _ = build_net(width=8, depth=5, seed=3)
    other, _ = build_net(width=8, depth=5, seed=4)
    assert provenance == "random(seed=3)"
    assert not first.training
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize(("width", "depth"), [(32, 3), (16, 4)])
def test_building_leaves_the_global_generator_alone(width, depth):
    before = torch.get_rng_state()
    build_net(width, depth)
    assert torch.equal(torch.get_rng_state(), before)


def test_depth_counts_convolutions_and_the_deepest_stays_finite_in_half_precision(data):
    net, _ = build_net(width=16, depth=32)
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in net.layers) == 32
    out = logits(net.half(), data.images[:8])
    assert torch.isfinite(out).all()
    assert out.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ({"width": 0}, "width 0 .* between 1 and 1024"),
        ({"width": 1025}, "width 1025 .* between 1 and 1024"),
        ({"depth": 2}, "depth 2 .* between 3 and 32"),
        ({"depth": 33}, "depth 33 .* between 3 and 32"),
    ],
)
@pytest.mark.parametrize("make", [build_net, DigitsNet])
def test_sizes_outside_the_limits_are_refused(make, size, sentence):
    with pytest.raises(UsageError, match=sentence):
        make(**size)


def test_corrupted_weights_are_refused(tmp_path):
    content = bytearray((Path(digits_data.__file__).parent / WEIGHTS_FILE).read_bytes())
    content[1000] ^= 1
    (tmp_path / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(UsageError, match=f"{SHA256[WEIGHTS_FILE]}.*reinstall distbench") as caught:
        build_net(folder=tmp_path)
    assert str(tmp_path / WEIGHTS_FILE) in str(caught.value)


def test_folding_batch_norms_keeps_the_answers(data):
    net = random_net(4, 3, seed=0)
    net.layers = train_digits.with_batch_norms(net.layers)
    images = torch.from_numpy(data.images[:64])
    net(images)  # moves the running means and variances
    net.eval()
    before = logits(net, images)
    net.layers = train_digits.without_batch_norms(net.layers)
    assert len(net.layers) == 6
    torch.testing.assert_close(logits(net, images), before)


def test_shift_moves_by_at_most_a_pixel_and_fills_with_paper():
    images = torch.zeros(200, 8, 8, dtype=torch.uint8)
    images[:, 0, 4] = 9
    moved = train_digits.shift(images, torch.Generator().manual_seed(0))
    places = {tuple(place[1:]) for place in moved.nonzero().tolist()}
    assert places == {(row, column) for row in (0, 1) for column in (3, 4, 5)}
    assert (moved.shape, moved.dtype) == (images.shape, torch.uint8)


def test_a_short_training_learns_and_can_be_repeated(data, monkeypatch):
    monkeypatch.setattr(train_digits, "EPOCHS", 1)
    first, second = train_digits.train(data), train_digits.train(data)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert train_digits.count_right(first, data) > 180


def test_training_averages_the_last_epochs(data, monkeypatch):
    monkeypatch.setattr(train_digits, "EPOCHS", 2)
    both = train_digits.train(data)
    monkeypatch.setattr(train_digits, "AVERAGED_EPOCHS", 1)
    last = train_digits.train(data)
    assert not np.array_equal(both["head.weight"], last["head.weight"])


def test_training_sees_no_held_out_row(data, monkeypatch):
    seen = set()

    def spy(images, generator):
        seen.update(image.tobytes() for image in images.numpy())
        return images

    monkeypatch.setattr(train_digits, "EPOCHS", 1)
    monkeypatch.setattr(train_digits, "shift", spy)
    train_digits.train(data)
    assert len(seen) == 1437
    assert seen.isdisjoint(image.tobytes() for image in data.images[data.held_out])
