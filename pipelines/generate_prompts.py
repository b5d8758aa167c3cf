"""Many prompts to files: batched, each clip with its own seed, and what is already there is not
made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avdiff.clip import ClipSpec
from avdiff.data.heldout import Prompt
from avdiff.g2p.pronounce import read
from avdiff.media.write import Clip, write_clip
from avdiff.pipelines.pipeline_av import AVDiffPipeline

SEED_STEP = 1_000_003  # between two clips of one prompt
SPREAD = 7 / 6  # longest over shortest clip of a batch


def clip_path(folder: Path, prompt: Prompt, seed: int) -> Path:
    """Where the clip of a prompt lies: "en-digits-03-s0.mp4"."""
    return folder / f"{prompt.id}-s{seed}.mp4"


def natural_seconds(prompt: Prompt) -> float:
    """How long the words take, or the prompt's own length where nobody speaks."""
    return read(prompt.text, prompt.language).duration if prompt.text else prompt.seconds


def batches(prompts: Sequence[Prompt], size: int) -> Iterator[tuple[float, list[Prompt]]]:
    """Prompts of one language, or without words, and of like length together, with the length of
    the longest: no clip gets more than a sixth of its length added.

    The batches depend on the list alone, so that a run that is resumed makes the same clips.
    """
    groups: dict[str, list[tuple[float, Prompt]]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.language if prompt.text else "", []).append(
            (natural_seconds(prompt), prompt)
        )
    for members in groups.values():
        members.sort(key=lambda pair: (pair[0], pair[1].id))
        part: list[tuple[float, Prompt]] = []
        for seconds, prompt in members:
            if part and (len(part) == size or seconds > part[0][0] * SPREAD):
                yield part[-1][0], [one for _, one in part]
                part = []
            part.append((seconds, prompt))
        yield part[-1][0], [one for _, one in part]


def generate_prompts(
    pipe: AVDiffPipeline,
    prompts: Sequence[Prompt],
    folder: Path,
    seeds: int = 1,
    batch: int = 8,
    done: Callable[[int], None] | None = None,
    **options: Any,
) -> list[tuple[Path, Prompt]]:
    """Make the clip of every prompt and seed.

    Args:
        folder: for the files. seeds: clips of each prompt. batch: prompts at a time.
        done: called with the number of clips after each batch. options: for the pipeline's call.

    Returns:
        (file, prompt) of every clip, made now or before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made: list[tuple[Path, Prompt]] = []
    for seed in range(seeds):
        for seconds, part in batches(prompts, batch):
            missing = [prompt for prompt in part if not clip_path(folder, prompt, seed).is_file()]
            if missing:
                _generate(pipe, missing, seconds, folder, seed, options)
            made += [(clip_path(folder, prompt, seed), prompt) for prompt in part]
            if done is not None:
                done(len(part))
    return made


def _generate(
    pipe: AVDiffPipeline,
    prompts: Sequence[Prompt],
    seconds: float,
    folder: Path,
    seed: int,
    options: dict[str, Any],
) -> None:
    """One call of the pipeline."""
    numbers = [(prompt.seed + SEED_STEP * seed) % 2**63 for prompt in prompts]
    generators = [torch.Generator().manual_seed(number) for number in numbers]
    language = prompts[0].language if prompts[0].text else None
    # rounded up: the words must fit into the clip to the last sample
    length = round(float(seconds) + 5e-4, 3)
    out = pipe(
        [prompt.prompt for prompt in prompts],
        seconds=length,
        language=language,
        generator=generators,
        output_type="np",
        **options,
    )
    for i, prompt in enumerate(prompts):
        facts = {"prompt": prompt.prompt, "id": prompt.id, "seed": numbers[i]}
        write_clip(
            clip_path(folder, prompt, seed),
            out.frames[i],
            out.frame_rate,
            out.audio[i],
            out.sampling_rate,
            facts,
        )


@torch.no_grad()
def round_trip(pipe: AVDiffPipeline, clip: Clip) -> Clip:
    """A clip through the pipeline's codecs and back, at the same length.

    Args:
        clip: frames that the codec takes (1 + k * stride of them), mono sound at the audio codec's
            rate.
    """
    assert clip.frames is not None and clip.audio is not None and clip.fps is not None
    count, height, width, _ = clip.frames.shape
    spec = ClipSpec(
        count, Fraction(clip.fps), height, width, int(clip.sample_rate or 0), pipe.clock
    )
    pixels = torch.from_numpy(clip.frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    frames = pipe.decode_video(pipe.encode_video(pixels), spec)[0]
    sound = pipe.decode_audio(pipe.encode_audio(torch.from_numpy(clip.audio)[None]), spec)[0]
    shown = ((frames.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    return Clip(np.ascontiguousarray(shown), sound.float().numpy(), clip.fps, clip.sample_rate)
