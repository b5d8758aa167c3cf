"""Attention over one or several sources, through diffusers' backend dispatch.

Shape legend: B batch, Q queries, K keys of all sources, H heads, E channels of a head, D model
width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn
from torch.nn import functional as F

from avdiff.core.rope import apply_rotary

# Above this many scores the fused kernel's memory saving matters more than its slow backward pass
# on CPU.
MAX_PLAIN_SCORES = 2**25


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(QK^T / sqrt(E)) V in two matrix products; (B, Q, H, E), (B, K, H, E) -> (B, Q, H,
    E).
    """
    scores = torch.einsum("bqhe,bkhe->bhqk", query * query.shape[-1] ** -0.5, key)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    return torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), value)


class AVAttnProcessor:
    """Calls `dispatch_attention_fn`, so that every diffusers attention backend can be chosen.

    Training on CPU takes `plain_attention` instead unless a backend was set: for a few hundred
    tokens it is 2.5 times as fast, forward and backward, as the fused CPU kernel.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Attention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query (B, Q, H, E), key and value (B, K, H, E), mask (1|B, 1, 1|Q, K) of bool -> (B, Q,
        H, E).
        """
        scores = query.shape[0] * query.shape[2] * query.shape[1] * key.shape[1]
        if (
            self._attention_backend is None
            and query.device.type == "cpu"
            and query.requires_grad
            and scores <= MAX_PLAIN_SCORES
        ):
            return plain_attention(query, key, value, attention_mask)
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )


class HeadNorm(nn.Module):
    """Heads of x (..., E) with unit RMS times a weight; in the dtype of x, which autocast may have
    lowered.
    """

    def __init__(self, dim_head: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim_head))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], None, 1e-6) * self.weight.to(x.dtype)


class Attention(nn.Module, AttentionModuleMixin):
    """Multi-head attention with QK-norm (Henry et al. 2020) whose keys may come from several token
    sources.

    Args:
        query_dim: width of the queries and of the output. heads, dim_head: inner width is their
            product.
        source_dims: width of each source. The first uses `to_k`/`to_v`, the others
            `add_k_proj`/`add_v_proj`. Each source has its own projections: tokens of different
            kinds do not share a key space by accident.
    """

    processor: Callable[..., torch.Tensor]
    _default_processor_cls = AVAttnProcessor
    _available_processors = [AVAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(
        self, query_dim: int, heads: int, dim_head: int, source_dims: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dim_head = dim_head
        self.is_cross_attention = source_dims is not None
        self.use_bias = False
        inner = heads * dim_head
        first, *rest = source_dims or (query_dim,)
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(first, inner, bias=False)
        self.to_v = nn.Linear(first, inner, bias=False)
        self.add_k_proj = nn.ModuleList(nn.Linear(d, inner, bias=False) for d in rest)
        self.add_v_proj = nn.ModuleList(nn.Linear(d, inner, bias=False) for d in rest)
        self.norm_q = HeadNorm(dim_head)
        self.norm_k = HeadNorm(dim_head)
        self.to_out = nn.ModuleList([nn.Linear(inner, query_dim, bias=False)])
        AttentionModuleMixin.set_processor(self, AVAttnProcessor())

    def forward(
        self,
        x: torch.Tensor,
        sources: Sequence[torch.Tensor | None] | None = None,
        query_rope: torch.Tensor | None = None,
        key_ropes: Sequence[torch.Tensor | None] | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from x (B, Q, D) to all present sources (B, K_i, D_i), or to x itself.

        Args:
            query_rope, key_ropes: rotary phases (1, N, 1, E / 2) of the queries and of each source;
                sources without an entry of their own take the queries'.
            attention_mask: bool over the present sources' keys, in order.
        """
        sources = (x,) if sources is None else sources
        key_ropes = (query_rope,) * len(sources) if key_ropes is None else key_ropes
        to_k = [self.to_k, *self.add_k_proj]
        to_v = [self.to_v, *self.add_v_proj]

        query = self.norm_q(self._heads(self.to_q(x)))  # (B, Q, H, E)
        if query_rope is not None:
            query = apply_rotary(query, query_rope)
        keys = []
        values = []
        for source, rope, k, v in zip(sources, key_ropes, to_k, to_v, strict=True):
            if source is None:
                continue
            key = self.norm_k(self._heads(k(source)))
            keys.append(key if rope is None else apply_rotary(key, rope))
            values.append(self._heads(v(source)))
        # (B, K, H, E)
        key = torch.cat(keys, dim=1)
        value = torch.cat(values, dim=1)

        out = self.processor(
            self, query.to(value.dtype), key.to(value.dtype), value, attention_mask
        )
        return self.to_out[0](out.flatten(2))  # (B, Q, D)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, H*E) -> (B, N, H, E)."""
        return x.unflatten(-1, (self.heads, self.dim_head))
