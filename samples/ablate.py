"""What the links and the experts are for: small models that lack one, trained alike and measured
alike.

    python samples/ablate.py --train_data LATENTS --validation_data LATENTS [--folder runs/ablation]
    [--steps 600]

Latents are those of `avdiff data cache` with the embedded codecs. Arms of the coupling:
cross-attention and shared stream ("both"), one of them, none. Arms of the feed-forwards, equal in
active products: dense everywhere, or eight experts of which two are taken, in both branches and the
shared stream. Each is a presenter of half the width and depth, trained with the same rows in the
same order, and measured by held-out loss, phone errors of what it says, lips against the phones
that are heard, and the mouth that true speech drives where no words are told. The experts' shares
are printed as well.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tasks import opening_r

from avdiff import AVDiffPipeline
from avdiff.core.moe import MoE, RoutingStats, load_report
from avdiff.corpus.captions import parse_prompt
from avdiff.corpus.dataset import PresenterCorpus
from avdiff.data.heldout import Prompt, load_prompts
from avdiff.evaluation import suite
from avdiff.pipelines.generate_prompts import generate_prompts
from avdiff.train.finetune import main as train

SMALL = {
    "num_layers": 4,
    "video_dim": 128,
    "audio_dim": 128,
    "video_heads": 2,
    "audio_heads": 2,
    "shared_hidden": 128,
}
DENSE = {"video_hidden": 256, "audio_hidden": 256}
ARMS: dict[str, dict[str, int]] = {
    "both": DENSE,
    "cross only": {**DENSE, "shared_rate": 0},
    "shared only": {**DENSE, "cross_modal": 0},
    "none": {**DENSE, "shared_rate": 0, "cross_modal": 0},
    "dense": {**DENSE, "shared_experts": 0, "shared_hidden": 256},
    "experts": {"video_hidden": 128, "audio_hidden": 128, "video_experts": 8, "audio_experts": 8},
}


def fit_arm(name: str, args: argparse.Namespace, seed: int) -> tuple[Path, dict[str, float]]:
    """Train an arm -> its pipeline folder and held-out losses; one that is finished is not trained
    again.
    """
    folder = args.folder / f"{name.replace(' ', '-')}-{seed}"
    kept = folder / "held_out.json"
    if not kept.is_file():
        changes = ", ".join(f"{key} = {value}" for key, value in {**SMALL, **ARMS[name]}.items())
        recipe = args.folder / f"{folder.name}.toml"
        args.folder.mkdir(parents=True, exist_ok=True)
        recipe.write_text(
            f'[model]\npreset = "presenter"\ncodecs = "presenter"\npreset_changes = {{ {changes} '
            "}}\n"
            "[objective]\ntasks = { joint = 0.7, a2v = 0.3 }\nshift_video = 6.0\n",
            encoding="utf-8",
        )
        done = train(
            [
                str(recipe),
                "--output_dir",
                str(folder),
                "--train_data",
                args.train_data,
                "--validation_data",
                args.validation_data,
                "--max_train_steps",
                str(args.steps),
                "--train_batch_size",
                "32",
                "--learning_rate",
                "2e-3",
                "--lr_warmup_steps",
                "50",
                "--mixed_precision",
                "auto",
                "--ema_decay",
                "0.99",
                "--seed",
                str(seed),
                "--checkpointing_steps",
                "0",
                "--validation_steps",
                str(args.steps),
                "--validation_items",
                "96",
            ]
        )
        assert done is not None
        kept.write_text(json.dumps(done.metrics), encoding="utf-8")
    return folder / "final", json.loads(kept.read_text(encoding="utf-8"))


def driven_mouth(pipe: AVDiffPipeline, bank: str | None, count: int) -> float:
    """Mean correlation of the opening in the pixels with the true one; held-out speech given, no
    words told.
    """
    found = []
    options: dict[str, Any] = {"seconds": 2.52, "event_share": 0.0, "augment_share": 0.0}
    for seed, clip in enumerate(PresenterCorpus(bank, "test", None, count, 5, **options)):
        description = parse_prompt(clip["caption"])[0] or "a person"
        out = pipe(
            description,
            audio=clip["audio"][None],
            output_type="np",
            generator=torch.Generator().manual_seed(seed),
        )
        found.append(opening_r(out.frames[0], clip["mouth"][:, 0]))
    return float(np.nanmean(found))


def measure_arm(
    pipe: AVDiffPipeline, prompts: list[Prompt], folder: Path, by: suite.Evaluators
) -> dict[str, float]:
    """Phone error rate and lips against heard phones of the prompts' clips."""
    rows = [
        suite.measure_file(path, prompt, by)
        for path, prompt in generate_prompts(pipe, prompts, folder)
    ]
    spoken = [row for row in rows if row.get("phones")]
    lips = [row["mouth_r"] for row in rows if np.isfinite(row.get("mouth_r", np.nan))]
    return {
        "phone errors": sum(row["phone_errors"] for row in spoken)
        / max(1, sum(row["phones"] for row in spoken)),
        "lips, r": float(np.mean(lips)) if lips else float("nan"),
    }


