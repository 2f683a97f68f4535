"""A world without data: no network, no variable, empty system and cache folders. Real sets come through `real_root`."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from fastsharp.data import fashion_mnist

_REAL = os.environ.get("FASTSHARP_DATA")
_DEBIAN = fashion_mnist.DEBIAN


@pytest.fixture(autouse=True)
def network(monkeypatch):
    """Every attempt to reach the network fails and is listed."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("the network is blocked in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return attempts


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """No place has data unless the test puts it there; returns {"variable", "debian", "cache"} as folders."""
    folders = {name: tmp_path / "places" / name for name in ("variable", "debian", "cache")}
    monkeypatch.setenv("FASTSHARP_DATA", str(folders["variable"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders["cache"]))
    monkeypatch.setattr(fashion_mnist, "DEBIAN", folders["debian"])
    folders["cache"] = folders["cache"] / "fastsharp"
    return folders


@pytest.fixture
def real_places():
    """Folders of this machine that may hold real sets."""
    return [Path(p) for p in (_REAL, _DEBIAN) if p]
