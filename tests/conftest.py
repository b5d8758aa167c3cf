"""Shared by all tests: one thread, seeded, offline, and the same random state for each test."""

from __future__ import annotations

import os

# Before torch is imported. On a busy machine two OpenMP threads are many times slower than one
# (they spin).
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("avdiff", max_examples=50, deadline=None, derandomize=True)
settings.load_profile("avdiff")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--diffusers PATH`: see `external_mixins.py`."""
    parser.addoption(
        "--diffusers",
        metavar="PATH",
        help="source checkout of diffusers, whose mixins test our classes",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the tests of a checkout of diffusers importable, and know their markers."""
    if checkout := config.getoption("--diffusers"):
        sys.path.insert(0, checkout)
        for marker in (
            "attention",
            "cache",
            "compile",
            "cpu_offload",
            "group_offload",
            "lora",
            "memory",
            "training",
        ):
            config.addinivalue_line("markers", f"{marker}: a mixin of diffusers")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Each test starts from seed 0, alone or in a suite, and leaves torch's defaults as it found
    them.
    """
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (for libraries that still draw from the old generator)
    torch.manual_seed(0)
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_default_dtype(dtype)
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)
