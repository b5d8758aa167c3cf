"""Which number format pays on this machine."""

from __future__ import annotations

import platform

import torch


def native_bf16() -> bool:
    """Whether the device that accelerate will choose multiplies bf16 in hardware.

    A processor without such instructions emulates them, fifty times slower than fp32 (AVX2: 1
    against 50 GFLOP/s).
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
