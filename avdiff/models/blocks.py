"""One block of the dual-branch transformer: two branches that read each other and a shared stream.

Shape legend: B batch, N_m tokens of a modality, N_s shared tokens, D_m width of a branch. The
shared tokens ride as the tail of the audio argument, which is called `encoder_hidden_states`
because diffusers' caches look for that name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import nn

from avdiff.core.attention import Attention
from avdiff.core.engram import Engram, NgramHash
from avdiff.core.feedforward import SwiGLU
from avdiff.core.modulation import Modulation, ModulationTable, rms_norm
from avdiff.core.moe import MoE
from avdiff.models.conditions import Conditions

# Tokens (B, N, D) by the name of their stream: "video", "audio", "shared". A stream that takes no
# part has no entry.
Streams = dict[str, torch.Tensor]

# What cross-attention of a stream reads, in the order of its projections.
READS = {
    "video": ("audio", "shared"),
    "audio": ("video", "shared"),
    "shared": ("shared", "video", "audio"),
}


class StepRows(NamedTuple):
    """Modulation of one modality at one step: rows (B, 1|N, 6, D) from its own noise level, and the
    gate (B, 1, D) of what it reads of its partner, from the partner's noise level (None without a
    partner).
    """

    rows: torch.Tensor
    cross_gate: torch.Tensor | None


class Source(NamedTuple):
    """A stream as cross-attention reads it: normed tokens (B, K, D), None where it takes no part;
    their phases on the time axis; and which of them each query may see, (1, 1, Q, K) bool.
    """

    tokens: torch.Tensor | None
    rope: torch.Tensor
    window: torch.Tensor


class Branch(nn.Module):
    """One modality's half of a block. Written once; video and audio are two instances.

    Args:
        dim, heads, dim_head: width and self-attention. text_dim: caption width, 0 for a block
            without text.
        partner_dim, shared_dim: widths of what cross-attention reads: the other branch and the
            shared stream; None for one that it does not read.
        cross_heads: heads of the cross-attention (those of the audio branch: the narrower one sets
            the width).
        hidden: SwiGLU width; with `experts` > 0 a MoE of that many experts of `hidden` each.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        text_dim: int,
        partner_dim: int | None,
        shared_dim: int | None,
        cross_heads: int,
        hidden: int,
        experts: int = 0,
        top_k: int = 2,
    ) -> None:
        super().__init__()
        self.modulation = ModulationTable(dim, records=2)
        self.self_attn = Attention(dim, heads, dim_head)
        self.text_attn = Attention(dim, heads, dim_head, [text_dim]) if text_dim else None
        self.cross_reads = (partner_dim is not None, shared_dim is not None)
        source_dims = [d for d in (partner_dim, shared_dim) if d is not None]
        self.cross_attn = (
            Attention(dim, cross_heads, dim_head, source_dims) if source_dims else None
        )
        # 0.2: the partner is read from the first step, but cannot drown the branch's own signal.
        self.cross_gate = nn.Parameter(torch.full((dim,), 0.2)) if source_dims else None
        self.ff = MoE(dim, hidden, experts, top_k) if experts else SwiGLU(dim, hidden)

    def self_attend(
        self, x: torch.Tensor, modulation: Modulation, rope: torch.Tensor
    ) -> torch.Tensor:
        """x + g1 * SelfAttn(mod1(N x); RoPE)."""
        update = modulation.gate * self.self_attn(modulation(x), query_rope=rope)
        return x + update.to(x.dtype)

    def text_attend(self, x: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x + CrossAttn(N x; text), text (B, 1 + L, D_t), mask (B, 1, 1, 1 + L) bool; x in a block
        without text.
        """
        if self.text_attn is None:
            return x
        return x + self.text_attn(rms_norm(x), [text], attention_mask=mask)

    def cross_attend(
        self,
        x: torch.Tensor,
        query: torch.Tensor,
        query_rope: torch.Tensor,
        sources: Sequence[Source],
        partner_gate: torch.Tensor | None,
    ) -> torch.Tensor:
        """x + gate * CrossAttn(query; sources), on the time axis alone and within the local window.

        Args:
            sources: the partner and the shared stream. partner_gate: (B, 1, D), added to the
                block's own gate; None without a partner.
        """
        sources = [s for s, reads in zip(sources, self.cross_reads, strict=True) if reads]
        if all(source.tokens is None for source in sources):
            return x
        return x + self(query, query_rope, sources, partner_gate).to(x.dtype)

    def forward(
        self,
        query: torch.Tensor,
        query_rope: torch.Tensor,
        sources: Sequence[Source],
        partner_gate: torch.Tensor | None,
    ) -> torch.Tensor:
        """gate * CrossAttn(query; sources): the one part with a parameter of the branch itself,
        which offloading fetches around `forward` alone.
        """
        assert self.cross_attn is not None and self.cross_gate is not None
        gate = self.cross_gate if partner_gate is None else self.cross_gate + partner_gate
        return gate * attend(self.cross_attn, query, query_rope, sources)

    def feed_forward(
        self, x: torch.Tensor, modulation: Modulation
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x + g2 * FF(mod2(N x)), and the routing statistics of a mixture of experts."""
        update, routing = apply_feed_forward(self.ff, modulation(x))
        return x + (modulation.gate * update).to(x.dtype), routing


class SharedStream(nn.Module):
    """x_s += CrossAttn([x_s, video, audio]); x_s += MoE(x_s): the score that both branches play
    from.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        video_dim: int,
        hidden: int,
        experts: int,
        top_k: int,
    ) -> None:
        super().__init__()
        self.attn = Attention(dim, heads, dim_head, [dim, video_dim, dim])
        self.ff = MoE(dim, hidden, experts, top_k) if experts else SwiGLU(dim, hidden)

    def forward(
        self,
        shared: torch.Tensor,
        query: torch.Tensor,
        query_rope: torch.Tensor,
        sources: Sequence[Source],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """shared (B, N_s, D), its norm as query, sources (shared, video, audio) -> updated stream
        and routing statistics.
        """
        shared = shared + attend(self.attn, query, query_rope, sources)
        update, routing = apply_feed_forward(self.ff, rms_norm(shared))
        return shared + update, routing


class DualBlock(nn.Module):
    """Self-attention, text, cross-attention of the streams, feed-forward. For m in {v, a}, with o
    the other and N the norm:

        x_m += g1 * SelfAttn(mod1(N x_m); RoPE)
        x_m += CrossAttn(N x_m; text)                        in blocks with text
        (n_v, n_a, n_s) = N of all three streams, taken before any of them changes
        x_m += gate_m(sigma_o) * CrossAttn(n_m; [n_o, n_s])  on seconds alone, in a local window
        x_s += CrossAttn(n_s; [n_s, n_v, n_a])
        x_s += MoE(N x_s)                                    in blocks that carry the stream
        x_m += g2 * FF(mod2(N x_m))                          SwiGLU or MoE

    Either branch may be absent (None); it then costs nothing. `isolated` cuts both directions and
    the shared stream.
    """

    def __init__(
        self,
        layer: int,
        video: Branch,
        audio: Branch,
        shared: SharedStream | None,
        memory: Engram | None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.video = video
        self.audio = audio
        self.shared = shared
        self.memory = memory

    def forward(
        self,
        hidden_states: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | None,
        video_step: StepRows | None,
        audio_step: StepRows | None,
        conditions: Conditions,
        isolated: bool = False,
    ) -> tuple[torch.Tensor | None, ...]:
        """video (B, N_v, D_v) | None and audio with shared tokens (B, N_a + N_s, D_a) | None -> the
        same two, then routing statistics (M, 2E+1) of each mixture of experts that ran, in the
        order shared, video, audio. A branch takes part where its step is given.
        """
        c = conditions
        streams = split_streams(hidden_states, self._recall(encoder_hidden_states, c), c.num_shared)
        steps = (("video", self.video, video_step), ("audio", self.audio, audio_step))
        branches = [(name, branch, step) for name, branch, step in steps if step is not None]
        modulations = {name: branch.modulation(step.rows) for name, branch, step in branches}
        routing: list[torch.Tensor | None] = []

        for name, branch, _ in branches:
            x = branch.self_attend(streams[name], modulations[name][0], c.rope(name))
            streams[name] = branch.text_attend(x, c.text, c.caption_mask(name))

        if not isolated:
            normed = {name: rms_norm(x) for name, x in streams.items()}
            for name, branch, step in branches:
                queries = (normed[name], c.time_rope(name), read_by(name, normed, c))
                streams[name] = branch.cross_attend(streams[name], *queries, step.cross_gate)
            if self.shared is not None and "shared" in streams:
                queries = (normed["shared"], c.time_rope("shared"), read_by("shared", normed, c))
                streams["shared"], stats = self.shared(streams["shared"], *queries)
                routing.append(stats)

        for name, branch, _ in branches:
            streams[name], stats = branch.feed_forward(streams[name], modulations[name][1])
            routing.append(stats)

        tail = [streams[name] for name in ("audio", "shared") if name in streams]
        outputs = (streams.get("video"), torch.cat(tail, dim=1) if tail else None)
        return (*outputs, *(stats for stats in routing if stats is not None))

    def _recall(self, x: torch.Tensor | None, conditions: Conditions) -> torch.Tensor | None:
        """Add what the memory holds for this block to audio and shared tokens."""
        if self.memory is None or conditions.memory is None or x is None:
            return x
        return x + self.memory(x, conditions.memory[self.layer])


# What diffusers' caches need to know of a block. `TransformerBlockRegistry.register` would import
# all its own models.
_BLOCK = TransformerBlockMetadata(
    return_hidden_states_index=0, return_encoder_hidden_states_index=1, _cls=DualBlock
)
TransformerBlockRegistry._registry[DualBlock] = _BLOCK


def build_block(config: FrozenDict, layer: int) -> DualBlock:
    """Block number `layer` of an `AVTransformer` with this config; parts are made in one fixed
    order, so that a seed gives the same start.
    """
    has_shared = config.shared_rate > 0
    video = _build_branch(config, "video", layer)
    audio = _build_branch(config, "audio", layer)
    shared = None
    if has_shared and layer in config.shared_layers:
        shared = SharedStream(
            config.audio_dim,
            config.audio_heads,
            config.dim_head,
            config.video_dim,
            config.shared_hidden,
            config.shared_experts,
            config.top_k,
        )
    memory = None
    if config.num_phonemes and layer in config.memory_layers:
        hashing = NgramHash(
            vocab_size=config.num_phonemes * config.num_stress_tones,
            table_size=config.memory_rows,
            max_order=config.memory_orders,
            heads=config.memory_heads,
            layer=layer,
            layers=tuple(config.memory_layers),
        )
        memory = Engram(config.audio_dim, hashing, config.memory_head_dim)
    return DualBlock(layer, video, audio, shared, memory)


def _build_branch(config: FrozenDict, modality: str, layer: int) -> Branch:
    """One branch of a block; its partner is the other modality."""
    partner = "audio" if modality == "video" else "video"
    return Branch(
        dim=config[f"{modality}_dim"],
        heads=config[f"{modality}_heads"],
        dim_head=config.dim_head,
        text_dim=config.text_dim if layer % config.text_every == 0 else 0,
        partner_dim=config[f"{partner}_dim"] if config.cross_modal else None,
        shared_dim=config.audio_dim if config.shared_rate > 0 else None,
        cross_heads=config.audio_heads,
        hidden=config[f"{modality}_hidden"],
        experts=config[f"{modality}_experts"],
        top_k=config.top_k,
    )


def attend(
    attention: Attention, query: torch.Tensor, query_rope: torch.Tensor, sources: Sequence[Source]
) -> torch.Tensor:
    """Attention from (B, Q, D) to those sources that take part."""
    tokens = [source.tokens for source in sources]
    ropes = [source.rope for source in sources]
    window = torch.cat([s.window for s in sources if s.tokens is not None], dim=-1)
    return attention(query, tokens, query_rope, ropes, window)


def read_by(name: str, normed: Streams, conditions: Conditions) -> list[Source]:
    """What a stream's cross-attention can read, in the order of `READS`."""
    windows = conditions.windows[name]
    return [
        Source(normed.get(other), conditions.time_rope(other), windows[other])
        for other in READS[name]
    ]


def apply_feed_forward(
    network: MoE | SwiGLU, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Feed-forward, dense (which has no statistics) or a mixture of experts."""
    return network(x) if isinstance(network, MoE) else (network(x), None)


def split_streams(
    video: torch.Tensor | None, audio_and_shared: torch.Tensor | None, num_shared: int
) -> Streams:
    """Streams that are there: video (B, N_v, D_v), and audio + shared tokens (B, N_a + N_s, D_a) of
    which either part may be empty.
    """
    audio, shared = split_shared(audio_and_shared, num_shared)
    streams = {"video": video, "audio": audio, "shared": shared}
    return {name: x for name, x in streams.items() if x is not None}


def split_shared(
    x: torch.Tensor | None, num_shared: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Split audio + shared tokens (B, N_a + N_s, D); either part may be empty and is then None."""
    if x is None or num_shared == 0:
        return x, None
    return (x[:, :-num_shared] if x.shape[1] > num_shared else None), x[:, -num_shared:]
