"""Sound of a file by its timestamps, and what is done to it: rate, channels, alignment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np

from avdiff.media.container import (
    LONGEST_CLIP,
    LONGEST_GAP,
    MAX_BYTES,
    MediaError,
    length_is_exact,
    start_time,
)

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer

AAC_FRAME = 1024  # samples in an AAC access unit (ISO/IEC 14496-3)
TOLD_HOLE = 0.1  # seconds; shorter holes in the timestamps are filled without a word
# channels in FFmpeg's order FL FR FC LFE BL BR (SL SR); ITU-R BS.775 weights, scaled to a sum of 1
DOWNMIX = {
    1: (1.0,),
    2: (0.5, 0.5),
    6: (0.28, 0.28, 0.20, 0.0, 0.12, 0.12),
    8: (0.24, 0.24, 0.17, 0.0, 0.0875, 0.0875, 0.0875, 0.0875),
}
CANCELED = 0.03  # a mix this much weaker than its channels is what their difference left (-30 dB)
LEAST_LEVEL = 1e-3  # root mean square (-60 dBFS) under which channels are silence, mixed or not


@dataclass(frozen=True)
class Sound:
    """Decoded sound: samples (C, S) float32 at `rate` Hz, `begin` the time of the first of them in
    seconds.
    """

    samples: np.ndarray
    rate: int
    begin: Fraction
    notes: tuple[str, ...] = ()


def decode_sound(
    path: str | Path,
    container: InputContainer,
    audio: AudioStream,
    video_start: Fraction | None,
    limit: Fraction | None,
    longest: Fraction = LONGEST_CLIP,
    mix: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Sound:
    """Decode a sound track at its own rate; short holes in the timestamps become silence.

    Args:
        video_start: time of the first picture in the file. limit: seconds wanted after it; None
            reads all, up to `longest`. mix: (C, S) -> (channels, S), done to each piece as it
            comes, so that memory never holds all channels.

    Raises:
        MediaError: nothing decodable, cut short, a hole longer than `LONGEST_GAP`, or longer than
            memory should hold.
    """
    rate = audio.codec_context.sample_rate
    decoder = _SoundDecoder(path, rate, video_start, limit, longest, mix)
    for frame in container.decode(audio):
        decoder.add(frame)
        if decoder.is_complete():
            break
    if decoder.begin is None or not decoder.parts:
        raise MediaError(f"path={path}: its sound holds no decodable sample")
    samples = np.concatenate(decoder.parts, axis=1)
    end = decoder.begin + Fraction(decoder.position, decoder.rate)
    exact = length_is_exact(path, container)
    if exact:
        check_complete(path, audio, end, limit)
    if exact and audio.duration is not None:
        # the last AAC frame is padded: the header knows where the sound ends
        end = audio.duration * Fraction(audio.time_base or 0) + start_time(audio)
        samples = samples[:, : max(1, round((end - decoder.begin) * decoder.rate))]
    return Sound(samples, decoder.rate, decoder.begin, tuple(decoder.notes))


class _SoundDecoder:
    """Collects decoded frames on one clock."""

    def __init__(
        self,
        path: str | Path,
        rate: int,
        video_start: Fraction | None,
        limit: Fraction | None,
        longest: Fraction,
        mix: Callable[[np.ndarray], np.ndarray] | None,
    ) -> None:
        self.path = path
        self.rate = rate
        self.video_start = video_start
        self.limit = limit
        self.longest = longest
        self.mix = mix
        # packed samples: the planes of more than eight channels lie where PyAV does not look
        self.converter = av.AudioResampler(format="flt")
        self.parts: list[np.ndarray] = []
        self.notes: list[str] = []
        self.begin: Fraction | None = None
        self.position = 0  # samples so far

    def add(self, frame: Any) -> None:
        """Append one decoded frame, with silence before it where its time says so."""
        if frame.sample_rate != self.rate:
            raise MediaError(
                f"path={self.path}: its sound changes from {self.rate} to {frame.sample_rate} Hz"
            )
        expected = (self.begin or Fraction(0)) + Fraction(self.position, self.rate)
        time = expected if frame.pts is None else frame.pts * frame.time_base
        if self.begin is None:
            self.begin = time
        hole = round((time - self.begin) * self.rate) - self.position
        try:
            pieces = self.converter.resample(frame)
        except ValueError as error:
            raise MediaError(f"path={self.path}: its sound changes its form midway") from error
        for piece in pieces:
            channels = piece.layout.nb_channels
            samples = np.ascontiguousarray(piece.to_ndarray().reshape(-1, channels).T)
            samples = samples if self.mix is None else self.mix(samples)
            channels = len(samples)
            if hole > 2 * AAC_FRAME:  # smaller ones are rounded timestamps
                self._fill(hole, channels)
                hole = 0
            if self.parts and len(self.parts[0]) != channels:
                raise MediaError(f"path={self.path}: its sound changes its channels midway")
            self.parts.append(samples)
            self.position += samples.shape[1]
            self._check_size(channels)

    def _fill(self, hole: int, channels: int) -> None:
        """Silence for a hole of so many samples, no more than what is wanted of it."""
        if self.limit is not None:
            hole = min(hole, max(0, self._wanted() - self.position))
        at = self.position / self.rate
        if hole > LONGEST_GAP * self.rate:
            raise MediaError(
                f"path={self.path}: its sound has a hole of {hole // self.rate} s after {at:.1f} "
                f"s; needs at most {LONGEST_GAP} s: cut it there"
            )
        if hole > TOLD_HOLE * self.rate:
            self.notes.append(
                f"its sound has a hole of {hole / self.rate:.1f} s after {at:.1f} s, filled with "
                "silence"
            )
        self.parts.append(np.zeros((channels, hole), np.float32))
        self.position += hole

    def _check_size(self, channels: int) -> None:
        if self.limit is None and self.position > self.longest * self.rate:
            raise MediaError(too_long(self.path, None, self.longest))
        if self.position * channels * 4 > MAX_BYTES:
            raise MediaError(
                f"path={self.path}: its sound is too much for memory; give max_seconds or cut it"
            )

    def _wanted(self) -> int:
        """Samples needed from the first of the track."""
        assert self.limit is not None and self.begin is not None, "asked for while decoding"
        start = self.begin if self.video_start is None else self.video_start
        return -int((self.begin - start - self.limit) * self.rate // 1)

    def is_complete(self) -> bool:
        """Whether all that is wanted has been decoded."""
        if self.limit is None or self.begin is None:
            return False
        start = self.begin if self.video_start is None else self.video_start
        return self.begin + Fraction(self.position, self.rate) >= start + self.limit


def too_long(path: str | Path, seconds: Fraction | None, longest: Fraction = LONGEST_CLIP) -> str:
    """The sentence that refuses a clip beyond `longest`."""
    found = f"lasts {float(seconds):.0f} s" if seconds else "goes on and on"
    return (
        f"path={path}: {found}; at most {longest} s are read at once: give max_seconds "
        "(--seconds) for its start, or cut it (ffmpeg -ss START -t SECONDS -i IN OUT)"
    )


def check_complete(path: str | Path, stream: Any, end: Fraction, limit: Fraction | None) -> None:
    """A file cut short decodes without complaint up to the cut; its header tells.

    Raises:
        MediaError: it ends too early.
    """
    if stream.duration is not None:
        seconds = stream.duration * stream.time_base
        expected = start_time(stream) + (seconds if limit is None else min(seconds, limit))
        if end < expected - max(Fraction(1, 4), expected / 50):
            found = f"its {stream.type} ends at {float(end):.2f} s of {float(expected):.2f} s"
            raise MediaError(f"path={path}: is cut short, {found}")


def align(samples: np.ndarray, late: int, length: int | None) -> np.ndarray:
    """Put `late` samples of silence in front (negative: cut them off), then keep at most `length`
    samples.
    """
    samples = np.pad(samples, ((0, 0), (late, 0))) if late > 0 else samples[:, -late:]
    return samples if length is None else samples[:, :length]


def resample_audio(audio: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """(C, S) float32 at `from_rate` Hz -> (C, round(S * to_rate / from_rate)) at `to_rate`, without
    delay.
    """
    length = round(audio.shape[1] * Fraction(to_rate, from_rate))
    if length * len(audio) * 4 > MAX_BYTES:
        raise MediaError(
            f"sample_rate={to_rate}: {len(audio)} channels of {length} samples are too much for "
            "memory"
        )
    result = np.zeros((len(audio), length), np.float32)
    for channel, samples in enumerate(audio):
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=to_rate)
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples[None]), format="fltp", layout="mono"
        )
        frame.sample_rate = from_rate
        frame.pts = 0
        frame.time_base = Fraction(1, from_rate)
        parts = [f.to_ndarray()[0] for f in (*resampler.resample(frame), *resampler.resample(None))]
        line = np.concatenate(parts)[:length] if parts else np.zeros(0, np.float32)
        result[channel, : len(line)] = line
    return result


def mix_channels(sound: np.ndarray, channels: int) -> np.ndarray:
    """(C, S) -> (channels, S): surround is mixed down by fixed weights, mono doubled for stereo."""
    count = len(sound)
    if count == channels:
        return sound
    if channels == 2 and count > 2:
        left = sound[0] + 0.7 * sound[2]
        right = sound[1] + 0.7 * sound[2]
        return np.stack([left, right]) * np.float32(0.6)
    weights = np.array(DOWNMIX.get(count, (1 / count,) * count), np.float32)
    mono = np.tensordot(weights, sound, axes=1)[None]
    return np.repeat(mono, channels, axis=0)


def channels_cancel(sound: np.ndarray) -> bool:
    """Whether (C, S) channels are loud apart and next to nothing together, as when one is the other
    turned upside down.
    """
    if len(sound) < 2 or not sound.shape[1]:
        return False
    power = np.mean(np.square(sound, dtype=np.float64), axis=1)
    loudest = float(np.sqrt(power.max()))
    mixed = sound.mean(axis=0, dtype=np.float64)
    return loudest > LEAST_LEVEL and float(np.sqrt(np.mean(mixed**2))) < CANCELED * loudest


CANCEL_ADVICE = (
    "its channels cancel each other out when they are mixed (one is another upside down): give "
    "one of them alone"
)
CANCEL_NOTE = f"{CANCEL_ADVICE}, with audio_channel=1 (--audio-channel 1)"


def choose_channel(sound: np.ndarray, channel: int | None) -> np.ndarray:
    """(C, S) -> (1, S), the channel of that number from 1; all of them for None.

    Raises:
        MediaError: there is no such channel.
    """
    if channel is None:
        return sound
    if not 1 <= channel <= len(sound):
        raise MediaError(
            f"audio_channel={channel}: the sound has {len(sound)} channels, counted from 1"
        )
    return sound[channel - 1 : channel]
