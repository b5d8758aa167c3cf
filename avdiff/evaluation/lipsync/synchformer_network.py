"""The network of Synchformer (Iashin et al. 2024, arXiv 2401.16423), with the parameter names of
its repository.

Built after v-iashin/Synchformer (MIT): model/sync_model.py and model/modules, with
configs/sync.yaml. Pictures go through a Motionformer with divided space-time attention (Patrick et
al. 2021; Bertasius et al. 2021), sound through an AST (Gong et al. 2021), both a segment at a time;
a class token gathers each instant over places or over frequencies, and a small transformer reads
all instants of 14 segments and tells the offset as one of 21 classes.

Shape legend: B segments or clips, S = 14 segments, T = 8 instants of pictures, P patches of an
instant, D = width.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

SEGMENTS = 14  # of a judged window
# pictures of a segment; a patch is 2 pictures x 16 x 16 pixels
PICTURES = 16
TUBE = 2
PATCH = 16
INSTANTS = PICTURES // TUBE
BANDS, FRAMES, STRIDE = (
    128,
    66,
    10,
)  # of a segment's mel spectrogram, and between its 16 x 16 patches
# 12 and 6
BANDS_SEEN = (BANDS - PATCH) // STRIDE + 1
FRAMES_SEEN = (FRAMES - PATCH) // STRIDE + 1
CLASSES = 21


@dataclass(frozen=True)
class Size:
    """How large the network is; the defaults are those of the released weights.

    Args:
        side: of a picture in pixels, a multiple of 16. width: D. heads, depth: of both extractors.
            sync_heads,
            sync_depth: of the transformer over a window.
    """

    side: int = 224
    width: int = 768
    heads: int = 12
    depth: int = 12
    sync_heads: int = 8
    sync_depth: int = 3


RELEASED = Size()


def _named(**parts: nn.Module) -> nn.Sequential:
    """One after the other, under these names."""
    return nn.Sequential(OrderedDict(parts))


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """(B, N, D), (B, M, D), (B, M, D) -> (B, N, D): softmax(q k^T / sqrt(D / heads)) v in each
    head.
    """
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (query, key, value))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


class Gather(nn.TransformerEncoderLayer):
    """A pre-norm encoder layer over a class token and a row of tokens, of which the class token is
    kept.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(
            width,
            heads,
            4 * width,
            dropout=0.0,
            activation=F.gelu,
            layer_norm_eps=1e-6,
            batch_first=True,
            norm_first=True,
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))

    def gather(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, D)."""
        first = self.cls_token.expand(len(tokens), -1, -1)
        return self(torch.cat([first, tokens], dim=1))[:, 0]


# ----------------------------------------------------------------------------------------- pictures
class DividedAttention(nn.Module):
    """The class token attends to all tokens, any other to the class token and to its own group."""

    OVER_SPACE, OVER_TIME = (
        "(b t) p d",
        "(b p) t d",
    )  # a group: all places of an instant, all instants of a place

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, groups: str) -> Tensor:
        """(B, 1 + T P, D) -> the same; `groups` is one of the two patterns."""
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        first = attend(query[:, :1], key, value, self.heads)  # (B, 1, D)
        q, k, v = (
            rearrange(y[:, 1:], f"b (t p) d -> {groups}", t=INSTANTS) for y in (query, key, value)
        )
        count = len(q) // len(x)  # groups of a segment
        k, v = (
            torch.cat([repeat(whole[:, :1], "b 1 d -> (b r) 1 d", r=count), own], dim=1)
            for whole, own in ((key, k), (value, v))
        )
        near = rearrange(
            attend(q, k, v, self.heads), f"{groups} -> b (t p) d", b=len(x), t=INSTANTS
        )
        return self.proj(torch.cat([first, near], dim=1))


class DividedBlock(nn.Module):
    """Attention over time, then over space, then an MLP, each pre-norm and residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attn = DividedAttention(width, heads)
        self.timeattn = DividedAttention(width, heads)
        self.mlp = _named(
            fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 + T P, D) -> the same."""
        x = x + self.timeattn(self.norm3(x), DividedAttention.OVER_TIME)
        x = x + self.attn(self.norm1(x), DividedAttention.OVER_SPACE)
        return x + self.mlp(self.norm2(x))


class Motionformer(nn.Module):
    """Pictures of a segment -> a vector for each instant of two pictures."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        tube = (TUBE, PATCH, PATCH)
        self.patch_embed_3d = _named(proj=nn.Conv3d(3, width, tube, tube))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (size.side // PATCH) ** 2, width))
        self.temp_embed = nn.Parameter(torch.zeros(1, INSTANTS, width))
        self.blocks = nn.Sequential(*(DividedBlock(width, size.heads) for _ in range(size.depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.spatial_attn_agg = Gather(width, size.heads)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, 16, side, side) in [-1, 1] -> (B, T, D)."""
        patches = rearrange(self.patch_embed_3d(pictures), "b d t h w -> b (t h w) d")
        place = self.pos_embed[:, None, 1:]
        instant = self.temp_embed[:, :, None]
        patches = patches + rearrange(place + instant, "1 t p d -> 1 (t p) d")
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1)
        x = self.blocks(torch.cat([first, patches], dim=1))  # (B, 1 + T P, D)
        x = self.norm(x[:, 1:])
        instants = self.spatial_attn_agg.gather(rearrange(x, "b (t p) d -> (b t) p d", t=INSTANTS))
        return rearrange(instants, "(b t) d -> b t d", t=INSTANTS)


# -------------------------------------------------------------------------------------------- sound
class SelfAttention(nn.Module):
    """Every token attends to all."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> the same."""
        return attend(self.query(x), self.key(x), self.value(x), self.heads)


class SpectrogramBlock(nn.Module):
    """A pre-norm transformer block under the names of transformers' AST."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = _named(
            attention=SelfAttention(width, heads), output=_named(dense=nn.Linear(width, width))
        )
        self.intermediate = _named(dense=nn.Linear(width, 4 * width), act=nn.GELU())
        self.output = _named(dense=nn.Linear(4 * width, width))
        self.layernorm_before, self.layernorm_after = (
            nn.LayerNorm(width, eps=1e-12) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> the same."""
        x = x + self.attention(self.layernorm_before(x))
        return x + self.output(self.intermediate(self.layernorm_after(x)))


class SpectrogramEmbedding(nn.Module):
    """Overlapping patches of a spectrogram behind two class tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cls_token, self.distillation_token = (
            nn.Parameter(torch.zeros(1, 1, width)) for _ in range(2)
        )
        self.position_embeddings = nn.Parameter(torch.zeros(1, 2 + BANDS_SEEN * FRAMES_SEEN, width))
        self.patch_embeddings = _named(projection=nn.Conv2d(1, width, PATCH, STRIDE))

    def forward(self, mel: Tensor) -> Tensor:
        """(B, 128, 66) -> (B, 2 + 12 x 6, D), all frames of the lowest patch first."""
        patches = rearrange(self.patch_embeddings(mel[:, None]), "b d f t -> b (f t) d")
        first = torch.cat([self.cls_token, self.distillation_token], dim=1).expand(len(mel), -1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embeddings


class SpectrogramTransformer(nn.Module):
    """AST over a segment -> a vector for each of its 6 instants."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        blocks = (SpectrogramBlock(size.width, size.heads) for _ in range(size.depth))
        self.ast = _named(
            embeddings=SpectrogramEmbedding(size.width),
            encoder=_named(layer=nn.Sequential(*blocks)),
            layernorm=nn.LayerNorm(size.width, eps=1e-12),
        )
        self.freq_attn_agg = Gather(size.width, size.heads)

    def forward(self, mel: Tensor) -> Tensor:
        """Normalised log-mel (B, 128, 66) -> (B, 6, D)."""
        patches = self.ast(mel)[:, 2:]
        instants = self.freq_attn_agg.gather(
            rearrange(patches, "b (f t) d -> (b t) f d", f=BANDS_SEEN)
        )
        return rearrange(instants, "(b t) d -> b t d", t=FRAMES_SEEN)


# --------------------------------------------------------------------------------------------- both
class ProjectedAttention(SelfAttention):
    """Self-attention with a projection behind it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> the same."""
        return self.proj(super().forward(x))


class SyncBlock(nn.Module):
    """A pre-norm transformer block under the names of minGPT, without its mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.ln2 = nn.LayerNorm(width)
        self.attn = ProjectedAttention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> the same."""
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class SyncTransformer(nn.Module):
    """Instants of both sides of a window -> logits of the offset classes."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        # 198
        width = size.width
        length = 2 + SEGMENTS * (INSTANTS + FRAMES_SEEN)
        self.vis_in_lnorm, self.aud_in_lnorm, self.ln_f = (nn.LayerNorm(width) for _ in range(3))
        self.OFF_tok, self.MOD_tok = (nn.Parameter(torch.randn(1, 1, width)) for _ in range(2))
        self.pos_emb_cfg = nn.ParameterDict({"pos_emb": torch.randn(1, length, width)})
        self.blocks = nn.Sequential(
            *(SyncBlock(width, size.sync_heads) for _ in range(size.sync_depth))
        )
        self.off_head = nn.Linear(width, CLASSES)

    def forward(self, seen: Tensor, audio_features: Tensor) -> Tensor:
        """(B, 14 x 8, D), (B, 14 x 6, D) -> (B, 21)."""
        offset, between = (
            token.expand(len(seen), -1, -1) for token in (self.OFF_tok, self.MOD_tok)
        )
        x = torch.cat(
            [offset, self.vis_in_lnorm(seen), between, self.aud_in_lnorm(audio_features)], dim=1
        )
        x = self.blocks(x + self.pos_emb_cfg["pos_emb"])
        return self.off_head(self.ln_f(x[:, 0]))


class Synchformer(nn.Module):
    """Both extractors and what compares them; inference only, so dropout is left out.

    The released state dict also holds `vfeat_extractor.patch_embed`, which no forward pass uses; it
    has no place here.
    """

    def __init__(self, size: Size = RELEASED) -> None:
        super().__init__()
        self.size = size
        self.vfeat_extractor = Motionformer(size)
        self.afeat_extractor = SpectrogramTransformer(size)
        self.vproj = nn.Linear(size.width, size.width)
        self.aproj = nn.Linear(size.width, size.width)
        self.transformer = SyncTransformer(size)

    def see(self, pictures: Tensor) -> Tensor:
        """Segments (B, 3, 16, side, side) in [-1, 1] -> (B, 8, D)."""
        return self.vfeat_extractor(pictures)

    def hear(self, mel: Tensor) -> Tensor:
        """Segments (B, 128, 66), normalized -> (B, 6, D)."""
        return self.afeat_extractor(mel)

    def compare(self, seen: Tensor, audio_features: Tensor) -> Tensor:
        """Windows (B, 14, 8, D) and (B, 14, 6, D) -> logits (B, 21); class i: the sound is -2 + 0.2
        i s *early*.
        """
        return self.transformer(
            self.vproj(seen).flatten(1, 2), self.aproj(audio_features).flatten(1, 2)
        )
