"""Synchformer's network: names and shapes of upstream's state dict, attention and gathering by the
formulas.
"""

from __future__ import annotations

from functools import cache
from math import prod

import pytest
import torch
from torch.nn import functional as F

from avdiff.evaluation.lipsync.synchformer_network import DividedAttention, Size, Synchformer

TINY = Size(side=32, width=16, heads=2, depth=2, sync_heads=4, sync_depth=1)


@cache
def network(size: Size = TINY) -> Synchformer:
    """Every weight random, so that none can be forgotten."""
    generator = torch.Generator().manual_seed(5)
    made = Synchformer(size)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return made.eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------- names
def expected(size: Size) -> dict[str, tuple[int, ...]]:
    """Names and shapes as upstream's modules make them, written down from its source.

    v-iashin/Synchformer: model/sync_model.py; feat_extractors/visual/motionformer.py with
    motionformer_src; feat_extractors/audio/ast.py with hf_src/modeling_ast.py;
    modules/transformer.py; configs/sync.yaml; and facebookresearch/Motionformer:
    configs/SSV2/divided_224_16x4.yaml.
    """
    d, places = size.width, (size.side // 16) ** 2
    names: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int = d) -> None:
        names[f"{name}.weight"], names[f"{name}.bias"] = (rows, columns), (rows,)

    def norm(*places: str) -> None:
        for name in places:
            names[f"{name}.weight"] = names[f"{name}.bias"] = (d,)

    def encoder_layer(name: str) -> None:  # torch.nn.TransformerEncoderLayer with a class token
        names[f"{name}.cls_token"] = (1, 1, d)
        names[f"{name}.self_attn.in_proj_weight"], names[f"{name}.self_attn.in_proj_bias"] = (
            (3 * d, d),
            (3 * d,),
        )
        linear(f"{name}.self_attn.out_proj", d)
        linear(f"{name}.linear1", 4 * d)
        linear(f"{name}.linear2", d, 4 * d)
        norm(f"{name}.norm1", f"{name}.norm2")

    v, a, t = "vfeat_extractor", "afeat_extractor", "transformer"
    names |= {
        f"{v}.cls_token": (1, 1, d),
        f"{v}.pos_embed": (1, places + 1, d),
        f"{v}.temp_embed": (1, 8, d),
        f"{v}.patch_embed.proj.weight": (d, 3, 16, 16),
        f"{v}.patch_embed.proj.bias": (d,),
        f"{v}.patch_embed_3d.proj.weight": (d, 3, 2, 16, 16),
        f"{v}.patch_embed_3d.proj.bias": (d,),
    }
    for i in range(size.depth):
        block = f"{v}.blocks.{i}"
        norm(*(f"{block}.norm{k}" for k in (1, 2, 3)))
        for attention in ("attn", "timeattn"):
            linear(f"{block}.{attention}.qkv", 3 * d)
            linear(f"{block}.{attention}.proj", d)
        linear(f"{block}.mlp.fc1", 4 * d)
        linear(f"{block}.mlp.fc2", d, 4 * d)
    norm(f"{v}.norm", f"{a}.ast.layernorm")
    encoder_layer(f"{v}.spatial_attn_agg")

    inner = f"{a}.ast.embeddings"
    names |= {
        f"{inner}.cls_token": (1, 1, d),
        f"{inner}.distillation_token": (1, 1, d),
        f"{inner}.position_embeddings": (1, 74, d),
        f"{inner}.patch_embeddings.projection.weight": (d, 1, 16, 16),
        f"{inner}.patch_embeddings.projection.bias": (d,),
    }
    for i in range(size.depth):
        layer = f"{a}.ast.encoder.layer.{i}"
        for name in ("query", "key", "value"):
            linear(f"{layer}.attention.attention.{name}", d)
        linear(f"{layer}.attention.output.dense", d)
        linear(f"{layer}.intermediate.dense", 4 * d)
        linear(f"{layer}.output.dense", d, 4 * d)
        norm(f"{layer}.layernorm_before", f"{layer}.layernorm_after")
    encoder_layer(f"{a}.freq_attn_agg")

    linear("vproj", d)
    linear("aproj", d)
    names |= {
        f"{t}.OFF_tok": (1, 1, d),
        f"{t}.MOD_tok": (1, 1, d),
        f"{t}.pos_emb_cfg.pos_emb": (1, 198, d),
    }
    norm(f"{t}.vis_in_lnorm", f"{t}.aud_in_lnorm", f"{t}.ln_f")
    for i in range(size.sync_depth):
        block = f"{t}.blocks.{i}"
        norm(f"{block}.ln1", f"{block}.ln2")
        for name in ("key", "query", "value", "proj"):
            linear(f"{block}.attn.{name}", d)
        linear(f"{block}.mlp.0", 4 * d)
        linear(f"{block}.mlp.2", d, 4 * d)
    linear(f"{t}.off_head", 21)
    return names


