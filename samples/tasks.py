"""Tasks with something given, measured on the corpus's own held-out clips.

    python samples/tasks.py [--model FOLDER] [--bank BANK] [--clips 20]

Speech drives a face (no words are given), clean and with noise at 10 dB: correlation of the mouth's
opening in the pixels with the corpus's own mouth for this speech. A silent film gets its voice,
words given: phone error rate of it.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from avdiff import PRESENTER, AVDiffPipeline
from avdiff.clip import ClipSpec
from avdiff.corpus.augment import coloured_noise
from avdiff.corpus.captions import parse_prompt
from avdiff.corpus.dataset import PresenterCorpus
from avdiff.evaluators.load import phone_error_rate, read_faces, recognise, spoken_symbols
from avdiff.phonetics.track import track_from_phones
from avdiff.pixels import to_model

SECONDS, RATE = 2.52, 24000


def with_noise(sound: np.ndarray, rng: np.random.Generator, decibels: float = 10.0) -> np.ndarray:
    """(C, S) with coloured noise so many dB below it."""
    level = np.sqrt(np.mean(sound**2)) * 10 ** (-decibels / 20)
    return (
        (sound + level * coloured_noise(rng, sound.shape[-1], RATE)).clip(-1, 1).astype(np.float32)
    )


def opening_r(frames: np.ndarray, truth: np.ndarray) -> float:
    """Correlation of the mouth's opening in frames (F, H, W, 3) in [0, 1] with the true one
    (F,).
    """
    seen = read_faces((frames * 255).astype(np.uint8)).mouth[:, 0]
    length = min(len(seen), len(truth))
    return float(np.corrcoef(seen[:length], truth[:length])[0, 1])


def main() -> None:
    """Generate, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(PRESENTER), help="pipeline folder")
    parser.add_argument("--bank", help="speech bank; default $AVDIFF_BANK, else the mini-bank")
    parser.add_argument("--split", default="test", help="train, val, test or test_voices")
    parser.add_argument("--clips", type=int, default=20)
    args = parser.parse_args()
    pipe = AVDiffPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    options = {"seconds": SECONDS, "event_share": 0.0, "augment_share": 0.0}
    corpus = PresenterCorpus(args.bank, args.split, None, args.clips, 5, **options)
    rng, found, pairs = (
        np.random.default_rng(0),
        {"speech drives": [], "the same, noise at 10 dB": []},
        [],
    )
    for seed, clip in enumerate(corpus):
        description = parse_prompt(clip["caption"])[0] or "a person"
        sound, truth = clip["audio"].numpy(), clip["mouth"][:, 0]
        for name, given in zip(found, (sound, with_noise(sound, rng)), strict=True):
            out = pipe(
                description,
                audio=torch.from_numpy(given)[None],
                output_type="np",
                generator=torch.Generator().manual_seed(seed),
            )
            found[name].append(opening_r(out.frames[0], truth))
        film = to_model(clip["video"]).permute(3, 0, 1, 2)[None]
        track = track_from_phones([clip["phones"]], ClipSpec.from_seconds(SECONDS))
        out = pipe(
            description,
            video=film,
            phoneme_track=track,
            seconds=SECONDS,
            output_type="np",
            generator=torch.Generator().manual_seed(seed),
        )
        pairs.append(
            (
                spoken_symbols(clip["phones"]),
                recognise(out.audio[0].float().numpy(), out.sampling_rate),
            )
        )
    for name, values in found.items():
        print(
            f"{name}: opening r {np.mean(values):.3f} +- "
            f"{np.std(values) / len(values) ** 0.5:.3f} (n {len(values)})"
        )
    print(
        f"a silent film gets its voice: phone error rate {phone_error_rate(pairs):.3f} (n "
        f"{len(pairs)})"
    )


if __name__ == "__main__":
    main()
