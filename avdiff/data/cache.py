"""Latents computed once: a folder of safetensors shards that training reads instead of pictures and
sound.

A cache carries the fingerprint of all that made it (codecs, clock, source and its options). Another
fingerprint is a named error, never a silent mixture. A shard's table is written last and vouches
for its tensors: a broken run goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, TypedDict

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset

from avdiff.clip import ClipSpec, Clock
from avdiff.corpus.captions import parse_prompt
from avdiff.corpus.sample import ClipSample
from avdiff.latents import MODALITIES, normalize_latents, pack_audio, pack_video
from avdiff.media.container import MediaError
from avdiff.phonetics.phone import Phone
from avdiff.pixels import to_model

SHARD = 64  # samples in a file: about 1.5 MB for the presenter
FORMAT = 1


class Source(Protocol):
    """Anything that gives clips by number, such as `PresenterCorpus`."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> ClipSample: ...


class CachedClip(TypedDict, total=False):
    """An item of a cache: what its table says, and its tensors; a key is absent where there is
    nothing.

    Args:
        video: (N_v, C_v), audio: (N_a, C_a) fp32 latent tokens, normalized. text: (L, D) features
            of each caption.
        index: number in its source. modalities: names of its latents. num_frames, height, width,
            fps (as text) and sample_rate: size on the clock. The rest is as in `ClipSample`.
    """

    video: torch.Tensor
    audio: torch.Tensor
    text: list[torch.Tensor]
    phones: tuple[Phone, ...]
    index: int
    name: str
    split: str
    kind: str
    caption: str
    captions: list[str]
    language: str
    contacts: Sequence[float]
    attributes: dict[str, str]
    modalities: list[str]
    num_frames: int
    height: int
    width: int
    fps: str
    sample_rate: int
    refused: str


@dataclass(frozen=True)
class Codecs:
    """The frozen networks that turn a clip into packed, normalized latents and, with `text`,
    captions into features.
    """

    vae: Any
    audio_vae: Any
    patch: int = 2
    text: CaptionFeatures | None = None

    @torch.no_grad()
    def encode(
        self, video: torch.Tensor | None, audio: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """video (B, F, H, W, 3) uint8, audio (B, C, S) -> {"video": (B, N_v, C_v), "audio": (B,
        N_a, C_a)} fp16.
        """
        out = {}
        if video is not None:
            x = to_model(video.permute(0, 4, 1, 2, 3))
            z = self.vae.encode(x.to(self.vae.dtype)).latent_dist.mode().float()
            out["video"] = pack_video(normalize_latents(z, self.vae), self.patch).half()
        if audio is not None:
            z = self.audio_vae.encode(self.audio_vae.mel(audio)).latent_dist.mode().float()
            out["audio"] = pack_audio(normalize_latents(z, self.audio_vae)).half()
        return out

    def fingerprint(self) -> dict[str, str]:
        """Hash of each codec's weights and statistics; `text_encoder` where captions are encoded
        too.
        """
        made_by = {"vae": weights_hash(self.vae), "audio_vae": weights_hash(self.audio_vae)}
        return (
            made_by if self.text is None else {**made_by, "text_encoder": self.text.fingerprint()}
        )


@dataclass(frozen=True)
class CaptionFeatures:
    """A frozen text encoder with its tokenizer: for training that does not change it."""

    encoder: Any
    tokenizer: Any

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[torch.Tensor]:
        """Descriptions, without the spoken words in quotes -> fp16 features (L, dim) each; L may be
        0.
        """
        found = []
        for caption in captions:
            description = parse_prompt(caption)[0]
            length = self.encoder.config.max_length
            ids = self.tokenizer(
                description, truncation=True, max_length=length, return_tensors="pt"
            )["input_ids"]
            found.append(
                self.encoder(ids.long(), torch.ones_like(ids))[0].half()
                if ids.shape[1]
                else torch.zeros(0, self.encoder.config.dim, dtype=torch.float16)
            )
        return found

    def fingerprint(self) -> str:
        """Hash of the encoder's weights and the tokenizer's vocabulary."""
        words = hashlib.sha256(
            json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode()
        ).hexdigest()
        return f"{weights_hash(self.encoder)}-{words[:8]}"


def load_codecs(model: str | os.PathLike[str], text: bool = False) -> Codecs:
    """The codecs of a model folder: `vae/` and `audio_vae/`; with `text` also `text_encoder/` and
    `tokenizer/`.

    Raises:
        ValueError: they are not there.
    """
    from avdiff.models.codecs.audio_vae import AVAudioVAE
    from avdiff.models.codecs.video_vae import AVVideoVAE
    from avdiff.models.text_encoder import CaptionEncoder

    folder = Path(model)
    features = None
    for part in ("vae", "audio_vae", *(("text_encoder",) if text else ())):
        if not (folder / part / "config.json").is_file():
            raise ValueError(f"codecs={str(model)!r}: has no {part}/ with a config.json in it")
    if text:
        from transformers import AutoTokenizer

        features = CaptionFeatures(
            CaptionEncoder.from_pretrained(folder / "text_encoder").eval(),
            AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False),
        )
    return Codecs(
        AVVideoVAE.from_pretrained(folder / "vae").eval(),
        AVAudioVAE.from_pretrained(folder / "audio_vae").eval(),
        text=features,
    )