def expert_shares(pipe: AVDiffPipeline, prompts: list[Prompt]) -> dict[str, list[float]]:
    """Share of the slots that each expert got while clips were made, summed over blocks, by stream,
    in per cent.
    """
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    handles = [
        module.register_forward_hook(
            lambda _, __, out, n=name: seen[n.split(".")[2]].append(out[1].detach())
        )
        for name, module in pipe.transformer.named_modules()
        if isinstance(module, MoE)
    ]
    pipe(
        [prompt.prompt for prompt in prompts],
        seconds=4.0,
        output_type="latent",
        language=prompts[0].language,
    )
    for handle in handles:
        handle.remove()
    sums = {name: RoutingStats(torch.stack(parts).sum(0)) for name, parts in seen.items()}
    return {
        name: [round(100 * float(x), 1) for x in load_report(s).share.reshape(-1)]
        for name, s in sums.items()
    }


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--train_data", required=True, help="cache folders of latents, joined by commas"
    )
    parser.add_argument("--validation_data", required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--steps", type=int, default=600, help="of 32 rows each")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument(
        "--prompts", type=int, default=24, help="held-out spoken prompts, spread over the file"
    )
    parser.add_argument(
        "--clips", type=int, default=12, help="held-out speeches that drive a mouth"
    )
    parser.add_argument(
        "--bank", help="speech bank of those speeches; default $AVDIFF_BANK, else the mini-bank"
    )
    args = parser.parse_args()
    spoken = [prompt for prompt in load_prompts() if prompt.text]
    prompts, by = (
        spoken[:: max(1, len(spoken) // args.prompts)][: args.prompts],
        suite.Evaluators.bundled(),
    )
    table: dict[str, list[dict[str, float]]] = defaultdict(list)
    for seed in range(args.seeds):
        for name in args.arms:
            pipeline, losses = fit_arm(name, args, seed)
            pipe = AVDiffPipeline.from_pretrained(pipeline)
            pipe.set_progress_bar_config(disable=True)
            row = {f"held-out {m}": losses[m] for m in ("video", "audio")}
            row |= measure_arm(pipe, prompts, args.folder / f"clips-{pipeline.parent.name}", by)
            row["driven mouth, r"] = driven_mouth(pipe, args.bank, args.clips)
            table[name].append(row)
            print(
                f"{name}, seed {seed}: {', '.join(f'{k} {v:.3f}' for k, v in row.items())}",
                flush=True,
            )
            for stream, shares in expert_shares(
                pipe, [p for p in prompts if p.language == "en"][:4]
            ).items():
                print(f"  experts, {stream}: {' '.join(map(str, shares))} %", flush=True)
    (args.folder / "table.json").write_text(json.dumps(table, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
