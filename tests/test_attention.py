"""Attention against a loop over heads, its plain path against the backend's, rotary positions,
modulation, SwiGLU.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from avdiff.core.attention import Attention, plain_attention
from avdiff.core.feedforward import SwiGLU
from avdiff.core.modulation import Modulation, ModulationTable, TimestepEmbedding, rms_norm
from avdiff.core.rope import apply_rotary, rotary_phases


def by_loop(attn: Attention, x, sources, query_rope=None, key_ropes=None, mask=None):
    """The slow twin: one head and one query at a time."""

    def heads(y):
        return F.rms_norm(y.unflatten(-1, (attn.heads, attn.dim_head)), (attn.dim_head,), eps=1e-6)

    q = heads(attn.to_q(x)) * attn.norm_q.weight
    q = q if query_rope is None else apply_rotary(q, query_rope)
    projections = zip(
        [attn.to_k, *attn.add_k_proj],
        [attn.to_v, *attn.add_v_proj],
        sources,
        key_ropes or [None] * len(sources),
        strict=True,
    )
    keys, values = [], []
    for to_k, to_v, source, phases in projections:
        if source is None:
            continue
        k = heads(to_k(source)) * attn.norm_k.weight
        keys.append(k if phases is None else apply_rotary(k, phases))
        values.append(to_v(source).unflatten(-1, (attn.heads, attn.dim_head)))
    k, v = torch.cat(keys, 1), torch.cat(values, 1)
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(attn.heads):
            for i in range(q.shape[1]):
                scores = k[b, :, h] @ q[b, i, h] / math.sqrt(attn.dim_head)
                if mask is not None:
                    scores[~mask[0, 0, i]] = -math.inf
                out[b, i, h] = scores.softmax(0) @ v[b, :, h]
    return attn.to_out[0](out.flatten(2))


@pytest.mark.parametrize("grad", [True, False])  # plain path in training, the backend's otherwise
@pytest.mark.parametrize("absent", [False, True])
def test_attention_over_two_sources_equals_the_loop(grad: bool, absent: bool) -> None:
    torch.manual_seed(0)
    attn = Attention(12, heads=2, dim_head=8, source_dims=[10, 6])
    torch.nn.init.uniform_(attn.norm_q.weight, 0.5, 1.5)
    x, first, second = torch.randn(2, 5, 12), torch.randn(2, 4, 10), torch.randn(2, 3, 6)
    times = [rotary_phases(torch.rand(n, 1) * 3, 8) for n in (5, 4, 3)]
    sources = (None if absent else first, second)
    mask = torch.rand(1, 1, 5, 3 if absent else 7) > 0.4
    mask[..., 0] = True
    with torch.set_grad_enabled(grad):
        out = attn(x, sources, times[0], times[1:], mask)
    torch.testing.assert_close(
        out, by_loop(attn, x, sources, times[0], times[1:], mask), atol=1e-5, rtol=1e-4
    )


def test_plain_attention_has_the_gradients_of_the_fused_one() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, n, 3, 8, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7)]
    mask = torch.rand(1, 1, 5, 7) > 0.3
    mask[..., 0] = True
    fused = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in inputs), attn_mask=mask
    ).transpose(1, 2)
    weight = torch.randn_like(fused)
    expected = torch.autograd.grad((fused * weight).sum(), inputs)
    found = torch.autograd.grad((plain_attention(*inputs, mask) * weight).sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("axes", [1, 3])
def test_rotary_products_depend_on_differences(axes: int) -> None:
    torch.manual_seed(0)
    a, b = torch.rand(4, axes) * 5, torch.rand(6, axes) * 5
    q, k = torch.randn(1, 4, 2, 32), torch.randn(1, 6, 2, 32)
    shift = torch.rand(axes) * 20

    def scores(move):
        turned = (
            apply_rotary(q, rotary_phases(a + move, 32)),
            apply_rotary(k, rotary_phases(b + move, 32)),
        )
        return torch.einsum("bqhe,bkhe->bhqk", *turned)

    torch.testing.assert_close(scores(0), scores(shift), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(apply_rotary(q, rotary_phases(a, 32)).norm(dim=-1), q.norm(dim=-1))
    assert (scores(0) - torch.einsum("bqhe,bkhe->bhqk", q, k)).abs().max() > 0.1


def test_modulation_starts_neutral_and_broadcasts_per_token() -> None:
    embed, table = TimestepEmbedding(8, rows=6), ModulationTable(8, records=2, gate=0.5)
    x = torch.randn(3, 4, 8)
    embedding, rows = embed(torch.rand(3))
    assert embedding.shape == (3, 1, 8) and rows.shape == (3, 1, 6, 8) and not rows.any()
    first, _ = table(rows)
    torch.testing.assert_close(first(x), rms_norm(x))
    assert (first.gate == 0.5).all()
    _, per_token = embed(torch.rand(3, 4))
    assert per_token.shape == (3, 4, 6, 8)
    shifted = Modulation(torch.ones(8), torch.ones(8), torch.ones(8))
    torch.testing.assert_close(shifted(x), rms_norm(x) * 2 + 1)


def test_swiglu_is_its_formula() -> None:
    ff, x = SwiGLU(6, 10), torch.randn(2, 3, 6)
    gate, up = ff.proj_in.weight.chunk(2)
    torch.testing.assert_close(ff(x), (F.silu(x @ gate.T) * (x @ up.T)) @ ff.proj_out.weight.T)
