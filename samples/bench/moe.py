"""MoE against a dense feed-forward of equal active parameters: forward and backward of one layer.

    python samples/bench/moe.py [--quick]

2,048 tokens of 384 channels, 16 experts of 768 of which a token uses 2, against one SwiGLU of
1,536; in fp32, in bf16 under autocast with fp32 weights (as in training), and with bf16 weights.
The router and its statistics count on the MoE's side. Both run by turns on one thread; a row is the
median of the round-by-round ratios.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import by_turns, ratio

from avdiff.core.feedforward import SwiGLU
from avdiff.core.moe import MoE
from avdiff.train.loop.malloc import keep_freed_memory

TOKENS, DIM, EXPERTS, TOP_K, HIDDEN = 2048, 384, 16, 2, 1536
AIM = 1.35
KINDS = {
    "fp32": (torch.float32, False),
    "bf16 autocast": (torch.float32, True),
    "bf16 weights": (torch.bfloat16, False),
}


def step(
    layer: torch.nn.Module, x: torch.Tensor, target: torch.Tensor, autocast: bool
) -> Callable[[], None]:
    """One forward and backward, with fresh gradients."""

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(leaf)
        y = out[0] if isinstance(out, tuple) else out
        y.backward(target.to(y.dtype))

    return run


def run(
    quick: bool = False, clock: Callable[[], float] = time.perf_counter
) -> list[dict[str, Any]]:
    """One row for each precision."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()  # as training does
    rows = []
    try:
        for kind, (dtype, autocast) in KINDS.items():
            torch.manual_seed(0)
            dense, moe = (
                SwiGLU(DIM, HIDDEN).to(dtype),
                MoE(DIM, HIDDEN // TOP_K, EXPERTS, TOP_K).to(dtype),
            )
            x, target = torch.randn(2, 1, TOKENS, DIM).to(dtype)
            times = by_turns(
                {"moe": step(moe, x, target, autocast), "dense": step(dense, x, target, autocast)},
                5 if quick else 15,
                clock,
            )
            note = (
                f"dense {1e3 * min(times['dense']):.1f} ms, MoE {1e3 * min(times['moe']):.1f} "
                "ms at best"
            )
            rows.append(
                ratio(
                    f"MoE / dense, {kind}, forward and backward",
                    times["moe"],
                    times["dense"],
                    AIM,
                    note,
                )
            )
    finally:
        torch.set_num_threads(threads)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="the process's own CPU time: for a machine with other work",
    )
    given = parser.parse_args()
    for row in run(given.quick, time.process_time if given.cpu else time.perf_counter):
        print(
            f"{row['name']}: {row['ratio']:.3f} +- {row['spread']:.3f} (aim {row['aim']}); "
            f"{row['note']}"
        )
