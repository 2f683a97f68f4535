"""The JPEG copy: read in memory, by name, after its hash; every hostile member is refused and nothing reaches the disk."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import torch

from fastsharp import data
from fastsharp.data import _files, cifar10_jpeg
from fastsharp.errors import DataFormatError, DataNotFoundError

Image = pytest.importorskip("PIL.Image", reason="JPEG files are decoded with Pillow, which is not installed")
COUNTS = {"train": 3, "test": 1}


def jpeg(shade, size=(32, 32), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, shade if mode == "L" else (shade, shade, shade)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def members():
    """{name: bytes}: image n of class c has shade 20 c + n."""
    return {
        f"{split}/{c}/{n:04d}.jpg": jpeg(20 * i + n)
        for split, count in COUNTS.items()
        for i, c in enumerate(cifar10_jpeg.CLASSES)
        for n in range(count)
    }


def info(name, **fields):
    m = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(m, key, value)
    return m


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """archive(files, extra=[TarInfo], content=b"") writes the archive, pins its hash, and returns its folder."""
    monkeypatch.setattr(cifar10_jpeg, "PER_CLASS", COUNTS)

    def build(files, extra=(), content=b""):
        folder = tmp_path / "set"
        folder.mkdir(exist_ok=True)
        path = folder / cifar10_jpeg.ARCHIVE
        with tarfile.open(path, "w:xz") as tar:
            tar.addfile(info("README.md", size=2), io.BytesIO(b"hi"))
            tar.addfile(info("train/airplane/", type=tarfile.DIRTYPE))
            for m in extra:
                m.size = len(content) if m.isreg() else 0
                tar.addfile(m, io.BytesIO(content))
            for name, raw in reversed(files.items()):
                tar.addfile(info(name, size=len(raw)), io.BytesIO(raw))
        monkeypatch.setattr(cifar10_jpeg, "SHA256", _files.sha256_file(path))
        return folder

    return build


@pytest.mark.parametrize("name", ["cifar10", "cifar10_jpeg"])
def test_labels_follow_the_class_names_and_the_record_says_lossy(archive, name, network):
    got = data.load(name, root=archive(members()))
    assert got.images.shape == (30, 32, 32, 3)
    assert torch.equal(got.labels, got.indices // COUNTS["train"])
    shades = got.images.to(torch.float64).mean((1, 2, 3))
    assert float((shades - (20 * got.labels + got.indices % COUNTS["train"])).abs().max()) <= 1  # JPEG of one shade
    assert (got.name, got.lossy, got.pinned) == ("CIFAR-10 (JPEG copy)", True, True)
    assert network == []


def test_the_order_is_shuffled_and_always_the_same(archive):
    folder = archive(members())
    a, b = (data.load("cifar10_jpeg", root=folder) for _ in range(2))
    assert torch.equal(a.indices, b.indices)
    assert not torch.equal(a.labels, a.labels.sort().values)


def test_a_subset_is_the_same_images_and_decodes_no_others(archive, monkeypatch):
    folder = archive(members())
    full = data.load("cifar10_jpeg", root=folder)
    decoded, real = [], cifar10_jpeg._pixels
    monkeypatch.setattr(cifar10_jpeg, "_pixels", lambda raw, where: decoded.append(where) or real(raw, where))
    part = data.load("cifar10_jpeg", root=folder, samples=20)
    assert torch.bincount(part.labels).tolist() == [2] * 10
    assert len(decoded) == 20
    where = {int(i): n for n, i in enumerate(full.indices)}
    assert torch.equal(part.images, full.images[[where[int(i)] for i in part.indices]])


HOSTILE = {
    "parent": info("../escaped.jpg"),
    "deep parent": info("train/airplane/../../../escaped.jpg"),
    "absolute": info("/escaped.jpg"),
    "stranger": info("train/airplane/run.sh"),
    "unknown class": info("train/zebra/0000.jpg"),
    "symlink": info("train/airplane/0000.jpg", type=tarfile.SYMTYPE, linkname="/etc/hostname"),
    "hard link": info("train/airplane/0000.jpg", type=tarfile.LNKTYPE, linkname="../../etc/hostname"),
    "device": info("train/airplane/0000.jpg", type=tarfile.CHRTYPE),
    "fifo": info("train/airplane/0000.jpg", type=tarfile.FIFOTYPE),
    "link as folder": info("train/airplane", type=tarfile.SYMTYPE, linkname="/tmp"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_members_are_refused_and_nothing_is_written(archive, tmp_path, name):
    folder = archive(members(), [HOSTILE[name]], b"evil")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataFormatError, match=r"member .* has an unexpected"):
        data.load("cifar10_jpeg", root=folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_member_too_large_is_refused_unread(archive):
    folder = archive(members(), [info("train/airplane/0000.jpg")], bytes(200_000))
    with pytest.raises(DataFormatError, match="beyond what this set holds"):
        data.load("cifar10_jpeg", root=folder)


@pytest.mark.parametrize(
    ("raw", "part"),
    [(jpeg(5, (33, 32)), "33 x 32"), (b"not a picture", "not a readable JPEG"), (jpeg(5)[:200], "not a readable JPEG")],
)
def test_members_that_are_not_the_pictures_they_should_be(archive, raw, part):
    with pytest.raises(DataFormatError, match=part) as e:
        data.load("cifar10_jpeg", root=archive({**members(), "train/bird/0001.jpg": raw}))
    assert "train/bird/0001.jpg" in str(e.value)


def test_grey_pictures_become_rgb(archive):
    got = data.load("cifar10_jpeg", root=archive({**members(), "train/bird/0001.jpg": jpeg(90, mode="L")}))
    assert got.images.shape[-1] == 3
    assert float(np.abs(got.images[got.indices == 7].to(torch.float64).numpy() - 90).max()) <= 1


def test_an_incomplete_class_is_an_error(archive):
    files = members()
    del files["train/ship/0002.jpg"]
    with pytest.raises(DataFormatError, match="expected 3 of each"):
        data.load("cifar10_jpeg", root=archive(files))


def test_another_hash_is_refused_before_opening(archive, monkeypatch):
    folder = archive(members())
    monkeypatch.setattr(cifar10_jpeg, "SHA256", "0" * 64)
    monkeypatch.setattr(tarfile, "open", lambda *a, **k: pytest.fail("opened"))
    with pytest.raises(DataFormatError, match="left untouched"):
        data.load("cifar10_jpeg", root=folder)


def test_a_cut_archive_is_an_error(archive, monkeypatch):
    folder = archive(members())
    path = folder / cifar10_jpeg.ARCHIVE
    path.write_bytes(path.read_bytes()[:-500])
    monkeypatch.setattr(cifar10_jpeg, "SHA256", _files.sha256_file(path))
    with pytest.raises(DataFormatError, match=r"not a readable tar\.xz"):
        data.load("cifar10_jpeg", root=folder)


def test_absent_is_one_error(tmp_path, network):
    with pytest.raises(DataNotFoundError, match=r"cifar10_jpg\.tar\.xz"):
        data.load("cifar10_jpeg", root=tmp_path)
    assert network == []


def test_the_real_copy(real_places):
    path = cifar10_jpeg.find(real_places)
    if path is None:
        pytest.skip("the JPEG copy of CIFAR-10 is not there; set FASTSHARP_DATA to the folder that holds cifar10_jpg.tar.xz")
    got = data.load("cifar10_jpeg", root=path.parent, samples=500)
    assert torch.bincount(got.labels).tolist() == [50] * 10
    x = got.images.to(torch.float64).reshape(-1, 3) / 255
    # 500 images: the mean of image means (std about 0.12) is known to 0.12 / sqrt(500) = 0.0054; five of those
    assert float((x.mean(0) - torch.tensor(got.mean, dtype=torch.float64)).abs().max()) < 0.027
