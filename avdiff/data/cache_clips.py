"""Real clips into a latent cache, after a check that names every file that is left out; and a cache
back into files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from avdiff.data.cache import Codecs, LatentCache, load_codecs, write_cache
from avdiff.data.check import check_folder, checked_clips, save_report
from avdiff.data.clip_table import ClipTable, find_clips
from avdiff.data.clips import ClipOptions, RealClips
from avdiff.latents import denormalize_latents, unpack_audio, unpack_video
from avdiff.media.write import write_clip


@dataclass(frozen=True)
class CachedClips:
    """What went into a cache: `names` of the clips, and name -> reason of every clip that did not
    (`refused`) and of every file that is none (`left_out`).
    """

    folder: Path
    names: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def cache_clips(
    folder: str | os.PathLike[str],
    data: str | os.PathLike[str],
    codecs: Codecs,
    options: ClipOptions | None = None,
    rank: int = 0,
    ranks: int = 1,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> CachedClips:
    """Check the clips of the folder `data` and cache the good ones in `folder`; see `write_cache`.

    Raises:
        ValueError: no clip can be used, or the cache was made by something else.
    """
    options = options or ClipOptions()
    table = find_clips(data)
    clips = _checked(table, Path(folder), options)
    made_by = {
        "source": "clips",
        "content": content_hash(table),
        "buckets": options.buckets,
        "fit": options.fit,
        "fps": str(options.fps),
        "allow_silent": options.allow_silent,
        "words": options.words,
    }
    # only where they are given: caches made before these options stay what they are
    sound = {"audio_track": options.audio_track, "audio_channel": options.audio_channel}
    made_by |= {key: value for key, value in sound.items() if value is not None}
    write_cache(clips, codecs, folder, made_by, rank, ranks, progress)
    refused = dict(clips.refused)
    names = [entry.name for entry in clips.entries]
    for path in sorted(Path(folder).glob("shard-*.json")):
        for record in json.loads(path.read_text()):
            if "refused" in record:  # it broke when it was read for good
                refused[names[record["index"]]] = record["refused"]
    kept = [name for name in names if name not in refused]
    return CachedClips(Path(folder), kept, refused, clips.left_out)


def _checked(table: ClipTable, folder: Path, options: ClipOptions) -> RealClips:
    """Good clips; the report of the check is kept beside the cache, so a second call does not
    decode all again.
    """
    which = "".join(f"-{n}" for n in (options.audio_track, options.audio_channel) if n is not None)
    note = folder / f"check-{content_hash(table)}-{int(options.allow_silent)}{which}.json"
    if note.is_file():
        told = {
            clip["name"]: clip["problems"]
            for clip in json.loads(note.read_text(encoding="utf8"))["clips"]
        }
        clips = RealClips(
            table.folder, options, only=[name for name, problems in told.items() if not problems]
        )
        clips.refused |= {name: "; ".join(problems) for name, problems in told.items() if problems}
        return clips
    report = check_folder(
        table.folder,
        options.allow_silent,
        audio_track=options.audio_track,
        audio_channel=options.audio_channel,
    )
    clips = checked_clips(table.folder, options, report)
    folder.mkdir(parents=True, exist_ok=True)
    save_report(report, note)
    return clips


def content_hash(table: ClipTable) -> str:
    """Hash over names, captions and bytes of all clips."""
    digest = hashlib.sha256()
    for entry in table.entries:
        spoken = [entry.extra[key] for key in ("language", "phones") if key in entry.extra]
        digest.update(repr((entry.name, entry.captions, *spoken)).encode())
        files = (entry.video, entry.audio, entry.video_mask, entry.audio_mask)
        for path in (*files, entry.reference_video, entry.reference_audio):
            if path is not None and path.is_file():
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def decode_cache(
    cache: str | os.PathLike[str],
    model: str | os.PathLike[str],
    target: str | os.PathLike[str],
    count: int = 8,
) -> list[Path]:
    """Write back what a cache holds: the first `count` items as mp4 (or wav) files, as the codecs
    render them.

    Raises:
        ValueError: no cache there, or one of other codecs than the model's.
    """
    from avdiff.models.codecs.vocoder import AVVocoder

    codecs = load_codecs(model)
    items = LatentCache([cache], codecs.fingerprint())
    if not (Path(model) / "vocoder" / "config.json").is_file():
        raise ValueError(
            f"codecs={str(model)!r}: has no vocoder/ in it, so sound cannot be written"
        )
    vocoder = AVVocoder.from_pretrained(Path(model) / "vocoder").eval()
    out = Path(target)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for index in range(min(count, len(items))):
        item = items[index]
        clip = items.clip(index)
        frames = None
        sound = None
        if "video" in item:
            z = denormalize_latents(
                unpack_video(item["video"][None], codecs.patch, clip.video_grid), codecs.vae
            )
            frames = (
                codecs.vae.decode(z).sample[0].permute(1, 2, 3, 0).float().clamp(-1, 1) + 1
            ).numpy() / 2
        if "audio" in item:
            packed = unpack_audio(item["audio"][None], codecs.audio_vae.config.latent_channels)
            z = denormalize_latents(packed, codecs.audio_vae)
            sound = vocoder(codecs.audio_vae.decode(z).sample)[0, :, : clip.num_samples].numpy()
        path = out / f"{index:06d}.{'wav' if frames is None else 'mp4'}"
        write_clip(path, frames, None if frames is None else clip.fps, sound, clip.sample_rate)
        written.append(path)
    return written
