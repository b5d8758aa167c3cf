"""Fine-tuning by example: clips of a new style, a LoRA, and what it changed, measured. Minutes on
two CPU cores.

    python samples/finetune.py --folder runs/finetune          (or: make finetune)

The clips stand for your own: a folder of mp4 files and a metadata.jsonl with captions that quote
the spoken words. Here they are presenters of the mini-bank as an old film would show them, brown
and dark at the rim, and as an old telephone would sound. Then the three commands that a user would
type, and the same prompts with the same seeds without and with the LoRA: how colourful the picture
is, how much sound is above 4 kHz, and whether the words are still understood.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torchaudio.functional import bandpass_biquad

from avdiff import PRESENTER, AVDiffPipeline, write_clip
from avdiff.cli import main as cli
from avdiff.corpus.captions import parse_prompt
from avdiff.corpus.dataset import PresenterCorpus
from avdiff.evaluators.load import phone_error_rate, recognise, spoken_symbols
from avdiff.files import RECIPES
from avdiff.g2p.pronounce import read
from avdiff.media.write import read_clip

STYLE = "An old film"
WORDS = (
    "one two three four five",
    "good morning, my friend",
    "the train is late again",
    "where is the red book?",
)
WHO = (
    "a woman with blond hair",
    "a man with a beard",
    "a woman in a green sweater",
    "a man with glasses",
)


def old_film(frames: np.ndarray) -> np.ndarray:
    """(F, H, W, 3) uint8 -> the same in brown, darker at the rim."""
    grey = frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in grey.shape[1:])
    rim = 1 - 0.45 * np.clip(y[:, None] ** 2 + x**2 - 0.5, 0, 1)
    return (
        (grey[..., None] * rim[..., None] * np.array([1.0, 0.85, 0.62], np.float32))
        .clip(0, 255)
        .astype(np.uint8)
    )


def telephone(sound: torch.Tensor, rate: int) -> torch.Tensor:
    """(C, S) -> only 300 to 3,000 Hz of it."""
    for _ in range(3):
        sound = bandpass_biquad(sound, rate, 950.0, 0.5)
    return (sound / sound.abs().max().clamp(min=1e-3) * 0.7).clamp(-1, 1)


def make_clips(folder: Path, count: int) -> None:
    """The user's folder: clips and metadata.jsonl."""
    folder.mkdir(parents=True)
    corpus = PresenterCorpus(
        None, "train", length=count, seed=11, seconds=(2.1, 3.0), event_share=0, augment_share=0
    )
    lines = []
    for index, clip in enumerate(corpus):
        sound = telephone(clip["audio"], clip["sample_rate"])
        write_clip(
            folder / f"{index:03}.mp4",
            old_film(clip["video"].numpy()),
            clip["fps"],
            sound,
            clip["sample_rate"],
        )
        caption = next((c for c in clip["captions"] if clip["text"] in c), f'"{clip["text"]}"')
        lines.append(
            {
                "file_name": f"{index:03}.mp4",
                "caption": f"{STYLE}: {caption}",
                "language": clip["language"],
            }
        )
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def summary(clips: list[tuple[np.ndarray, np.ndarray, int, str, str]]) -> dict[str, float]:
    """Measures of clips: frames (F, H, W, 3), sound (C, S), its rate, words, language."""
    colour, high, pairs = [], [], []
    for frames, sound, rate, words, language in clips:
        mean = frames.mean((0, 1, 2))
        colour.append(np.ptp(mean / np.array([1.0, 0.85, 0.62])) / mean.mean())
        power = np.abs(np.fft.rfft(sound.mean(0))) ** 2
        high.append(power[round(4000 / rate * sound.shape[-1]) :].sum() / power.sum())
        pairs.append((spoken_symbols(read(words, language).phones), recognise(sound, rate)))
    return {
        "distance from brown": float(np.mean(colour)),
        "sound above 4 kHz": float(np.mean(high)),
        "phone error rate": phone_error_rate(pairs),
    }


def speak(pipe: AVDiffPipeline, folder: Path, **options: float) -> dict[str, float]:
    """Clips of the prompts, and their measures. options: of the pipeline's call."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = []
    for seed, (who, words) in enumerate(zip(WHO, WORDS, strict=True)):
        out = pipe(
            f'{STYLE}: {who} says "{words}"',
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            **options,
        )
        frames, sound, rate = out.frames[0], out.audio[0].float().cpu().numpy(), out.sampling_rate
        write_clip(folder / f"{seed}.mp4", frames, out.frame_rate, sound, rate)
        clips.append((frames, sound, rate, words, "en"))
    return summary(clips)


def given(folder: Path, count: int = 16) -> dict[str, float]:
    """The measures of the clips themselves: what a perfect fine-tuning would reach."""
    clips = []
    for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()[:count]:
        told = json.loads(line)
        clip = read_clip(folder / told["file_name"])
        assert clip.frames is not None and clip.audio is not None and clip.sample_rate is not None
        words = parse_prompt(told["caption"])[1] or ""
        clips.append((clip.frames, clip.audio, clip.sample_rate, words, told["language"]))
    return summary(clips)


def main() -> None:
    """Make clips, cache, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/finetune"), help="empty folder for everything"
    )
    parser.add_argument("--model", default=str(PRESENTER), help="pipeline folder to start from")
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--steps", type=int, default=240)
    args = parser.parse_args()
    if args.folder.exists() and any(args.folder.iterdir()):
        raise SystemExit(f"--folder {args.folder}: is not empty; choose another or delete it")
    start, mine = time.time(), args.folder / "clips"
    make_clips(mine, args.clips)
    recipe = RECIPES / "lora.toml"
    for command in (
        ["data", "cache", args.folder / "latents", "--data", mine, "--codecs", args.model],
        [
            "train",
            recipe,
            "--pretrained_model_name_or_path",
            args.model,
            "--train_data",
            args.folder / "latents",
            "--output_dir",
            args.folder / "lora",
            "--max_train_steps",
            args.steps,
        ],
    ):
        words = list(map(str, command))
        print(f"[{time.time() - start:4.0f} s] avdiff {' '.join(words)}", flush=True)
        try:
            cli.main(words)
        except SystemExit as ended:
            if ended.code:
                raise
    pipe = AVDiffPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    before = speak(pipe, args.folder / "before")
    pipe.load_lora_weights(str(args.folder / "lora" / "final"))
    # The package's weights need no guidance because it is distilled into them; plain training
    # unlearns that.
    after = speak(pipe, args.folder / "after", guidance_scale=2.0, audio_guidance_scale=2.0)
    wanted = given(mine)
    print(f"{'':22} {'before':>8} {'after':>8}  the clips")
    for name, value in before.items():
        print(f"{name:22} {value:8.4f} {after[name]:8.4f} {wanted[name]:8.4f}")
    print(f"{time.time() - start:.0f} s; clips in {args.folder}/before and {args.folder}/after")


if __name__ == "__main__":
    main()
