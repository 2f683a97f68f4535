"""Build fastsharp/data/fashion_mnist_mini.npz: 100 images per class of each Fashion-MNIST split, the same bytes each time.

    python tools/build_mini.py [--root DIR]

Needs the full set (Debian: apt-get install dataset-fashion-mnist). Rewrites the file and its line in SHA256SUMS.
"""

from __future__ import annotations

import argparse
import io
import zipfile

import numpy as np
from sums import record

from fastsharp.data import _files, load

PER_CLASS = 100
SEED = {"train": 0, "test": 1}


def main() -> None:
    """Read both splits, choose, write, record the hash."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", help="folder with the Fashion-MNIST files")
    root = parser.parse_args().root
    arrays: dict[str, np.ndarray] = {}
    for split, seed in SEED.items():
        full = load("fashion_mnist", split=split, root=root)
        # a frozen generator: other streams may change between releases, and the sample must not
        rng = np.random.RandomState(seed)
        labels = full.labels.numpy()
        chosen = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:PER_CLASS] for c in range(len(full.classes))])
        index = rng.permutation(chosen)
        arrays[f"{split}_images"] = full.images.numpy()[index]
        arrays[f"{split}_labels"] = labels[index].astype(np.uint8)
        arrays[f"{split}_index"] = index.astype(np.int32)
    path = _files.HERE / "fashion_mnist_mini.npz"
    write_npz(path, arrays)
    record(path)
    print(f"{path}: {path.stat().st_size:,} bytes")


def write_npz(path: object, arrays: dict[str, np.ndarray]) -> None:
    """An npz with the strongest deflate and a fixed date, so that the same content is the same file."""
    with zipfile.ZipFile(str(path), "w", zipfile.ZIP_DEFLATED, compresslevel=9) as z:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            z.writestr(info, buffer.getvalue(), compresslevel=9)


if __name__ == "__main__":
    main()
