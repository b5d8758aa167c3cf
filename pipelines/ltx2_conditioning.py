"""What an LTX-2 call is given: which tokens are known, what they hold, and how given frames and
samples come back. The family's `Layout` says where a token lies in time; all else is as for the
presenter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torchaudio
from torch import Tensor

from avdiff.families.ltx2.codec import LTX2Codec
from avdiff.families.ltx2.layout import LTX2Layout
from avdiff.latents import Joint
from avdiff.pipelines.conditioning import Conditioning, Retake, masked_tokens, per_clip
from avdiff.pipelines.output import SEAM


@dataclass(frozen=True)
class Given:
    """What the caller hands over.

    Args:
        image, last_image: (B, 3, H, W) in [-1, 1]. video: (B, 3, F, H, W) in [-1, 1]. audio: (B,
            channels, S) in [-1, 1] at `sampling_rate` Hz; one channel stands for all. mask: (H, W)
            or (F, H, W), above 0.5 is made anew.
    """

    image: Tensor | None = None
    last_image: Tensor | None = None
    video: Tensor | None = None
    audio: Tensor | None = None
    retake: Retake | None = None
    mask: Tensor | None = None
    sampling_rate: int = 16000

    def check(self) -> None:
        """Refuse parts that contradict each other."""
        if self.image is not None and self.video is not None:
            raise ValueError(
                "image and video are both given: an image is the first frame of a video to be "
                "generated"
            )
        if self.mask is not None and self.video is None:
            raise ValueError("mask without video: needs the video whose masked region is made anew")
        if self.retake is not None and self.video is None and self.audio is None:
            raise ValueError(
                "retake without video and audio: needs a clip of which a span is redone"
            )


def known_parts(
    given: Given, codec: LTX2Codec, layout: LTX2Layout, batch: int, device: torch.device
) -> Joint[Conditioning]:
    """Known tokens of both modalities; None where nothing is given."""
    given.check()
    video = _picture_part(given, codec, layout, batch, device)
    audio = None
    if given.audio is not None:
        audio = _sound_part(given.audio, given.sampling_rate, codec, layout, batch, device)
    known = Joint(video, audio).map(lambda part: part.mask)
    if given.retake is not None:
        known = known.map(lambda k, anew: k & ~anew, touched(layout, given.retake))
    if given.mask is not None and known.video is not None:
        known = Joint(known.video & ~masked_tokens(given.mask, layout.clip), known.audio)
    return Joint(video, audio).map(lambda part, k: Conditioning(part.tokens, k, part.source), known)


def touched(layout: LTX2Layout, retake: Retake) -> Joint[Tensor]:
    """Bool masks (N_v,), (N_a,) of the tokens whose time touches the span."""

    def hits(edges: Tensor, wanted: bool) -> Tensor:
        inside = (edges[:, 0] < retake.end) & (edges[:, 1] > retake.start)
        return inside & wanted

    return layout.edges().map(hits, Joint(retake.video, retake.audio))


def _picture_part(
    given: Given, codec: LTX2Codec, layout: LTX2Layout, batch: int, device: torch.device
) -> Conditioning | None:
    frames, rows, columns = layout.grid
    cell = rows * columns
    source = None if given.video is None else given.video[:, :, : layout.clip.num_frames]
    pieces = []
    if source is not None:
        stride = layout.clip.clock.video_stride
        whole = (source.shape[2] - 1) // stride * stride + 1  # the VAE takes 8k+1 frames
        source = source[:, :, :whole]
        pieces.append((0, codec.encode_video(source.to(device))))
    if given.image is not None:
        pieces.append((0, codec.encode_video(given.image[:, :, None].to(device))))
    if given.last_image is not None:
        if frames < 2:
            raise ValueError(
                f"last_image in a clip of {layout.clip.num_frames} frame: needs a longer clip"
            )
        # A latent frame after the first stands for several frames: here of one still.
        still = given.last_image[:, :, None].to(device)
        still = still.expand(-1, -1, 1 + layout.clip.clock.video_stride, -1, -1)
        pieces.append((cell * (frames - 1), codec.encode_video(still)[:, -cell:]))
    return _part(pieces, batch, layout.clip.video_tokens, source, device)


def _sound_part(
    audio: Tensor,
    rate: int,
    codec: LTX2Codec,
    layout: LTX2Layout,
    batch: int,
    device: torch.device,
) -> Conditioning | None:
    """Whole tokens of the sound; what lacks less than a latent frame of the clip's length is filled
    with silence.
    """
    audio = with_channels(audio, codec.channels).float()
    own = torchaudio.functional.resample(audio, rate, codec.sample_rate)
    clip = layout.clip
    missing = clip.num_samples - own.shape[-1]
    if 0 < missing < clip.clock.video_stride * clip.sample_rate / clip.fps:
        own = torch.nn.functional.pad(own, (0, missing))
    own = own[..., : clip.num_samples]
    heard = own.shape[-1] / codec.sample_rate
    ends = layout.edges().audio[:, 1]
    # The last token may reach a few milliseconds beyond the clip, since their number is rounded.
    count = len(ends) if own.shape[-1] >= clip.num_samples else int((ends <= heard).sum())
    tokens = codec.encode_audio(own.to(device), count) if count else torch.zeros(1, 0, 1)
    if not tokens.shape[1]:
        needed = float(ends[0])
        raise ValueError(f"audio of {audio.shape[-1]} samples: needs at least {needed:g} s")
    out = torchaudio.functional.resample(audio, rate, codec.out_rate)
    return _part([(0, tokens)], batch, layout.audio_steps, out, device)


def with_channels(audio: Tensor, channels: int) -> Tensor:
    """(B, C, S) with as many channels as the codec has; one channel is repeated.

    Raises:
        ValueError: any other number of channels.
    """
    if audio.shape[1] == channels:
        return audio
    if audio.shape[1] != 1:
        raise ValueError(f"audio of {audio.shape[1]} channels: needs 1 or {channels}")
    return audio.expand(-1, channels, -1)


def _part(
    pieces: list[tuple[int, Tensor]],
    batch: int,
    count: int,
    source: Tensor | None,
    device: torch.device,
) -> Conditioning | None:
    if not pieces:
        return None
    width = pieces[0][1].shape[-1]
    tokens = torch.zeros(batch, count, width, device=device)
    known = torch.zeros(count, dtype=torch.bool)
    for start, piece in pieces:
        stop = start + piece.shape[1]
        tokens[:, start:stop] = per_clip(piece, batch).to(device)
        known[start:stop] = True
    return Conditioning(tokens, known, None if source is None else per_clip(source, batch))


def keep_given_frames(frames: Tensor, part: Conditioning | None, layout: LTX2Layout) -> Tensor:
    """Decoded frames (B, 3, F, H, W) with those of a given video put back where all is known."""
    if part is None or part.source is None:
        return frames
    clip = layout.clip
    latent = part.mask.unflatten(0, (clip.latent_frames, -1)).all(1).cpu()
    kept = torch.cat([latent[:1], latent[1:].repeat_interleave(clip.clock.video_stride)])
    kept &= torch.arange(clip.num_frames) < part.source.shape[2]
    index = kept.nonzero()[:, 0].to(frames.device)
    own = part.source.to(frames).index_select(2, index)
    return frames.index_copy(2, index, own)


def keep_given_samples(
    waveform: Tensor, part: Conditioning | None, layout: LTX2Layout, rate: int
) -> Tensor:
    """Decoded sound (B, C, S) with the given sound put back where it is known, cross-faded within
    `SEAM` seconds on the known side.
    """
    if part is None or part.source is None or not part.mask.any():
        return waveform
    if part.mask.all():
        samples = round(layout.clip.seconds * rate)
        return _fit(part.source.to(waveform), samples)
    source = _fit(part.source.to(waveform), waveform.shape[-1])
    at = (torch.arange(waveform.shape[-1]) + 0.5) / rate
    edges = layout.edges().audio
    index = torch.bucketize(at, edges[:, 1], right=True).clamp(max=len(edges) - 1)
    kept = part.mask.cpu()[index].float()
    reach = round(SEAM * rate)
    near = torch.nn.functional.pad(1 - kept, (reach, reach))
    pooled = torch.nn.functional.avg_pool1d(near[None], 2 * reach + 1, 1)[0]
    weight = (kept * (1 - pooled.mul(2).clamp(max=1))).to(waveform)
    mixed = weight * source + (1 - weight) * waveform
    return torch.where(weight == 1, source, mixed)


def _fit(audio: Tensor, samples: int) -> Tensor:
    """Cut or filled with silence to so many samples."""
    return torch.nn.functional.pad(audio, (0, samples - audio.shape[-1]))
