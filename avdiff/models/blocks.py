"""One block of the dual-branch transformer: two branches that meet through cross-attention and a
shared stream.

Shape legend: B batch, N_m tokens of a modality, N_s shared ticks, D_m width of a branch. The shared
stream rides as the tail of the audio argument, which is called `encoder_hidden_states` because
diffusers' caches look for that name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from avdiff.core.attention import Attention
from avdiff.core.engram import Engram
from avdiff.core.feedforward import SwiGLU
from avdiff.core.modulation import Modulation, ModulationTable, rms_norm
from avdiff.core.moe import MoE
from avdiff.models.conditions import Conditions


class StepRows(NamedTuple):
    """Modulation of one modality at one step: rows (B, 1|N, 6, D) from its own noise level, and the
    gate (B, 1, D) of what it hears from its partner, from the partner's noise level (None without a
    partner).
    """

    rows: torch.Tensor
    cross_gate: torch.Tensor | None


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
        self.reads = (partner_dim is not None, shared_dim is not None)
        source_dims = [d for d in (partner_dim, shared_dim) if d is not None]
        self.cross_attn = (
            Attention(dim, cross_heads, dim_head, source_dims) if source_dims else None
        )
        # 0.2: the partner is heard from the first step, but cannot drown the branch's own signal.
        self.cross_gate = nn.Parameter(torch.full((dim,), 0.2)) if source_dims else None
        self.ff = MoE(dim, hidden, experts, top_k) if experts else SwiGLU(dim, hidden)

    def forward(
        self,
        query: torch.Tensor,
        sources: Sequence[torch.Tensor | None],
        query_time: torch.Tensor,
        source_times: Sequence[torch.Tensor],
        window: torch.Tensor | None,
        partner_gate: torch.Tensor | None,
    ) -> torch.Tensor:
        """The meeting: what the branch hears of the others, on the time axis alone and within the
        local window, times its gate: the block's own level plus what the partner's noise level says
        (None without a partner).
        """
        assert self.cross_attn is not None and self.cross_gate is not None
        heard = self.cross_attn(query, sources, query_time, source_times, window)
        return (self.cross_gate if partner_gate is None else self.cross_gate + partner_gate) * heard

    def loader(
        self, x: torch.Tensor, modulation: Modulation
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Feed-forward, dense or MoE, with its routing statistics."""
        h = modulation(x)
        stats = None
        if isinstance(self.ff, MoE):
            h, stats = self.ff(h)
        else:
            h = self.ff(h)
        return x + (modulation.gate * h).to(x.dtype), stats


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
        self, shared: torch.Tensor, normed: Sequence[torch.Tensor | None], conditions: Conditions
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """shared (B, N_s, D), normed (shared, video, audio) snapshots -> updated stream and routing
        statistics.
        """
        phases = (conditions.shared_rope, conditions.video_time_rope, conditions.audio_rope)
        shared = shared + self.attn(
            normed[0],
            normed,
            conditions.shared_rope,
            phases,
            joined_window(conditions, "shared", normed),
        )
        if not isinstance(self.ff, MoE):
            return shared + self.ff(rms_norm(shared)), None
        h, stats = self.ff(rms_norm(shared))
        return shared + h, stats


