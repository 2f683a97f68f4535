"""Fashion-MNIST: search order, hashes, the one error when it is absent; the full set where it is installed."""

from __future__ import annotations

import gzip
import struct

import pytest
import torch

from fastsharp import data
from fastsharp.data import fashion_mnist
from fastsharp.data.idx import read_idx
from fastsharp.errors import DataFormatError, DataNotFoundError, InputError

N = 20


def write_set(folder, monkeypatch=None, *, zipped=False, shade=0, labels=None):
    """A fake train split of N images of one shade; its hashes become the pinned ones."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = [i % 10 for i in range(N)] if labels is None else labels
    contents = {
        "train-images-idx3-ubyte": struct.pack(">HBB3I", 0, 8, 3, N, 28, 28) + bytes([shade]) * (N * 28 * 28),
        "train-labels-idx1-ubyte": struct.pack(">HBB1I", 0, 8, 1, len(labels)) + bytes(labels),
    }
    pins = {}
    for (name, content), ndim in zip(contents.items(), (3, 1), strict=True):
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)
        pins[name] = read_idx(path, ndim)[1]
    if monkeypatch is not None:
        monkeypatch.setattr(fashion_mnist, "SHA256", pins)


@pytest.mark.parametrize("layout", ["FashionMNIST/raw", "fashion-mnist", "."])
@pytest.mark.parametrize("zipped", [False, True])
def test_layouts_of_torchvision_debian_and_bare_files(tmp_path, monkeypatch, layout, zipped, network):
    write_set(tmp_path / "root" / layout, monkeypatch, zipped=zipped, shade=7)
    got = data.load("fashion_mnist", root=tmp_path / "root")
    assert got.images.shape == (N, 28, 28)
    assert got.images.unique().tolist() == [7]
    assert (got.name, got.split, got.lossy, got.pinned, got.indices) == ("Fashion-MNIST", "train", False, True, None)
    assert got.source == str(tmp_path / "root" / layout)
    assert network == []


def test_the_first_place_wins_and_is_reported(tmp_path, monkeypatch, bare):
    order = [tmp_path / "root", bare["variable"], bare["debian"], bare["cache"]]
    for folder in reversed(order):
        write_set(folder, monkeypatch)
        assert data.load("fashion_mnist", root=tmp_path / "root").source == str(folder)


def test_a_place_with_only_one_of_two_files_is_passed_over(tmp_path, monkeypatch, bare):
    write_set(bare["cache"], monkeypatch)
    write_set(tmp_path / "root")
    (tmp_path / "root" / "train-labels-idx1-ubyte").unlink()
    assert data.load("fashion_mnist", root=tmp_path / "root").source == str(bare["cache"])


def test_absent_is_one_error_with_every_place_and_the_command(tmp_path, bare, network):
    with pytest.raises(DataNotFoundError) as e:
        data.load("fashion_mnist", root=tmp_path / "root")
    text = str(e.value)
    for part in (tmp_path / "root", *bare.values(), "train-images-idx3-ubyte", "apt-get install dataset-fashion-mnist", "download=True"):
        assert str(part) in text
    assert len(text.splitlines()) <= 5
    assert network == []


def test_wrong_hash_names_both_and_leaves_the_file(tmp_path, monkeypatch):
    write_set(tmp_path, monkeypatch)
    path = tmp_path / "train-images-idx3-ubyte"
    changed = path.read_bytes()[:-1] + b"\x01"
    path.write_bytes(changed)
    with pytest.raises(DataFormatError) as e:
        data.load("fashion_mnist", root=tmp_path)
    assert fashion_mnist.SHA256["train-images-idx3-ubyte"] in str(e.value)
    assert read_idx(path, 3)[1] in str(e.value)
    assert path.read_bytes() == changed


@pytest.mark.parametrize(("labels", "part"), [([0] * (N - 1), "do not belong together"), ([0] * (N - 1) + [10], "0..10")])
def test_labels_that_do_not_fit_the_images(tmp_path, monkeypatch, labels, part):
    write_set(tmp_path, monkeypatch, labels=labels)
    with pytest.raises(DataFormatError, match=part):
        data.load("fashion_mnist", root=tmp_path)


def test_download_offline_is_the_same_error_chained(tmp_path, network):
    pytest.importorskip("torchvision", reason="download=True goes through torchvision, which is not installed")
    with pytest.raises(DataNotFoundError, match="download into") as e:
        data.load("fashion_mnist", root=tmp_path, download=True)
    assert isinstance(e.value.__cause__, (OSError, RuntimeError))
    assert network


def test_unknown_split(tmp_path):
    with pytest.raises(InputError, match="'valid'"):
        data.load("fashion_mnist", split="valid", root=tmp_path)


@pytest.mark.parametrize(("split", "count"), [("train", 60_000), ("test", 10_000)])
def test_the_full_set_has_its_published_counts_and_statistics(real_places, split, count):
    for place in real_places:
        try:
            got = data.load("fashion_mnist", split=split, root=place)
            break
        except DataNotFoundError:
            continue
    else:
        pytest.skip("Fashion-MNIST is not installed (apt-get install dataset-fashion-mnist, or set FASTSHARP_DATA)")
    assert torch.bincount(got.labels).tolist() == [count // 10] * 10
    if split == "train":
        x = got.images.to(torch.float64) / 255
        assert round(float(x.mean()), 4) == got.mean[0]
        assert round(float(x.std()), 4) == got.std[0]
    mini = data.load("fashion_mnist_mini", split=split)
    assert torch.equal(got.images[mini.indices], mini.images)
    assert torch.equal(got.labels[mini.indices], mini.labels)
