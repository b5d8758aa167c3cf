"""Names of LTX-2's weights: diffusers <-> Lightricks (ComfyUI, ltx-trainer), generations, branches.

The table is the reverse of diffusers' conversion script and of its LoRA converter.
"""

from __future__ import annotations

import re
from typing import Literal, Protocol

Version = Literal["2.0", "2.3", "2.5"]

TOP = {  # first segment of a name: diffusers -> Lightricks
    "proj_in": "patchify_proj",
    "audio_proj_in": "audio_patchify_proj",
    "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single",
    "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
}
INNER = {
    "norm_q": "q_norm",
    "norm_k": "k_norm",
    "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
    "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
}
TOP_BACK = {native: name for name, native in TOP.items()}
INNER_BACK = {native: name for name, native in INNER.items()}

BRANCHES = ("video", "audio", "text", "cross")
_ROLES = (  # the first that matches; what a layer does
    ("cross", r"audio_to_video|video_to_audio|av_cross|a2v_cross"),
    ("text", r"(^|\.)(audio_)?attn2|caption_projection|prompt_"),
    ("audio", r"(^|\.)audio_"),
)
# What only the sound's stream uses: its own layers, its text, and what it hears of the picture.
_AUDIO_ONLY = r"(^|\.)audio_(?!to_video)|video_to_audio|av_cross_attn_audio"


class TransformerConfig(Protocol):
    """The entries that tell the generations apart."""

    use_keyframes_abs_pos_embedding: bool
    use_prompt_embeddings: bool


def version_of(config: TransformerConfig) -> Version:
    """Generation of a transformer by its config."""
    if config.use_keyframes_abs_pos_embedding:
        return "2.5"
    return "2.0" if config.use_prompt_embeddings else "2.3"


def to_native(name: str) -> str:
    """Lightricks' name of a weight or layer of diffusers' transformer."""
    first, *rest = name.split(".")
    return ".".join([TOP.get(first, first), *(INNER.get(part, part) for part in rest)])


def to_diffusers(name: str) -> str:
    """Inverse of `to_native`; a name of diffusers stays as it is."""
    first, *rest = name.split(".")
    return ".".join([TOP_BACK.get(first, first), *(INNER_BACK.get(part, part) for part in rest)])


def branch_of(name: str) -> str:
    """Branch of a weight: video, audio, text (what reads the prompt) or cross (between the two)."""
    return next((branch for branch, pattern in _ROLES if re.search(pattern, name)), "video")


def owner_of(name: str) -> str:
    """Stream that a weight changes: "video" or "audio".

    Text and cross attention belong to the stream that listens: `audio_attn2` and
    `video_to_audio_attn` to the sound, `attn2` and `audio_to_video_attn` to the picture.
    """
    return "audio" if re.search(_AUDIO_ONLY, name) else "video"
