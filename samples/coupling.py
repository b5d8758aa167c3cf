"""The coupling test of a model: does it need its links between sound and picture for lips to fit?

    python samples/coupling.py [--model FOLDER] [--folder runs/coupling] [--limit 40] [--steps 16]

Four arms with the same prompts and seeds: as it is used; without guidance (`whole`); without guidance and with both
cross-attention directions and the shared stream cut (`cut`); and the whole arm's pictures with each other's sound.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from avdiff import PRESENTER, AVDiffPipeline
from avdiff.data.heldout import FILE, load_prompts
from avdiff.evaluation import suite
from avdiff.evaluation.coupling import Coupling, measure_arms, print_couplings
from avdiff.guidance import Guidance
from avdiff.latents import Joint
from avdiff.pipelines.batch import generate_prompts

#: cross-modal scale 0 is the isolated estimate alone: c + (0 - 1)(c - i) = i
ARMS: dict[str, Guidance | None] = {"as used": None, "whole": Guidance(), "cut": Guidance(cross=Joint(0.0, 0.0))}


def main(arguments: Iterable[str] | None = None) -> list[Coupling]:
    """Generate the arms, measure them, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(PRESENTER), help="pipeline folder")
    parser.add_argument("--folder", type=Path, default=Path("runs/coupling"))
    parser.add_argument("--prompts", default=str(FILE))
    parser.add_argument("--limit", type=int, default=40, help="speaking prompts, spread over the file")
    parser.add_argument("--steps", type=int, help="denoising steps; default is the pipeline's")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--judges", help="folder with other judges than the bundled ones")
    args = parser.parse_args(None if arguments is None else list(arguments))
    prompts = [prompt for prompt in load_prompts(args.prompts) if prompt.text]
    prompts = prompts[:: max(1, len(prompts) // args.limit)][: args.limit]
    judges = suite.Judges.from_folder(args.judges) if args.judges else suite.Judges.bundled()
    pipe = AVDiffPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    folders = {}
    for name, guidance in ARMS.items():
        folders[name] = args.folder / name.replace(" ", "-")
        options = {"guidance": guidance, "num_inference_steps": args.steps}
        options = {key: value for key, value in options.items() if value is not None}
        generate_prompts(pipe, prompts, folders[name], 1, args.batch, **options)
        print(f"{name}: {len(prompts)} clips in {folders[name]}")
    found = measure_arms(folders, judges)
    print_couplings(found)
    return found


if __name__ == "__main__":
    main()
