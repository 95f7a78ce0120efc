"""Weights from a file: what is read, and each way in which a file is refused."""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distbench.errors import UsageError
from distbench.models.weights import load_strictly, read_weights


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 2))


def _filled() -> dict[str, torch.Tensor]:
    """Return tensors for ``_net`` whose every number tells its name and place."""
    return {
        name: (torch.arange(value.numel(), dtype=torch.float64).reshape(value.shape) + 100 * at).to(
            value.dtype
        )
        for at, (name, value) in enumerate(_net().state_dict().items())
    }


def _save_torch(tensors: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(tensors, path)


def _save_old(tensors: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def _save_npz(tensors: dict[str, torch.Tensor], path: Path) -> None:
    np.savez(path, **{name: value.numpy() for name, value in tensors.items()})


def _save_safetensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    pytest.importorskip("safetensors.torch").save_file(tensors, path)


FORMATS = [
    ("w.pth", _save_torch),
    ("w.pt", _save_old),
    ("w.npz", _save_npz),
    ("W.NPZ", _save_npz),
    ("w.safetensors", _save_safetensors),
]


@pytest.mark.parametrize(("name", "save"), FORMATS)
def test_every_format_gives_the_tensors_and_the_digest_of_the_file(
    tmp_path: Path, name: str, save: Any
) -> None:
    path = tmp_path / name
    if name.isupper():  # numpy.savez would put another ending behind this one
        save(_filled(), tmp_path / "w.npz")
        (tmp_path / "w.npz").rename(path)
    else:
        save(_filled(), path)
    tensors, digest = read_weights(path)
    assert digest == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    net = _net().eval()
    load_strictly(net, tensors, path)
    for key, value in net.state_dict().items():
        assert torch.equal(value, _filled()[key]), key


@pytest.mark.parametrize(("name", "save"), FORMATS[:3] + FORMATS[4:])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98])
def test_a_file_that_was_cut_short_is_refused(
    tmp_path: Path, name: str, save: Any, share: float
) -> None:
    path = tmp_path / name
    save(_filled(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UsageError) as caught:
        read_weights(path)
    sentence = str(caught.value)
    assert sentence.startswith(f"weights {path} are ")
    assert "\n" not in sentence
    assert "damaged, cut short" in sentence or "no pickle of tensors alone" in sentence


@pytest.mark.parametrize("name", ["w.pth", "w.npz", "w.safetensors"])
def test_text_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 102530333\n")
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    with pytest.raises(UsageError, match=f"weights {path} are "):
        read_weights(path)


class Evil:
    """Unpickled by pickle itself it would run a command."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch ran-by-a-pickle",)


@pytest.mark.parametrize(
    "save",
    [
        lambda path: path.write_bytes(pickle.dumps({"fc.weight": Evil()})),
        lambda path: path.write_bytes(pickle.dumps({"fc.weight": Evil()}, protocol=2)),
        lambda path: torch.save({"fc.weight": Evil()}, path),
        lambda path: torch.save(_net(), path),
        lambda path: torch.save(_net(), path, _use_new_zipfile_serialization=False),
    ],
)
def test_a_pickle_of_more_than_tensors_is_refused_and_not_run(
    tmp_path: Path, save: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    save(path)
    with pytest.raises(UsageError) as caught:
        read_weights(path)
    assert str(caught.value) == (
        f"weights {path} are no pickle of tensors alone, and any other could run code, so it was "
        "not loaded: save model.state_dict() by itself with torch.save"
    )
    assert [each.name for each in tmp_path.iterdir()] == ["w.pth"]


def test_an_npz_of_objects_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.npz"
    np.savez(path, a=np.array([Evil()], dtype=object))
    with pytest.raises(UsageError, match="damaged, cut short or of another kind"):
        read_weights(path)
    assert [each.name for each in tmp_path.iterdir()] == ["w.npz"]


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ([torch.ones(2)], "hold no tensors by name but: list; save model.state_dict() by itself"),
        (torch.ones(2), "hold no tensors by name but: Tensor; "),
        ({"state_dict": {"a": torch.ones(2)}}, "hold no dense tensor under 'state_dict' but: dict"),
        ({"a": torch.ones(2), "epoch": 3}, "hold no dense tensor under 'epoch' but: int; "),
        (
            {"a": torch.ones(2, 2).to_sparse()},
            "hold no dense tensor under 'a' but: torch.sparse_coo tensor; ",
        ),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, value: Any, sentence: str) -> None:
    path = tmp_path / "w.pth"
    torch.save(value, path)
    with pytest.raises(UsageError) as caught:
        read_weights(path)
    assert str(caught.value).startswith(f"weights {path} {sentence}")


@pytest.mark.parametrize("name", ["w.pth", "w.npz", "w.safetensors"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(UsageError) as caught:
        read_weights(path)
    assert str(caught.value) == f"weights {path} cannot be read: No such file or directory"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_weights(tmp_path)


def test_without_safetensors_the_sentence_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"1")
    with pytest.raises(UsageError, match=r"needs safetensors: pip install safetensors"):
        read_weights(path)


def test_a_torch_file_is_mapped_and_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(_filled(), path)
    tensors, _ = read_weights(path)
    maps = Path("/proc/self/maps").read_text()
    assert str(path) in maps
    assert torch.equal(tensors["0.weight"], _filled()["0.weight"])


# What the model needs


def _refused(tensors: dict[str, torch.Tensor]) -> str:
    net = _net().to("meta")  # nothing may be copied before all is known to fit
    with pytest.raises(UsageError) as caught:
        load_strictly(net, tensors, Path("w.pth"))
    start = "weights w.pth are not those of this model (8 tensors): "
    assert str(caught.value).startswith(start)
    return str(caught.value).removeprefix(start)


def test_missing_names_are_told_the_first_three_of_them() -> None:
    tensors = _filled()
    del tensors["0.weight"], tensors["2.bias"]
    assert _refused(tensors) == "missing: 0.weight, 2.bias"
    assert _refused({}) == "missing: 0.weight, 1.weight, 1.bias and 4 more"


def test_unknown_names_are_told() -> None:
    tensors = {f"module.{name}": value for name, value in _filled().items()}
    found = _refused(_filled() | tensors)
    assert found == "not known: module.0.weight, module.1.weight, module.1.bias and 5 more"


def test_shapes_are_told_with_what_is_needed() -> None:
    tensors = _filled() | {"2.weight": torch.ones(4, 2), "1.bias": torch.ones(5)}
    assert _refused(tensors) == "unlike: 1.bias (5) where (4) is needed, 2.weight (4, 2) where (2, 4) is needed"


def test_numbers_that_are_no_floats_are_told() -> None:
    tensors = _filled() | {"2.weight": torch.ones(2, 4, dtype=torch.int8)}
    assert _refused(tensors) == "unlike: 2.weight (2, 4) int8 where (2, 4) is needed"


def test_all_problems_are_told_at_once() -> None:
    tensors = _filled() | {"extra": torch.ones(1), "2.bias": torch.ones(3)}
    del tensors["0.weight"]
    assert _refused(tensors) == (
        "missing: 0.weight; not known: extra; unlike: 2.bias (3) where (2) is needed"
    )


def test_counters_of_training_may_be_absent() -> None:
    tensors = _filled()
    del tensors["1.num_batches_tracked"]
    net = _net()
    net[1].num_batches_tracked.fill_(7)
    load_strictly(net, tensors, Path("w.pth"))
    assert net[1].num_batches_tracked == 0


def test_weights_are_cast_to_the_models_dtype() -> None:
    net = _net().half()
    load_strictly(net, _filled(), Path("w.pth"))
    assert net[2].weight.dtype == torch.float16
    assert torch.equal(net[2].weight, _filled()["2.weight"].half())

