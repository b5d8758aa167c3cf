"""Named sizes of AVTransformer. Each function returns a fresh config:
`AVTransformer(**presets.tiny())`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def tiny() -> dict[str, Any]:
    """Two narrow blocks with every part switched on: for tests."""
    return dict(
        video_channels=64,
        audio_channels=48,
        text_dim=32,
        video_dim=48,
        audio_dim=32,
        video_heads=3,
        audio_heads=2,
        dim_head=16,
        num_layers=2,
        text_every=1,
        video_hidden=64,
        audio_hidden=64,
        shared_layers=(0,),
        shared_hidden=32,
        shared_experts=4,
        phoneme_dim=16,
        memory_layers=(0,),
        memory_rows=64,
        memory_heads=2,
        memory_head_dim=8,
    )


def presenter() -> dict[str, Any]:
    """The embedded default: what two CPU cores can train and run (the class defaults, and events
    with a script).
    """
    return dict(onset_track=True)


def base() -> dict[str, Any]:
    """About 1 B parameters on the latents of LTX-2's codecs (128 values a video token, 128 an audio
    token).
    """
    return dict(
        video_channels=128,
        audio_channels=128,
        text_dim=1024,
        video_dim=1280,
        audio_dim=1024,
        video_heads=20,
        audio_heads=16,
        dim_head=64,
        num_layers=20,
        text_every=2,
        video_hidden=3072,
        audio_hidden=2560,
        shared_layers=(2, 8, 14),
        shared_hidden=1024,
        shared_experts=8,
        phoneme_dim=512,
        memory_layers=(1,),
        memory_rows=65536,
        memory_heads=8,
        memory_head_dim=64,
        window=0.5,
    )


def large() -> dict[str, Any]:
    """About 10 B parameters: routed feed-forwards in both branches, big phoneme memory."""
    return dict(
        video_channels=128,
        audio_channels=128,
        text_dim=4096,
        video_dim=2560,
        audio_dim=1536,
        video_heads=20,
        audio_heads=12,
        dim_head=128,
        num_layers=32,
        text_every=1,
        video_hidden=2048,
        audio_hidden=1536,
        video_experts=10,
        audio_experts=8,
        shared_layers=tuple(range(2, 30, 6)),
        shared_hidden=1024,
        shared_experts=8,
        phoneme_dim=1024,
        memory_layers=(1,),
        memory_rows=262144,
        memory_heads=8,
        memory_head_dim=128,
        window=0.5,
    )


PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    f.__name__: f for f in (tiny, presenter, base, large)
}
