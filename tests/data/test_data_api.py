"""load and loader: the embedded sample, balanced subsets, batches in order; damage to shipped files is an error."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from fastsharp import data
from fastsharp.data import _files
from fastsharp.data.record import balanced
from fastsharp.errors import DataFormatError, DataNotFoundError, InputError

OWN = ("fashion_mnist_mini", "synthetic")


def test_names_are_complete():
    assert data.names() == ("fashion_mnist_mini", "fashion_mnist", "cifar10", "cifar10_jpeg", "synthetic")


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("split", ["train", "test"])
def test_built_in_sets_need_nothing_and_are_balanced(name, split, network):
    got = data.load(name, split=split)
    counts = torch.bincount(got.labels)
    assert counts.tolist() == [len(got) // 10] * 10
    assert got.images.dtype == torch.uint8
    assert got.labels.dtype == torch.int64
    assert network == []


def test_the_sample_is_a_thousand_distinct_images_and_says_it_is_a_sample():
    train, test = (data.load("fashion_mnist_mini", split=s) for s in ("train", "test"))
    for got in (train, test):
        assert len(got) == 1000
        assert got.indices.unique().numel() == 1000
        assert "mini" in got.name
        assert got.pinned
        assert got.provenance()["subset"] is True
    assert not torch.equal(train.indices, test.indices)


def test_the_shipped_files_match_their_sums_and_carry_the_licence():
    sums = _files.own_sums()
    shipped = {p.name for p in _files.HERE.iterdir() if p.suffix in (".npz", ".safetensors")}
    assert set(sums) == shipped
    for name in shipped:
        assert _files.own_file(name).is_file()
    licence = (_files.HERE / "LICENSE-fashion-mnist.txt").read_text(encoding="utf-8")
    assert "2017 Zalando SE" in licence
    assert "Permission is hereby granted, free of charge" in licence
    assert (_files.HERE / "demo_cnn.safetensors").stat().st_size < 200_000
    assert (_files.HERE / "fashion_mnist_mini.npz").stat().st_size < 1_000_000


def test_the_sample_holds_plain_arrays_alone():
    with zipfile.ZipFile(_files.HERE / "fashion_mnist_mini.npz") as z:
        assert sorted(z.namelist()) == sorted(f"{s}_{k}.npy" for s in ("train", "test") for k in ("images", "labels", "index"))
        assert all(b"'|u1'" in z.read(n)[:128] or b"'<i4'" in z.read(n)[:128] for n in z.namelist())


def test_a_damaged_or_missing_shipped_file_is_an_error(tmp_path, monkeypatch):
    shutil.copytree(_files.HERE, tmp_path / "copy")
    monkeypatch.setattr(_files, "HERE", tmp_path / "copy")
    path = tmp_path / "copy" / "fashion_mnist_mini.npz"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataFormatError, match="sha256"):
        data.load("fashion_mnist_mini")
    path.unlink()
    with pytest.raises(DataNotFoundError, match="Reinstall"):
        data.load("fashion_mnist_mini")


def test_subsets_are_balanced_seeded_and_point_into_the_full_split():
    full = data.load("fashion_mnist_mini")
    a, b, c = (data.load("fashion_mnist_mini", samples=105, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.indices, b.indices)
    assert not torch.equal(a.indices, c.indices)
    counts = torch.bincount(a.labels, minlength=10)
    assert (int(counts.min()), int(counts.max()), len(a)) == (10, 11, 105)
    where = {int(i): n for n, i in enumerate(full.indices)}
    assert torch.equal(full.images[[where[int(i)] for i in a.indices]], a.images)
    assert a.provenance()["content_sha256"] == b.provenance()["content_sha256"] != c.provenance()["content_sha256"]


@pytest.mark.parametrize("samples", [0, -1, 1001, 2.5, True])
def test_impossible_sample_counts(samples):
    with pytest.raises(InputError, match="1000"):
        data.load("fashion_mnist_mini", samples=samples)


def test_a_class_too_small_for_its_share_is_an_error():
    with pytest.raises(InputError, match="class 1, which has 2"):
        balanced(torch.tensor([0] * 8 + [1] * 2), 6, 0, "toy")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match="fashion_mnist_mini"):
        data.load("mnist")


def test_batches_keep_order_and_the_last_one():
    got = data.load("fashion_mnist_mini")
    batches = data.loader(got, batch_size=300)
    assert [len(x) for x, _ in batches] == [300, 300, 300, 100]
    x, y = (torch.cat(t) for t in zip(*batches, strict=True))
    assert x.shape == (1000, 1, 28, 28)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert torch.equal(y, got.labels)
    expected = (got.images[:, None].to(torch.float64) / 255 - 0.2860) / 0.3530
    # two roundings of numbers of size 1 and a division by 0.353
    torch.testing.assert_close(x.to(torch.float64), expected, rtol=0, atol=4 * torch.finfo(torch.float32).eps / 0.353)


def test_batches_share_no_memory_with_the_record():
    got = data.load("synthetic")
    before = got.labels.clone()
    for x, y in data.loader(got, normalize=False):
        assert 0 <= float(x.min()) <= float(x.max()) <= 1
        x.zero_()
        y.zero_()
    assert torch.equal(got.labels, before)
    assert int(got.images.max()) > 0


@pytest.mark.parametrize("size", [0, 2.0, True])
def test_impossible_batch_size(size):
    with pytest.raises(InputError, match="batch_size"):
        data.loader(data.load("synthetic"), batch_size=size)


def test_the_cache_folder_follows_the_users_settings(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert _files.cache_folder() == Path("/home/someone/.cache/fastsharp")