@pytest.mark.parametrize("size", [TINY, Size()])
def test_names_and_shapes_are_upstream_s(size: Size) -> None:
    with torch.device("meta"):
        made = Synchformer(size)
    found = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    assert found == {
        k: s for k, s in expected(size).items() if not k.startswith("vfeat_extractor.patch_embed.")
    }


def test_released_file_has_this_many_numbers() -> None:
    """The file that MMAudio publishes is of 950 MB, `907M` in its docs/MODELS.md (rounded up), all
    in single precision.

    Neither paper nor repository states a count of parameters.
    """
    size = 4 * sum(map(prod, expected(Size()).values()))
    assert size == 4 * 237_460_245
    assert 949.5e6 < size < 950.5e6 and 905 < size / 2**20 < 907


# ---------------------------------------------------------------------------------------- attention
def slow_attention(layer: DividedAttention, x: torch.Tensor, over_time: bool) -> torch.Tensor:
    """Token by token and head by head: the class token sees all, another its group and the class
    token.
    """
    d = x.shape[1]
    head = d // layer.heads
    q, k, v = (
        x @ layer.qkv.weight[i * d : (i + 1) * d].T + layer.qkv.bias[i * d : (i + 1) * d]
        for i in range(3)
    )
    places = (len(x) - 1) // 8
    rows = []
    for i in range(len(x)):
        instant, place = divmod(i - 1, places)
        same = (
            [j for j in range(1, len(x)) if (j - 1) % places == place]
            if over_time
            else [j for j in range(1, len(x)) if (j - 1) // places == instant]
        )
        group = list(range(len(x))) if i == 0 else [0, *same]
        heads = []
        for h in range(layer.heads):
            part = slice(h * head, (h + 1) * head)
            weights = torch.stack([torch.exp(q[i, part] @ k[j, part] / head**0.5) for j in group])
            heads.append(
                sum(w * v[j, part] for w, j in zip(weights / weights.sum(), group, strict=True))
            )
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ layer.proj.weight.T + layer.proj.bias


@pytest.mark.parametrize("over_time", [True, False])
def test_divided_attention_token_by_token(over_time: bool) -> None:
    layer = network().vfeat_extractor.blocks[0].attn
    assert isinstance(layer, DividedAttention)
    x = torch.randn(2, 1 + 8 * 3, 16)
    found = layer(x, DividedAttention.OVER_TIME if over_time else DividedAttention.OVER_SPACE)
    slow = torch.stack([slow_attention(layer, row, over_time) for row in x])
    torch.testing.assert_close(found, slow, rtol=1e-4, atol=1e-5)


def normed(x: torch.Tensor, layer: torch.nn.Module, eps: float = 1e-6) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (
        x.var(-1, unbiased=False, keepdim=True) + eps
    ).sqrt() * layer.weight + (layer.bias)


def full_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Softmax attention of (N, D) by the formula, a head at a time."""
    return torch.cat(
        [
            torch.softmax(a @ b.T / a.shape[1] ** 0.5, dim=1) @ c
            for a, b, c in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True)
        ],
        dim=1,
    )


def slow_gather(layer: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Pre-norm encoder layer over class token and tokens (N, D) -> what stands at the class token
    (D,).
    """
    x = torch.cat([layer.cls_token[0], tokens])
    inner = normed(x, layer.norm1)
    q, k, v = (inner @ layer.self_attn.in_proj_weight.T + layer.self_attn.in_proj_bias).chunk(
        3, dim=1
    )
    x = x + layer.self_attn.out_proj(full_attention(q, k, v, 2))
    return (x + layer.linear2(F.gelu(layer.linear1(normed(x, layer.norm2)))))[0]


def test_pictures_by_the_formulas() -> None:
    extractor = network().vfeat_extractor
    pictures = torch.randn(2, 3, 16, 32, 32)
    found = network().see(pictures)
    assert found.shape == (2, 8, 16)
    rows = [extractor.cls_token[0, 0] + extractor.pos_embed[0, 0]]
    kernel, bias = extractor.patch_embed_3d.proj.weight, extractor.patch_embed_3d.proj.bias
    for t in range(8):
        for y in range(2):
            for x in range(2):
                tube = pictures[1, :, 2 * t : 2 * t + 2, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16]
                rows.append(
                    (kernel * tube).sum(dim=(1, 2, 3, 4))
                    + bias
                    + extractor.temp_embed[0, t]
                    + extractor.pos_embed[0, 1 + 2 * y + x]
                )
    tokens = torch.stack(rows)
    for block in extractor.blocks:
        tokens = tokens + slow_attention(block.timeattn, normed(tokens, block.norm3), True)
        tokens = tokens + slow_attention(block.attn, normed(tokens, block.norm1), False)
        tokens = tokens + block.mlp.fc2(F.gelu(block.mlp.fc1(normed(tokens, block.norm2))))
    tokens = normed(tokens[1:], extractor.norm)
    slow = torch.stack(
        [slow_gather(extractor.spatial_attn_agg, tokens[4 * t : 4 * t + 4]) for t in range(8)]
    )
    torch.testing.assert_close(found[1], slow, rtol=1e-3, atol=1e-4)


def test_sound_by_the_formulas() -> None:
    extractor = network().afeat_extractor
    mel = torch.randn(2, 128, 66)
    found = network().hear(mel)
    assert found.shape == (2, 6, 16)
    inner, rows = extractor.ast.embeddings, []
    kernel, bias = (
        inner.patch_embeddings.projection.weight[:, 0],
        inner.patch_embeddings.projection.bias,
    )
    for band in range(12):
        for t in range(6):
            patch = mel[1, 10 * band : 10 * band + 16, 10 * t : 10 * t + 16]
            rows.append((kernel * patch).sum(dim=(1, 2)) + bias)
    x = (
        torch.cat([inner.cls_token[0], inner.distillation_token[0], torch.stack(rows)])
        + inner.position_embeddings[0]
    )
    for block in extractor.ast.encoder.layer:
        before = normed(x, block.layernorm_before, 1e-12)
        three = block.attention.attention
        mixed = full_attention(three.query(before), three.key(before), three.value(before), 2)
        x = x + block.attention.output.dense(mixed)
        x = x + block.output.dense(
            F.gelu(block.intermediate.dense(normed(x, block.layernorm_after, 1e-12)))
        )
    patches = normed(x, extractor.ast.layernorm, 1e-12)[2:]
    slow = torch.stack([slow_gather(extractor.freq_attn_agg, patches[t::6]) for t in range(6)])
    torch.testing.assert_close(found[1], slow, rtol=1e-3, atol=1e-4)


def test_comparison_by_the_formulas() -> None:
    own = network()
    t = own.transformer
    seen, heard = torch.randn(2, 14, 8, 16), torch.randn(2, 14, 6, 16)
    found = own.compare(seen, heard)
    v, a = own.vproj(seen[1]).reshape(112, 16), own.aproj(heard[1]).reshape(84, 16)
    x = torch.cat(
        [
            t.OFF_tok[0],
            normed(v, t.vis_in_lnorm, 1e-5),
            t.MOD_tok[0],
            normed(a, t.aud_in_lnorm, 1e-5),
        ]
    )
    x = x + t.pos_emb_cfg["pos_emb"][0]
    for block in t.blocks:
        inner = normed(x, block.ln1, 1e-5)
        q, k, w = block.attn.query(inner), block.attn.key(inner), block.attn.value(inner)
        x = x + block.attn.proj(full_attention(q, k, w, 4))
        x = x + block.mlp[2](F.gelu(block.mlp[0](normed(x, block.ln2, 1e-5))))
    torch.testing.assert_close(
        found[1], t.off_head(normed(x[0], t.ln_f, 1e-5)), rtol=1e-4, atol=1e-4
    )
