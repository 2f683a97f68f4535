"""CIFAR-10: binary files and archive, the pickled form through torchvision's check alone, which form is taken."""

from __future__ import annotations

import io
import pickle
import tarfile

import numpy as np
import pytest
import torch

from fastsharp import data
from fastsharp.data import _files, cifar10, cifar10_jpeg
from fastsharp.errors import DataFormatError, DataNotFoundError

N = 20


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(cifar10, "RECORDS", N)


def blobs(rng):
    """{file: bytes} of all six files and the images (6, N, 32, 32, 3) behind them."""
    images = rng.randint(0, 256, (6, N, 32, 32, 3)).astype(np.uint8)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    labels = np.arange(N, dtype=np.uint8) % 10
    pack = [b"".join(bytes([y]) + x.transpose(2, 0, 1).tobytes() for x, y in zip(part, labels, strict=True)) for part in images]
    return dict(zip(names, pack, strict=True)), images


def write_folder(root, files):
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_archive(root, files, monkeypatch, kind=tarfile.REGTYPE):
    root.mkdir(parents=True, exist_ok=True)
    path = root / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            m = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            m.size, m.type, m.linkname = len(content), kind, "/etc/hostname"
            tar.addfile(m, io.BytesIO(content))
    monkeypatch.setattr(cifar10, "SHA256", _files.sha256_file(path))
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
def test_binary_files_give_back_the_images(tmp_path, monkeypatch, packed, split, network):
    files, images = blobs(np.random.RandomState(0))
    source = write_archive(tmp_path, files, monkeypatch) if packed else write_folder(tmp_path, files)
    got = data.load("cifar10", split=split, root=tmp_path)
    expected = images[:5].reshape(-1, 32, 32, 3) if split == "train" else images[5]
    assert torch.equal(got.images, torch.from_numpy(expected))
    assert torch.equal(got.labels, torch.arange(len(got)) % N % 10)
    assert (got.source, got.pinned, got.lossy, got.name) == (str(source), packed, False, "CIFAR-10")
    assert network == []
    [(x, _)] = data.loader(got, batch_size=len(got), normalize=False)
    assert torch.equal((x * 255).round().to(torch.uint8).permute(0, 2, 3, 1), got.images)


def test_a_subset_is_balanced(tmp_path):
    write_folder(tmp_path, blobs(np.random.RandomState(0))[0])
    assert torch.bincount(data.load("cifar10", root=tmp_path, samples=30).labels).tolist() == [3] * 10


def test_the_wrong_size_and_label_are_named_with_their_offset(tmp_path):
    files, _ = blobs(np.random.RandomState(0))
    folder = write_folder(tmp_path, files)
    (folder / "data_batch_2.bin").write_bytes(files["data_batch_2.bin"][:-1])
    with pytest.raises(DataFormatError, match=rf"data_batch_2.bin: at byte {N * 3073 - 1}: expected .* found {N * 3073 - 1}"):
        data.load("cifar10", root=tmp_path)
    lying = bytearray(files["data_batch_2.bin"])
    lying[2 * 3073] = 11
    (folder / "data_batch_2.bin").write_bytes(lying)
    with pytest.raises(DataFormatError, match=r"at byte 6146: expected a label of 0..9, found 11"):
        data.load("cifar10", root=tmp_path)


def test_an_archive_with_another_hash_is_not_opened(tmp_path, monkeypatch):
    path = write_archive(tmp_path, blobs(np.random.RandomState(0))[0], monkeypatch)
    monkeypatch.setattr(cifar10, "SHA256", "0" * 64)
    monkeypatch.setattr(tarfile, "open", lambda *a, **k: pytest.fail("opened"))
    before = path.read_bytes()
    with pytest.raises(DataFormatError, match="0" * 64):
        data.load("cifar10", root=tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_not_members(tmp_path, monkeypatch, kind):
    write_archive(tmp_path, dict.fromkeys(blobs(np.random.RandomState(0))[0], b""), monkeypatch, kind)
    with pytest.raises(DataFormatError, match="no regular file"):
        data.load("cifar10", root=tmp_path)


class Evil:
    ran = False

    def __reduce__(self):
        return (setattr, (Evil, "ran", True))


def test_pickled_batches_that_torchvision_does_not_know_are_never_unpickled(tmp_path, network):
    pytest.importorskip("torchvision", reason="the pickled form is read through torchvision, which is not installed")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataFormatError, match="nothing was unpickled"):
        data.load("cifar10", root=tmp_path)
    assert not Evil.ran
    assert network == []


def test_absent_is_one_error_with_every_place_and_the_way_out(tmp_path, bare, network):
    with pytest.raises(DataNotFoundError) as e:
        data.load("cifar10", root=tmp_path / "root")
    for part in (tmp_path / "root", bare["variable"], bare["cache"], cifar10.ARCHIVE, cifar10_jpeg.ARCHIVE, "download=True"):
        assert str(part) in str(e.value)
    assert str(bare["debian"]) not in str(e.value)
    assert len(str(e.value).splitlines()) <= 5
    assert network == []


def test_download_offline_is_the_same_error_chained(tmp_path, network):
    pytest.importorskip("torchvision", reason="download=True goes through torchvision, which is not installed")
    with pytest.raises(DataNotFoundError, match="download into") as e:
        data.load("cifar10", root=tmp_path, download=True)
    assert isinstance(e.value.__cause__, (OSError, RuntimeError))
    assert network
