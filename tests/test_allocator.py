"""keep_freed_memory: the gradients of a step take the memory that those of the last one freed."""

from __future__ import annotations

import multiprocessing
import resource

import pytest
import torch

from avdiff.train.loop.malloc import keep_freed_memory


def _faults(keep: bool) -> int:
    """Page faults of four steps of a layer with 48 MB of gradients, after some to settle."""
    if keep and not keep_freed_memory():
        return -1
    torch.set_num_threads(1)
    layer, x = torch.nn.Linear(3000, 4000, bias=False), torch.randn(8, 3000)
    for step in range(12):
        if step == 8:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        layer.zero_grad(set_to_none=True)
        layer(x).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_gradients_take_memory_that_was_freed() -> None:
    with multiprocessing.get_context("fork").Pool(
        1
    ) as pool:  # a process of its own: the setting is for good
        plain, kept = pool.map(_faults, [False, True])
    if kept < 0 or plain < 10_000:
        pytest.skip("this system's malloc is another one")
    assert kept < plain / 2
