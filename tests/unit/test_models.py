"""What --model and --dtype take, as far as that needs no torch."""

from types import SimpleNamespace

import numpy as np
import pytest

from distbench.cli import parse
from distbench.command import COMMON_OPTIONS, settings_from
from distbench.conditions import covers
from distbench.errors import UsageError
from distbench.finish import HALF_TOLERANCE, TOLERANCE, alike, check_outputs, tolerance
from distbench.models import DTYPES, check_model, load_model, split_model
from distbench.sut import Echo


def settings(*argv):
    return settings_from("distbench.x", parse("distbench.x", "", COMMON_OPTIONS, argv), argv)


def test_options_of_resnet50_are_read():
    assert split_model("resnet50") == ("resnet50", {})
    assert split_model("resnet50,weights=/a b/r.pth,samples=64,layout=contiguous") == (
        "resnet50",
        {"weights": "/a b/r.pth", "samples": 64, "layout": "contiguous"},
    )


def test_a_colon_in_a_path_makes_no_factory():
    spec = "resnet50,weights=/mnt/nfs:weights/r.pth"
    assert check_model(spec) == spec
    assert split_model(spec)[1] == {"weights": "/mnt/nfs:weights/r.pth"}
    assert check_model("mine:build") == "mine:build"


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("resnet", "there is no model 'resnet'; did you mean resnet50?; there are digits, "),
        ("resnet50,width=3", "model resnet50 takes no 'width=3'; it takes weights=..., samples"),
        ("resnet50,weights=", "model resnet50, weights: no file is named"),
        ("resnet50,samples=0", "model resnet50, samples: '0' is not a whole number of at least 1"),
        (
            "resnet50,layout=channel_last",
            "model resnet50, layout: 'channel_last' is not one of channels_last, contiguous; "
            "did you mean channels_last?",
        ),
    ],
)
def test_what_resnet50_does_not_take(spec, sentence):
    with pytest.raises(UsageError) as caught:
        check_model(spec)
    assert str(caught.value).startswith(sentence)


# --dtype


def test_the_default_is_the_models_own_and_is_recorded_as_such():
    found = settings()
    assert found.dtype == ""
    assert found.config["dtype"] == {"value": None, "origin": "default"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_reaches_the_settings_and_the_record(dtype):
    found = settings("--dtype", dtype)
    assert found.dtype == dtype
    assert found.config["dtype"] == {"value": dtype, "origin": "command line"}


@pytest.mark.parametrize(
    ("wrong", "near"), [("fp8", "fp32"), ("bfloat16", "bf16"), ("f16", "fp16")]
)
def test_a_wrong_dtype_is_refused_with_the_nearest(wrong, near):
    with pytest.raises(UsageError) as caught:
        settings("--dtype", wrong)
    assert str(caught.value) == (
        f"--dtype: {wrong!r} is not one of fp32, tf32, bf16, fp16; did you mean {near}?"
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("sleep,per_sample=2ms", "does not apply to model sleep: it computes nothing"),
        ("echo", "does not apply to model echo: it computes nothing"),
        ("mine:build", "does not apply to model mine:build: its factory decides"),
    ],
)
def test_a_dtype_that_nothing_would_follow_is_refused(spec, reason, dtype):
    with pytest.raises(UsageError, match=f"--dtype {dtype} {reason}"):
        load_model(spec, SimpleNamespace(), 1, dtype)


def test_a_stand_in_without_a_dtype_is_built_and_states_none():
    sut = load_model("echo", SimpleNamespace(), 1)
    assert isinstance(sut, Echo)
    assert not hasattr(sut, "dtype")


@pytest.mark.parametrize(
    "name", ["model.dtype", "cuda_matmul_allow_tf32", "cudnn_conv_fp32_precision"]
)
def test_one_word_names_all_that_a_dtype_changes(name):
    assert covers("dtype", name)


@pytest.mark.parametrize(
    ("dtype", "within"),
    [
        (None, TOLERANCE),
        ("fp32", TOLERANCE),
        ("tf32", TOLERANCE),
        ("bf16", HALF_TOLERANCE),
        ("fp16", HALF_TOLERANCE),
    ],
)
def test_outputs_may_differ_by_what_the_dtype_rounds(dtype, within):
    sut = SimpleNamespace() if dtype is None else SimpleNamespace(dtype=dtype)
    assert tolerance(sut) == within
    assert (TOLERANCE, HALF_TOLERANCE) == (1e-3, 2e-2)


def test_a_wider_tolerance_reaches_every_output():
    one = [1.0, {"a": np.array([2.0, 3.0])}, [4.0, 5.0]]
    other = [1.01, {"a": np.array([2.02, 2.97])}, [4.04, 5.05]]
    assert not alike(one, other)
    assert alike(one, other, 2e-2)
    kept, indices_of = {0: [np.array([1.0, 0.5])]}, {0: [7]}
    accurate = {7: np.array([1.01, 0.5])}
    assert check_outputs(kept, indices_of, accurate)["different"] == 1
    assert check_outputs(kept, indices_of, accurate, 2e-2)["different"] == 0