class DualBlock(nn.Module):
    """Self-attention, text, the meeting of the streams, feed-forward. For m in {v, a}, with o the
    other and N the norm:

        x_m += g1 * SelfAttn(mod1(N x_m); RoPE)
        x_m += CrossAttn(N x_m; text)                       in blocks with text
        (n_v, n_a, n_s) = N of all three streams, taken before any of them changes
        x_m += gate_m(sigma_o) * CrossAttn(n_m; [n_o, n_s])   on seconds alone, within a local
        window x_s += CrossAttn(n_s; [n_s, n_v, n_a]);  x_s += MoE(N x_s)    in blocks that carry
        the stream x_m += g2 * FF(mod2(N x_m))                          SwiGLU or MoE

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
        """video (B, N_v, D_v) | None and audio with ticks (B, N_a + N_s, D_a) | None -> the same
        two, then routing statistics (M, 2E+1) of each mixture of experts that ran, in the order
        shared, video, audio.
        """
        video = hidden_states
        audio, shared = split_shared(encoder_hidden_states, conditions.num_shared)
        c = conditions
        stats = []

        if self.memory is not None and c.memory is not None and encoder_hidden_states is not None:
            recalled = self.memory(encoder_hidden_states, c.memory[self.layer])
            encoder_hidden_states = encoder_hidden_states + recalled
            audio, shared = split_shared(encoder_hidden_states, c.num_shared)

        if video is not None:
            assert video_step is not None
            v_attn, v_ff = self.video.modulation(video_step.rows)
            video = video + (
                v_attn.gate * self.video.self_attn(v_attn(video), query_phases=c.video_rope)
            ).to(video.dtype)
            if self.video.text_attn is not None:
                video = video + self.video.text_attn(
                    rms_norm(video), [c.text], attention_mask=c.caption_mask("video")
                )
        if audio is not None:
            assert audio_step is not None
            a_attn, a_ff = self.audio.modulation(audio_step.rows)
            audio = audio + (
                a_attn.gate * self.audio.self_attn(a_attn(audio), query_phases=c.audio_rope)
            ).to(audio.dtype)
            if self.audio.text_attn is not None:
                audio = audio + self.audio.text_attn(
                    rms_norm(audio), [c.text], attention_mask=c.caption_mask("audio")
                )

        if not isolated:
            # Snapshots of all three before any update: the order of the lines below does not
            # matter.
            nv, na, ns = (None if x is None else rms_norm(x) for x in (video, audio, shared))
            if video is not None and nv is not None and video_step is not None:
                heard = self._meet(
                    "video",
                    nv,
                    (na, ns),
                    c.video_time_rope,
                    (c.audio_rope, c.shared_rope),
                    c,
                    video_step,
                )
                video = video if heard is None else video + heard.to(video.dtype)
            if audio is not None and na is not None and audio_step is not None:
                heard = self._meet(
                    "audio",
                    na,
                    (nv, ns),
                    c.audio_rope,
                    (c.video_time_rope, c.shared_rope),
                    c,
                    audio_step,
                )
                audio = audio if heard is None else audio + heard.to(audio.dtype)
            if self.shared is not None and shared is not None:
                shared, routing = self.shared(shared, (ns, nv, na), c)
                stats.append(routing)

        if video is not None:
            video, routing = self.video.loader(video, v_ff)
            stats.append(routing)
        if audio is not None:
            audio, routing = self.audio.loader(audio, a_ff)
            stats.append(routing)

        tail = [x for x in (audio, shared) if x is not None]
        routed = [s for s in stats if s is not None]
        outputs = (video, torch.cat(tail, dim=1) if tail else None)
        return (*outputs, *routed)

    def _meet(
        self,
        name: str,
        query: torch.Tensor,
        others: tuple,
        query_time: torch.Tensor,
        other_times: tuple,
        conditions: Conditions,
        step: StepRows,
    ) -> torch.Tensor | None:
        """What branch `name` hears of those that it reads and that are there; None where there is
        nothing.
        """
        branch: Branch = self.video if name == "video" else self.audio
        sources = [x for x, reads in zip(others, branch.reads, strict=True) if reads]
        if all(x is None for x in sources):
            return None
        times = [t for t, reads in zip(other_times, branch.reads, strict=True) if reads]
        heard = [x if reads else None for x, reads in zip(others, branch.reads, strict=True)]
        return branch(
            query,
            sources,
            query_time,
            times,
            joined_window(conditions, name, heard),
            step.cross_gate,
        )


def split_shared(
    x: torch.Tensor | None, num_shared: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Split audio + shared ticks (B, N_a + N_s, D); either part may be empty and is then None."""
    if x is None or num_shared == 0:
        return x, None
    return (x[:, :-num_shared] if x.shape[1] > num_shared else None), x[:, -num_shared:]


def joined_window(
    conditions: Conditions, name: str, sources: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    """Windows of the sources that are present, side by side: (1, 1, Q, K)."""
    windows = conditions.windows[name]
    return torch.cat([w for w, s in zip(windows, sources, strict=False) if s is not None], dim=-1)
