"""Make samples/gallery: a clip in each of the eight languages and an event, seeds 0, 1, 2..., none
chosen; and a sheet of 24 held-out prompts, evenly taken from their file, each with the seed that
the file gives it.

    python samples/gallery.py [--folder samples/gallery] [--model FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from avdiff import PRESENTER, AVDiffPipeline, write_clip
from avdiff.data.heldout import load_prompts
from avdiff.media.write import spectrogram_picture
from avdiff.pipelines.output import AVPipelineOutput

PROMPTS = {
    "en": 'A woman with red hair and glasses says "good morning, two apples please"',
    "es": 'A man with a beard says "buenos días, tres manzanas por favor"',
    "fr": 'A woman with black hair says "bonjour, deux pommes s\'il vous plaît"',
    "hi": 'A man in a blue shirt says "नमस्ते, दो सेब दीजिए"',
    "it": 'A woman with blonde hair says "buongiorno, due mele per favore"',
    "ja": 'A man with glasses says "おはようございます"',
    "pt": 'A woman with brown hair says "bom dia, duas maçãs por favor"',
    "zh": 'A man with grey hair says "早上好，请给我两个苹果"',
    "event": "a metal ball bounces three times on a wooden floor",
}
SHOWN, HELD_OUT = 8, 24  # frames of each clip on a sheet; held-out clips


def strip(out: AVPipelineOutput) -> np.ndarray:
    """(128, 1280, 3): frames of a clip, evenly taken, and its spectrogram."""
    frames = [np.asarray(frame) for frame in out.frames[0]]
    shown = [frames[i] for i in np.linspace(0, len(frames) - 1, SHOWN).astype(int)]
    heard = spectrogram_picture(out.audio[0], out.sampling_rate).convert("RGB").resize((256, 128))
    return np.concatenate([*shown, np.asarray(heard)], axis=1)


def main() -> None:
    """Write one mp4 for each prompt and one sheet with frames and spectrograms."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "gallery")
    parser.add_argument("--model", default=PRESENTER)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    pipe = AVDiffPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for seed, (name, prompt) in enumerate(PROMPTS.items()):
        language = None if name == "event" else name
        out = pipe(prompt, language=language, generator=torch.Generator().manual_seed(seed))
        write_clip(
            args.folder / f"{name}.mp4",
            out.frames[0],
            out.frame_rate,
            out.audio[0],
            out.sampling_rate,
            {"prompt": prompt, "model": "presenter", "seed": seed},
        )
        rows.append(strip(out))
        print(f"{name}: {len(out.frames[0])} frames")
    Image.fromarray(np.concatenate(rows)).save(args.folder / "sheet.jpg", quality=88)
    rows, prompts = [], load_prompts()
    for prompt in [
        prompts[round(i * (len(prompts) - 1) / (HELD_OUT - 1))] for i in range(HELD_OUT)
    ]:
        language = prompt.language if prompt.text else None
        out = pipe(
            prompt.prompt,
            language=language,
            generator=torch.Generator().manual_seed(prompt.seed),
            seconds=None if prompt.text else prompt.seconds,
        )
        rows.append(strip(out))
        print(f"{prompt.id}: {prompt.prompt}")
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((sheet.width * 3 // 4, sheet.height * 3 // 4)).save(
        args.folder / "heldout.jpg", quality=85
    )


if __name__ == "__main__":
    main()
