"""Faults of certain releases that a test has to step around."""

from __future__ import annotations

import torch


def before(version: str, release: str) -> bool:
    """Whether `version` comes before `release`, by its first two numbers."""
    return _numbers(version) < _numbers(release)


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def torch_before(release: str) -> bool:
    return before(torch.__version__, release)
