"""What the audio codecs keep: round trips of held-out sound as a table and a picture.

    python -m avdiff.train.codecs.audio_report --output_dir runs/codec_report

Originals are the ceiling; the control is Griffin-Lim on the same mel. Needs `pystoi`, `pesq` and
`pocketsphinx`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from avdiff.corpus.events.scene import sample_event
from avdiff.corpus.events.sound import event_audio
from avdiff.corpus.speech.read import SpeechCorpus, Utterance
from avdiff.evaluation.metrics.audio import (
    DIGITS,
    DigitReader,
    griffin_lim,
    onset_seconds,
    pesq,
    spectral_distance,
    stoi,
    word_errors,
)
from avdiff.files import BUNDLED
from avdiff.models.codecs.audio_vae import AVAudioVAE
from avdiff.models.codecs.vocoder import AVVocoder

RATE = 24000
NOISES = (0.0, 0.1, 0.15, 0.2, 0.3)  # s.d. added to normalized latents
ORIGINAL = "original"
TRUE = "vocoder"
TRUE_CONTROL = "Griffin-Lim"
DECODED_CONTROL = "VAE + Griffin-Lim"
COLOURS = np.array(
    [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], np.float32
)  # "inferno"

Route = Callable[[Tensor], Tensor]  # sound (1, 1, S) -> sound (1, 1, S)


def routes(vae: AVAudioVAE, vocoder: AVVocoder) -> dict[str, Route]:
    """The ways of a sound through the codecs, by name; lengths are whole tokens."""

    def noisy(level: float) -> Route:
        def run(sound: Tensor) -> Tensor:
            z = vae.normalize(vae.encode(vae.mel(sound)).latent_dist.mode())
            z = z + level * torch.randn(
                z.shape, generator=torch.Generator().manual_seed(sound.shape[-1])
            )
            return vocoder(vae.decode(vae.denormalise(z)).sample)

        return run

    def control(mel: Tensor) -> Tensor:
        return griffin_lim(mel[:, 0], vae.mel_frontend)[:, None]

    ways: dict[str, Route] = {
        ORIGINAL: lambda sound: sound,
        TRUE: lambda sound: vocoder(vae.mel(sound)),
        TRUE_CONTROL: lambda sound: control(vae.mel(sound)),
        DECODED_CONTROL: lambda sound: control(vae(vae.mel(sound)).sample),
    }
    return ways | {f"VAE + vocoder, noise {level:g}": noisy(level) for level in NOISES}


def whole_tokens(sound: np.ndarray, step: int = 960) -> Tensor:
    """(S,) -> (1, 1, S'), cut to whole tokens."""
    return torch.from_numpy(sound[: len(sound) // step * step])[None, None]


@torch.no_grad()
def quality(ways: dict[str, Route], utterances: Sequence[Utterance]) -> dict[str, dict[str, float]]:
    """Means over utterances of STOI, PESQ-wb and multi-resolution spectral distance in dB, by
    route.
    """
    rows: dict[str, list[list[float]]] = {name: [] for name in ways}
    for utterance in utterances:
        sound = whole_tokens(utterance.bank.audio(utterance))
        clean = sound[0, 0].numpy()
        for name, way in ways.items():
            made = way(sound)
            heard = made[0, 0].numpy()
            distance = float(spectral_distance(sound[0], made[0]))
            rows[name].append([stoi(clean, heard), pesq(clean, heard), distance])
    names = ("STOI", "PESQ-wb", "distance dB")
    return {
        way: dict(zip(names, map(float, np.nanmean(table, axis=0)), strict=True))
        for way, table in rows.items()
    }


def digit_strings(bank: str | None, splits: Sequence[str | None]) -> Iterator[Utterance]:
    """English utterances that are strings of digits."""
    for split in splits:
        for utterance in SpeechCorpus(bank, split):
            if utterance.lang == "en" and all(
                word in DIGITS for word in utterance.text.lower().split()
            ):
                yield utterance


@torch.no_grad()
def digit_errors(
    ways: dict[str, Route], utterances: Sequence[Utterance]
) -> dict[str, tuple[int, int]]:
    """Word errors and words of digit strings, by route."""
    reader = DigitReader()
    table = dict.fromkeys(ways, (0, 0))
    for utterance in utterances:
        words = utterance.text.lower().split()
        sound = whole_tokens(utterance.bank.audio(utterance))
        for name, way in ways.items():
            wrong, count = table[name]
            heard = reader.words(way(sound)[0, 0].numpy())
            table[name] = (wrong + word_errors(words, heard), count + len(words))
    return table


@torch.no_grad()
def contact_errors(way: Route, count: int, seed: int = 5) -> np.ndarray:
    """How far (s) the rise of energy moves at impacts of `count` drawn scenes, relative to the
    original's.

    Impacts that the original itself does not show within 5 ms, faint ones in the ring of another,
    are left out.
    """
    off = []
    for k in range(count):
        event = sample_event(np.random.default_rng([seed, k]), 3.0)
        sound = event_audio(event, 3 * RATE, RATE)
        made = way(whole_tokens(sound))[0, 0].numpy()
        for contact in event.contacts:
            if 0.1 < contact < 2.8 and abs(onset_seconds(sound, contact) - contact) <= 0.005:
                off.append(onset_seconds(made, contact) - onset_seconds(sound, contact))
    return np.abs(np.array(off))


@torch.no_grad()
def core_seconds(run: Callable[[], Tensor], seconds: float, repeats: int = 5) -> float:
    """CPU seconds of this process per second of sound; the best of some runs."""
    run()
    spent = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        spent.append(time.process_time() - began)
    return min(spent) / seconds


def cost(vae: AVAudioVAE, vocoder: AVVocoder) -> dict[str, float]:
    """Core-seconds per second of sound, and parameters in millions."""
    sound = torch.randn(1, 1, 4 * RATE, generator=torch.Generator().manual_seed(0)) * 0.05
    with torch.no_grad():
        mel = vae.mel(sound)
        z = vae.encode(mel).latent_dist.mode()
    report = {
        "encode, core-s per s": core_seconds(
            lambda: vae.encode(vae.mel(sound)).latent_dist.mode(), 4
        ),
        "decode, core-s per s": core_seconds(lambda: vae.decode(z).sample, 4),
        "vocoder, core-s per s": core_seconds(lambda: vocoder(mel), 4),
    }
    for name, model in (("audio VAE", vae), ("vocoder", vocoder)):
        report[f"{name}, M parameters"] = sum(p.numel() for p in model.parameters()) / 1e6
    return report


def _coloured(values: np.ndarray) -> np.ndarray:
    """(H, W) in [0, 1] -> uint8 (H, W, 3)."""
    at = np.clip(values, 0, 1) * (len(COLOURS) - 1)
    return np.stack(
        [np.interp(at, np.arange(len(COLOURS)), COLOURS[:, c]) for c in range(3)], axis=-1
    ).astype(np.uint8)


@torch.no_grad()
def picture(
    vae: AVAudioVAE, vocoder: AVVocoder, sounds: Sequence[np.ndarray], seconds: float = 2.0
) -> Image.Image:
    """One row a sound: log spectrogram of original, vocoder on true mel, round trip, and |round
    trip - original|.
    """
    strips = []
    for sound in sounds:
        fixed = np.pad(sound, (0, max(0, round(seconds * RATE) - len(sound))))[
            : round(seconds * RATE)
        ]
        source = whole_tokens(fixed)
        ways = routes(vae, vocoder)
        made = [ways[name](source) for name in (ORIGINAL, TRUE, f"VAE + vocoder, noise {0.0:g}")]
        logs = [
            (vae.mel_frontend.magnitude(x)[0, 0] + 3e-5).log10().numpy() / 4.5 + 1 for x in made
        ]  # 90 dB -> [0, 1]
        panels = [*logs, 2 * np.abs(logs[2] - logs[0])]
        strips.append(
            np.concatenate(
                [np.pad(_coloured(p.T[::-2]), ((0, 6), (0, 6), (0, 0))) for p in panels], axis=1
            )
        )
    return Image.fromarray(np.concatenate(strips))


def markdown(table: dict[str, dict[str, float]], digits: dict[str, tuple[int, int]]) -> str:
    """One row a route."""
    lines = ["| way | STOI | PESQ-wb | distance dB | digit WER |", "|---|---|---|---|---|"]
    for way, row in table.items():
        wrong, words = digits.get(way, (0, 0))
        rate = f"{wrong / words:.3f}" if words else "-"
        lines.append(
            f"| {way} | {row['STOI']:.3f} | {row['PESQ-wb']:.2f} | {row['distance dB']:.2f} | "
            f"{rate} |"
        )
    return "\n".join(lines) + "\n"


def audio_report(
    vae: AVAudioVAE,
    vocoder: AVVocoder,
    bank: str | None,
    output_dir: Path,
    clips: int,
    digits: Sequence[str | None],
    most_digits: int,
) -> str:
    """Write audio.md, audio.json and audio.png; returns the Markdown."""
    output_dir.mkdir(parents=True, exist_ok=True)
    held = [u for split in ("test", "test_voices") for u in SpeechCorpus(bank, split)]
    chosen = [held[int(k)] for k in np.linspace(0, len(held) - 1, min(clips, len(held)))]
    ways = routes(vae, vocoder)
    sounds = [u.bank.audio(u) for u in chosen[:: max(1, len(chosen) // 3)][:3]]
    sounds.append(event_audio(sample_event(np.random.default_rng(3), 3.0), 3 * RATE, RATE))
    temporary_path = output_dir / f".audio.{os.getpid()}.png"
    picture(vae, vocoder, sounds).save(temporary_path)
    os.replace(temporary_path, output_dir / "audio.png")
    table = quality(ways, chosen)
    strings = list(digit_strings(bank, digits))[:most_digits]
    errors = digit_errors({k: w for k, w in ways.items() if "Lim" not in k}, strings)
    late = contact_errors(ways[f"VAE + vocoder, noise {0.0:g}"], 40)
    facts = cost(vae, vocoder) | {
        "contacts": float(len(late)),
        "impact error ms, median": 1000 * float(np.median(late)),
        "impact error ms, 90 %": 1000 * float(np.quantile(late, 0.9)),
    }
    words = next(iter(errors.values()))[1]
    text = (
        f"Held-out sentences and voices, {len(chosen)} clips; digit strings of {words} words "
        f"({', '.join(str(d) for d in digits)})\n\n{markdown(table, errors)}\n"
        + "\n".join(f"- {name}: {value:.4g}" for name, value in facts.items())
        + "\n"
    )
    numbers = json.dumps({"table": table, "digits": errors, **facts}, indent=1)
    for name, content in (("audio.md", text), ("audio.json", numbers)):
        part = output_dir / f".{name}.{os.getpid()}"
        part.write_text(content)
        os.replace(part, output_dir / name)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    bundled = BUNDLED
    parser = argparse.ArgumentParser(
        description="Round trips of the audio codecs on held-out sound."
    )
    parser.add_argument(
        "--audio_vae", default=str(bundled / "audio_vae"), help="folder of a saved AVAudioVAE"
    )
    parser.add_argument(
        "--vocoder", default=str(bundled / "vocoder"), help="folder of a saved AVVocoder"
    )
    parser.add_argument(
        "--bank",
        default=None,
        help="folder of the speech bank; default $AVDIFF_BANK or the mini-bank",
    )
    parser.add_argument("--output_dir", default="runs/codec_report")
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument(
        "--digit_splits",
        nargs="+",
        default=["test", "test_voices", "val"],
        help="splits whose digit strings are recognised; train adds many words",
    )
    parser.add_argument("--digit_strings", type=int, default=10**6, help="at most so many strings")
    options = parser.parse_args(arguments)
    vae = AVAudioVAE.from_pretrained(options.audio_vae).eval()
    vocoder = AVVocoder.from_pretrained(options.vocoder).eval()
    print(
        audio_report(
            vae,
            vocoder,
            options.bank,
            Path(options.output_dir),
            options.clips,
            options.digit_splits,
            options.digit_strings,
        )
    )


if __name__ == "__main__":
    main()
