"""Frozen linear layers in eight bits, without another package: one scale a row, fp32 accumulation.

nf4 is that of bitsandbytes through diffusers, where it is installed.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

# Small layers at the ends, whose error would reach everything.
KEPT = ("proj_in", "proj_out", "time_embed", "prompt_adaln", "av_cross_attn_", "to_gate_logits")


class Int8Linear(nn.Linear):
    """A linear layer with int8 weights and a scale for each of its rows; for inference and as the
    frozen base of an adapter.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        weight = linear.weight.detach()
        scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        rounded = (weight.float() / scale).round().clamp(-127, 127).to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.register_buffer("scale", scale.to(weight.dtype))
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the type of `x`."""
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, weight, bias)


def quantize_int8(transformer: nn.Module) -> int:
    """Replace the linear layers of the blocks; returns how many."""
    count = 0
    for name, module in list(transformer.named_modules()):
        kept = any(part in name for part in KEPT)
        if not isinstance(module, nn.Linear) or isinstance(module, Int8Linear) or kept:
            continue
        parent, _, child = name.rpartition(".")
        setattr(transformer.get_submodule(parent), child, Int8Linear(module))
        count += 1
    return count


def loading_config(quantization: str) -> Any:
    """diffusers' quantization config of the transformer for nf4; None for none and int8.

    Raises:
        ValueError: the package or the device is missing.
    """
    if quantization in ("none", "int8"):
        return None
    if quantization != "nf4":
        raise ValueError(f"quantization={quantization!r}: needs none, int8 or nf4")
    if find_spec("bitsandbytes") is None:
        raise ValueError("quantization=nf4: needs the package bitsandbytes; int8 does not")
    if not torch.cuda.is_available():
        raise ValueError("quantization=nf4: needs a CUDA device; int8 runs anywhere")
    from diffusers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(KEPT),
    )
