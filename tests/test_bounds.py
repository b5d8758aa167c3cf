"""Memory and time are bounded by what was asked, not by what a file claims; no file opens another
one or starts a program.
"""

from __future__ import annotations

import tracemalloc
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from bad_clips import RATE, pictures, tone

from avdiff.cli.info import LONGEST_TAG, describe_file
from avdiff.media.container import NOTICE
from avdiff.media.frames import read_sound, walk_pictures
from avdiff.media.probe import probe
from avdiff.media.read import MediaError, read_clip
from avdiff.media.write import write_clip, write_wav


def write_wave(path: Path, samples: np.ndarray, rate: int = RATE) -> None:
    """(C, S) int16, any number of channels and any rate in the header."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.ascontiguousarray(samples.T).astype("<i2").tobytes())


def packets(path: Path, codec: str, times: list[float]) -> None:
    """A file whose packets carry the timestamps given, in seconds."""
    with av.open(str(path), "w") as container:
        rate = 8000 if codec.startswith("pcm") else 25
        stream = container.add_stream(codec, rate=rate)
        if stream.type == "audio":
            stream.layout = "mono"
        else:
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p"
        for number, at in enumerate(times):
            if stream.type == "audio":
                samples = np.zeros((1, 800), np.int16)
                frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
                frame.sample_rate = 8000
            else:
                picture = np.full((64, 64, 3), number * 20 % 255, np.uint8)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            for packet in stream.encode(frame):
                packet.pts = packet.dts = int(at / packet.time_base)
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)


@pytest.mark.parametrize("channels", [3, 9, 16, 64])
def test_many_channels_keep_their_order(tmp_path: Path, channels: int) -> None:
    """The planes beyond the eighth are not where eight are: reading them there ends the process."""
    samples = np.arange(1, channels + 1)[:, None] * np.full((1, 4800), 100)
    write_wave(tmp_path / "a.wav", samples)
    found = read_clip(tmp_path / "a.wav").audio
    assert found.shape == (channels, 4800)
    assert np.allclose(found[:, 100] * 32768, samples[:, 100], atol=1)
    assert np.allclose(read_sound(tmp_path / "a.wav")[0][100] * 32768, samples.mean(0)[100], atol=1)


def test_rates_and_channels_out_of_range(tmp_path: Path) -> None:
    write_wave(tmp_path / "slow.wav", np.zeros((1, 3000)), rate=1)
    with pytest.raises(MediaError, match="1 samples a second; needs 1000 to 384000"):
        read_clip(tmp_path / "slow.wav")
    write_wave(tmp_path / "wide.wav", np.zeros((65, 300)))
    with pytest.raises(MediaError, match="65 channels"):
        probe(tmp_path / "wide.wav")


def test_gaps_are_refused_or_told(tmp_path: Path) -> None:
    packets(tmp_path / "hole.mka", "pcm_s16le", [0, 0.1, 60, 60.1])
    with pytest.raises(MediaError, match=r"hole of 59 s after 0\.2 s"):
        read_clip(tmp_path / "hole.mka")
    assert read_clip(tmp_path / "hole.mka", max_seconds=1).audio.shape == (1, 8000)
    packets(tmp_path / "pause.mka", "pcm_s16le", [0, 0.1, 2, 2.1])
    clip = read_clip(tmp_path / "pause.mka")
    assert any("hole of 1.8 s" in note for note in clip.notes)
    assert abs(clip.audio.shape[1] - 2.2 * 8000) < 100
    packets(tmp_path / "slow.mkv", "ffv1", [0, 40, 80, 80.04])
    with pytest.raises(MediaError, match=r"gap of 40 s after 0\.0 s"):
        read_clip(tmp_path / "slow.mkv")
    assert len(read_clip(tmp_path / "slow.mkv", max_seconds=1, fps=25).frames) == 25


def test_an_hour_of_silence_is_never_built(tmp_path: Path) -> None:
    packets(tmp_path / "hour.mka", "pcm_s16le", [0, 0.1, 3500, 3500.1])
    tracemalloc.start()
    for read in (read_clip, read_sound):
        with pytest.raises(MediaError, match=r"lasts 3500 s|hole of"):
            read(tmp_path / "hour.mka")
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_long_sounds_are_refused_by_their_header_and_read_in_part(tmp_path: Path) -> None:
    write_wave(tmp_path / "long.wav", np.zeros((1, 700_000)), rate=1000)
    with pytest.raises(MediaError, match="lasts 700 s; at most 600 s") as caught:
        read_clip(tmp_path / "long.wav")
    assert "max_seconds" in str(caught.value)
    assert read_clip(tmp_path / "long.wav", max_seconds=2).audio.shape == (1, 2000)
    assert len(read_sound(tmp_path / "long.wav")[0]) == 700_000


PROGRAMS = {
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nbase.mp4\n",
    "list.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nbase.mp4\n",
    "list.wav": "ffconcat version 1.0\nfile 'base.mp4'\n",
    "list.mov": "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'></MPD>",
    "net.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
    "loop.png": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n{} loop\n",
    "pic.mp4": "<svg xmlns='http://www.w3.org/2000/svg'><image href='base.png'/></svg>",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_nothing_but_the_file_itself_is_opened(tmp_path: Path, monkeypatch, name: str) -> None:
    write_clip(tmp_path / "base.mp4", pictures(0.2), 25, tone(0.2), RATE)
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(PROGRAMS[name])
    for read in (read_clip, probe, lambda path: list(walk_pictures(path))):
        with pytest.raises(MediaError, match=f"path={name}: cannot be read") as caught:
            read(name)
        assert "\n" not in str(caught.value)


def test_names_are_no_protocols(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pipe:0", "http:x.wav", "concat:a|b.wav", "-i.wav", "12:30.wav"):
        if name.endswith(".wav"):
            write_wav(name, tone(0.2), RATE)
            assert read_clip(name).audio.shape[1] == round(0.2 * RATE)
        else:
            with pytest.raises(MediaError, match="no such file"):
                read_clip(name)


def test_tags_are_shown_cut(tmp_path: Path) -> None:
    """A tag that starts like ours and nests deep, or is long, or holds another kind of JSON."""
    for facts in ("[" * 60_000, '{"a": ' * 5000, "[[1, 2]]", "3", "x" * 5000):
        write_clip(tmp_path / "a.mkv", pictures(0.2), 25)
        with (
            av.open(str(tmp_path / "a.mkv")) as source,
            av.open(str(tmp_path / "b.mkv"), "w") as out,
        ):
            out.metadata["comment"] = f"{NOTICE} {facts}"
            stream = out.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    out.mux(packet)
        told = describe_file(tmp_path / "b.mkv", as_json=False)
        assert NOTICE in told and max(map(len, told.splitlines())) < LONGEST_TAG + 60
        assert all(isinstance(key, str) for key in probe(tmp_path / "b.mkv").metadata)
