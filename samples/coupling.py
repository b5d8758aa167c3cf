"""The coupling test of a model: does it need its links between sound and picture for lips to fit?

    python samples/coupling.py [--model FOLDER] [--folder runs/coupling] [--limit 40] [--steps 16]

Arms with the same prompts and seeds: as it is used; without guidance (`whole`); without guidance
and with both cross-attention directions and the shared stream cut (`cut`); the whole arm's pictures
with each other's sound; and two cascades of the same model, which make one modality alone and the
other one to it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from avdiff import PRESENTER, AVDiffPipeline, write_clip
from avdiff.data.heldout import FILE, Prompt, load_prompts
from avdiff.evaluation import suite
from avdiff.evaluation.coupling import Coupling, measure_arms, print_couplings
from avdiff.guidance import Guidance
from avdiff.latents import Joint
from avdiff.pipelines.generate_prompts import clip_path, generate_prompts

#: cross-modal scale 0 is the isolated estimate alone: c + (0 - 1)(c - i) = i
ARMS: dict[str, Guidance | None] = {
    "as used": None,
    "whole": Guidance(),
    "cut": Guidance(cross=Joint(0.0, 0.0)),
}


def cascade(
    pipe: AVDiffPipeline, prompts: list[Prompt], folder: Path, first: str, **options: Any
) -> None:
    """Clips whose sound ("audio") or picture ("video") was made alone, and the rest to it, with the
    same prompt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for prompt in prompts:
        path = clip_path(folder, prompt, 0)
        if path.is_file():
            continue
        call: dict[str, Any] = {"language": prompt.language, "output_type": "pt", **options}
        other = "video" if first == "audio" else "audio"
        alone = pipe(
            prompt.prompt,
            generator=torch.Generator().manual_seed(prompt.seed),
            **call,
            **{f"generate_{other}": False},
        )
        given = (
            {"audio": alone.audio}
            if first == "audio"
            else {"video": alone.frames.transpose(1, 2) * 2 - 1}
        )
        out = pipe(
            prompt.prompt, generator=torch.Generator().manual_seed(prompt.seed + 1), **call, **given
        )
        frames = (out.frames[0].permute(0, 2, 3, 1) * 255).round().clamp(0, 255).byte().numpy()
        write_clip(path, frames, out.frame_rate, out.audio[0], out.sampling_rate)


def main(arguments: Iterable[str] | None = None) -> list[Coupling]:
    """Generate the arms, measure them, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(PRESENTER), help="pipeline folder")
    parser.add_argument("--folder", type=Path, default=Path("runs/coupling"))
    parser.add_argument("--prompts", default=str(FILE))
    parser.add_argument(
        "--limit", type=int, default=40, help="speaking prompts, spread over the file"
    )
    parser.add_argument("--steps", type=int, help="denoising steps; default is the pipeline's")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--evaluators", help="folder with other evaluators than the bundled ones")
    args = parser.parse_args(None if arguments is None else list(arguments))
    prompts = [prompt for prompt in load_prompts(args.prompts) if prompt.text]
    prompts = prompts[:: max(1, len(prompts) // args.limit)][: args.limit]
    evaluators = (
        suite.Evaluators.from_folder(args.evaluators)
        if args.evaluators
        else suite.Evaluators.bundled()
    )
    pipe = AVDiffPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    folders = {}
    for name, guidance in ARMS.items():
        folders[name] = args.folder / name.replace(" ", "-")
        options = {"guidance": guidance, "num_inference_steps": args.steps}
        options = {key: value for key, value in options.items() if value is not None}
        generate_prompts(pipe, prompts, folders[name], 1, args.batch, **options)
        print(f"{name}: {len(prompts)} clips in {folders[name]}")
    steps = {} if args.steps is None else {"num_inference_steps": args.steps}
    for name, first in (("sound first", "audio"), ("picture first", "video")):
        folders[name] = args.folder / name.replace(" ", "-")
        cascade(pipe, prompts, folders[name], first, **steps)
        print(f"{name}: {len(prompts)} clips in {folders[name]}")
    found = measure_arms(folders, evaluators)
    print_couplings(found)
    return found


if __name__ == "__main__":
    main()
