"""LTX-2's codecs and texts as the makers of a latent cache: its clock, rates and channels, and what
the connectors say of each caption, so that training needs neither VAE nor text encoder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from avdiff.clip import Clock
from avdiff.families.ltx2.codec import LTX2Codec
from avdiff.families.ltx2.texts import MAX_LENGTH, LTX2Text, LTX2Texts

FPS = 24  # frames a second that the models were trained with


class LTX2CacheMakers:
    """What `write_cache` asks of codecs: `encode`, `text`, `fingerprint`.

    Args:
        text: captions too; the text encoder is needed for them alone.
    """

    def __init__(self, codec: LTX2Codec, text: LTX2CaptionFeatures | None = None) -> None:
        self.codec = codec
        self.text = text

    @torch.no_grad()
    def encode(self, video: Tensor | None, audio: Tensor | None) -> dict[str, Tensor]:
        """video (B, F, H, W, 3) uint8, audio (B, channels, S) -> packed fp16 tokens by modality."""
        out = {}
        if video is not None:
            frames = video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
            out["video"] = self.codec.encode_video(frames).half()
        if audio is not None:
            # 25 steps a second to the nearest, as the layout of a clip counts them
            step = self.codec.clock.audio_stride
            steps = round(audio.shape[-1] / step)
            out["audio"] = self.codec.encode_audio(audio, steps).half()
        return out

    def clip_settings(self) -> dict[str, object]:
        """Arguments of `ClipOptions`: 24 frames a second, stereo at 16 kHz, this clock."""
        codec = self.codec
        return {
            "fps": FPS,
            "sample_rate": codec.sample_rate,
            "channels": codec.channels,
            "words": False,
            "clock": codec.clock,
        }

    def fingerprint(self) -> dict[str, object]:
        """Family, clock and hashes: what the cache depends on."""
        made_by: dict[str, object] = {"family": "LTX-2", **self.codec.fingerprint()}
        made_by["clock"] = clock_record(self.codec.clock)
        if self.text is not None:
            made_by["text_encoder"] = self.text.fingerprint()
        return made_by


class LTX2CaptionFeatures:
    """Captions to what the connectors say: video's features, audio's and the mask side by side."""

    def __init__(self, texts: LTX2Texts, length: int = MAX_LENGTH) -> None:
        self.texts = texts
        self.length = length

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Captions -> fp16 (L, D_v + D_a + 1) each."""
        return [pack_text(self.texts([caption], self.length))[0].half() for caption in captions]

    def fingerprint(self) -> str:
        """Of encoder, connectors, vocabulary and length."""
        return f"{self.texts.fingerprint()}-{self.length}"


def pack_text(text: LTX2Text) -> Tensor:
    """(B, L, D_v + D_a + 1)."""
    return torch.cat([text.video, text.audio, text.mask[..., None].to(text.video)], -1)


def unpack_text(features: Tensor, video_width: int) -> LTX2Text:
    """Inverse of `pack_text`."""
    video, rest = features[..., :video_width], features[..., video_width:]
    return LTX2Text(video, rest[..., :-1], rest[..., -1])


def clock_record(clock: Clock) -> dict[str, object]:
    """A clock as JSON holds it; `Clock` takes it back by keyword but for the exact rate."""
    return {**asdict(clock), "shared_rate": str(clock.shared_rate)}


def load_makers(model: str | os.PathLike[str], text: bool) -> LTX2CacheMakers | None:
    """Codecs and, with `text`, texts of an LTX-2 folder; None for a folder of anything else."""
    from avdiff.families import FAMILIES, class_name_of, load

    if not (Path(model) / "model_index.json").is_file():
        return None
    if FAMILIES.get(class_name_of(model)) != "avdiff.families.ltx2":
        return None
    pipe = load(model) if text else load(model, text_encoder=None, transformer=None)
    return LTX2CacheMakers(pipe.codec, LTX2CaptionFeatures(pipe.texts) if text else None)