def weights_hash(module: torch.nn.Module) -> str:
    """First 16 hex digits of the SHA-256 over names and fp32 values of all weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_cache(
    source: Source,
    codecs: Codecs,
    folder: str | os.PathLike[str],
    options: dict[str, Any],
    rank: int = 0,
    ranks: int = 1,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Path:
    """Encode every clip of `source` into `folder`; finished shards are kept, so a second call goes
    on.

    Args:
        options: what else decides the content (source name, seed, split, clip length...): part of
            the fingerprint.
        rank, ranks: this process encodes every `ranks`-th shard.

    Raises:
        ValueError: the folder holds a cache with another fingerprint.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made_by = {"format": FORMAT, **codecs.fingerprint(), "count": len(source), **options}
    _claim(folder, made_by)
    shards = range(rank, -(-len(source) // SHARD), ranks)
    for number in progress(shards):
        table = folder / f"shard-{number:05d}.json"
        if table.is_file():
            continue
        tensors: dict[str, torch.Tensor] = {}
        records = []
        for index in range(number * SHARD, min((number + 1) * SHARD, len(source))):
            try:
                sample = source[index]
            except MediaError as error:
                # a real clip that broke after all: named in the table, never given to training
                records.append({"index": index, "refused": str(error)})
                continue
            tensor, record = _encode_one(sample, codecs)
            tensors |= {f"{index}/{name}": value for name, value in tensor.items()}
            records.append({"index": index, **record})
        temporary_path = folder / f".{table.stem}.{os.getpid()}"
        save_file(tensors, temporary_path)
        os.replace(temporary_path, table.with_suffix(".safetensors"))
        temporary_path.write_text(json.dumps(records, ensure_ascii=False))
        os.replace(temporary_path, table)
    return folder


def cache_presenters(
    folder: str | os.PathLike[str],
    model: str | os.PathLike[str] | Codecs,
    count: int,
    bank: str | None = None,
    split: str = "train",
    seed: int = 0,
    seconds: float = 2.52,
    languages: Sequence[str] | None = None,
    event_share: float = 0.2,
    stills: bool = False,
    full_captions: float = 0.0,
    rank: int = 0,
    ranks: int = 1,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    attribute_lists: float = 0.0,
    names: float = 0.0,
) -> Path:
    """Draw `count` clips of the presenter corpus and cache their latents.

    Args:
        model: folder with `vae/` and `audio_vae/` inside, or what was loaded from it. bank: folder
            of the speech bank, None for the default one. seconds: length of every clip. stills: one
            picture of each clip, without sound. The other arguments are those of `PresenterCorpus`
            and `write_cache`.
    """
    from avdiff.corpus.dataset import PresenterCorpus
    from avdiff.corpus.speech.read import SpeechCorpus

    codecs = model if isinstance(model, Codecs) else load_codecs(model)
    speech = SpeechCorpus(bank, decoded=True)
    corpus = PresenterCorpus(
        speech,
        split,
        languages,
        count,
        seed,
        seconds=seconds,
        event_share=event_share,
        still=stills,
        full_captions=full_captions,
        attribute_lists=attribute_lists,
        names=names,
    )
    options = {
        "source": "presenters",
        "bank": speech.fingerprint,
        "split": split,
        "seed": seed,
        "seconds": seconds,
        "languages": list(languages or ()),
        "event_share": event_share,
        **({"stills": True} if stills else {}),
        **({"full_captions": full_captions} if full_captions else {}),
        **({"attribute_lists": attribute_lists} if attribute_lists else {}),
        **({"names": names} if names else {}),
    }
    return write_cache(corpus, codecs, folder, options, rank, ranks, progress)


def _claim(folder: Path, made_by: dict[str, Any]) -> None:
    """Write the cache's fingerprint, or compare it with the one that is there."""
    manifest = folder / "cache.json"
    if not manifest.is_file():
        temporary_path = folder / f".cache.{os.getpid()}"
        temporary_path.write_text(json.dumps(made_by, indent=1, sort_keys=True))
        os.replace(temporary_path, manifest)
    check_fingerprint(folder, made_by)


def check_fingerprint(folder: Path, expected: dict[str, Any]) -> None:
    """Raise a ValueError that names what differs between a cache and what is expected of it."""
    held = json.loads((folder / "cache.json").read_text())
    wrong = {k: (held.get(k), v) for k, v in expected.items() if held.get(k) != v}
    if wrong:
        told = "; ".join(f"{k} is {a!r}, now {b!r}" for k, (a, b) in wrong.items())
        raise ValueError(
            f"cache {folder} was made by something else ({told}): delete it or choose another "
            "folder"
        )


def _encode_one(
    sample: ClipSample, codecs: Codecs
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """One clip -> its tensors and its JSON-able record."""
    video = sample.get("video")
    audio = sample.get("audio")
    encoded = codecs.encode(
        None if video is None else torch.as_tensor(video)[None],
        None if audio is None else torch.as_tensor(audio)[None],
    )
    tensors = {name: value[0].contiguous() for name, value in encoded.items()}
    modalities = list(tensors)
    if codecs.text is not None:
        features = codecs.text.encode(sample.get("captions") or [sample.get("caption", "")])
        tensors |= {f"text/{number}": value for number, value in enumerate(features)}
    keep = (
        "name",
        "caption",
        "captions",
        "language",
        "kind",
        "attributes",
        "contacts",
        "split",
        "sample_rate",
    )
    record = {k: sample[k] for k in keep if k in sample}
    record |= {"phones": [list(p) for p in sample.get("phones", ())], "fps": str(sample["fps"])}
    record["modalities"] = modalities
    if (
        video is None and audio is not None
    ):  # sound alone: a clip of its length with the smallest picture
        frames = round(audio.shape[-1] / sample["sample_rate"] * float(sample["fps"]))
        record |= {"num_frames": frames, "height": 64, "width": 64}
    if video is not None:
        record |= {
            "num_frames": int(video.shape[0]),
            "height": int(video.shape[1]),
            "width": int(video.shape[2]),
        }
    return tensors, record


def _clock_of(held: Mapping[str, Any]) -> Clock:
    """Strides of the codecs that made a cache; ours where it says nothing."""
    told = held.get("clock")
    if told is None:
        return Clock()
    return Clock(**{**told, "shared_rate": Fraction(told["shared_rate"])})


class LatentCache(Dataset):
    """Reads one or more caches. Items: the record's fields, `phones` as Phone tuples, `video` and
    `audio` tokens fp32; where `text_encoder` (the hash of what made them) is not None, also `text`:
    the features (L, dim) of each caption.

    Args:
        folders: made by `write_cache`; all must come from the same codecs.
        expect: fingerprint entries that must match, such as `Codecs.fingerprint()`.

    Raises:
        ValueError: no cache there, unfinished, or a fingerprint that differs.
    """

    def __init__(
        self, folders: Sequence[str | os.PathLike[str]], expect: dict[str, Any] | None = None
    ) -> None:
        self.items: list[tuple[Path, CachedClip]] = []
        self.clock = Clock()
        codecs: dict[str, Any] = dict(expect or {})
        self.refused: list[str] = []
        for folder in map(Path, folders):
            if not (folder / "cache.json").is_file():
                raise ValueError(
                    f"cache {folder}: no cache.json in it; make one with `avdiff data cache`"
                )
            check_fingerprint(folder, codecs)  # the codecs of the first cache bind the others
            held = json.loads((folder / "cache.json").read_text())
            bound = ("vae", "audio_vae", "text_encoder", "clock")
            codecs |= {k: held.get(k) for k in bound}
            self.clock = _clock_of(held)
            found = 0
            for table in sorted(folder.glob("shard-*.json")):
                records = json.loads(table.read_text())
                found += len(records)
                self.refused += [r["refused"] for r in records if "refused" in r]
                self.items += [
                    (table.with_suffix(".safetensors"), r) for r in records if "refused" not in r
                ]
            if found != held["count"]:
                raise ValueError(
                    f"cache {folder} holds {found} of {held['count']} clips: run `avdiff data "
                    "cache` again to finish it"
                )
        self.text_encoder: str | None = codecs.get("text_encoder")
        self._open: dict[Path, Any] = {}
        self._names: dict[Path, set[str]] = {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> CachedClip:
        path, record = self.items[index]
        shard = self._shard(path)
        name = record["index"]
        tensors = {m: shard.get_tensor(f"{name}/{m}").float() for m in self.modalities(index)}
        count = len(record.get("captions") or [""]) if self.text_encoder else 0
        if count:
            tensors["text"] = [
                shard.get_tensor(f"{name}/text/{number}").float() for number in range(count)
            ]
        return {**record, **tensors, "phones": tuple(Phone(*p) for p in record["phones"])}

    def _shard(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
            self._names[path] = set(self._open[path].keys())
        return self._open[path]

    def modalities(self, index: int) -> tuple[str, ...]:
        """Which tensors a clip has, from its shard's header."""
        path, record = self.items[index]
        self._shard(path)
        return tuple(m for m in MODALITIES if f"{record['index']}/{m}" in self._names[path])

    def clip(self, index: int) -> ClipSpec:
        """Size and length of a clip on the clock."""
        _, r = self.items[index]
        size = (r["num_frames"], r["fps"], r["height"], r["width"])
        return ClipSpec(*size, r["sample_rate"], self.clock)

    def __getstate__(self) -> dict[str, Any]:
        """Open files do not travel to worker processes."""
        return {**self.__dict__, "_open": {}}
