"""Rebuild every weight that ships, in order: codecs, evaluators, reader, latents, presenter,
distillation.

    python samples/weights.py --bank BANK --folder runs/weights [--only STAGE...] [--from STAGE]
    [--install] [--list]

BANK is a speech bank (`avdiff data bank` makes one). A stage that has its result is passed over;
one that was stopped goes on. Every stage is a command that can be run alone (`--list` prints them),
the hours are those of one core of a two-core machine. Nothing in `avdiff/bundled` changes before
`--install`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from avdiff.files import BUNDLED, RECIPES


@dataclass(frozen=True)
class Stage:
    """A command, the file that shows that it is done, the core hours it takes, and what it puts
    into the package.
    """

    name: str
    command: list[str]
    done: Path
    hours: float
    ships: dict[str, Path]


def stages(folder: Path, bank: str) -> list[Stage]:
    """All stages, in order."""
    python = [sys.executable, "-m"]
    out = {
        name: folder / name
        for name in (
            "video_vae",
            "video_vae_decoder",
            "audio_vae",
            "vocoder",
            "recognizer",
            "lip_network",
            "face_reader",
            "words",
            "times",
            "contacts",
            "faces",
            "presenter",
            "presenter_fast",
            "presenter_guided",
        )
    }
    codecs, latents = folder / "codecs", folder / "latents"

    def train(module: str, recipe: str, name: str, *more: str) -> list[str]:
        return [
            *python,
            f"avdiff.train.{module}",
            str(RECIPES / f"{recipe}.toml"),
            "--bank",
            bank,
            "--output_dir",
            str(out[name]),
            "--resume_from_checkpoint",
            "latest",
            *more,
        ]

    def final(name: str, part: str) -> Path:
        return out[name] / "final" / part

    def cache(name: str, *more: str) -> Stage:
        command = [
            *python,
            "avdiff",
            "data",
            "cache",
            str(latents / name),
            "--codecs",
            str(codecs),
            "--bank",
            bank,
        ]
        return Stage(f"latents_{name}", [*command, *more], latents / name / "done", 0.25, {})

    def evaluator(name: str, hours: float, *more: str) -> Stage:
        recipe = "phone_recognizer" if name == "recognizer" else name
        return Stage(
            name,
            train("evaluators.train_evaluator", recipe, name, *more),
            final(name, name),
            hours,
            {name: final(name, name)},
        )

    def learn(name: str, recipe: str, hours: float, *more: str) -> Stage:
        command = [
            *python,
            "avdiff.train.finetune",
            str(RECIPES / f"{recipe}.toml"),
            "--validation_data",
            str(latents / "val"),
            "--output_dir",
            str(out[name]),
            "--resume_from_checkpoint",
            "latest",
            *more,
        ]
        ships = {
            part: out[name] / "final" / part
            for part in ("transformer", "text_encoder", "tokenizer", "scheduler")
        }
        return Stage(name, command, out[name] / "final" / "model_index.json", hours, ships)

    return [
        Stage(
            "video_vae",
            train("codecs.train_codec", "video_vae", "video_vae"),
            final("video_vae", "vae"),
            2.5,
            {"vae": final("video_vae", "vae")},
        ),
        Stage(
            "video_vae_decoder",
            train(
                "codecs.train_codec",
                "video_vae_decoder",
                "video_vae_decoder",
                "--start_from",
                str(final("video_vae", "vae")),
            ),
            final("video_vae_decoder", "vae"),
            0.3,
            {"vae": final("video_vae_decoder", "vae")},
        ),
        Stage(
            "audio_vae",
            train("codecs.train_codec", "audio_vae", "audio_vae"),
            final("audio_vae", "audio_vae"),
            0.7,
            {"audio_vae": final("audio_vae", "audio_vae")},
        ),
        Stage(
            "vocoder",
            train(
                "codecs.train_codec",
                "vocoder",
                "vocoder",
                "--audio_vae",
                str(final("audio_vae", "audio_vae")),
            ),
            final("vocoder", "vocoder"),
            1.2,
            {"vocoder": final("vocoder", "vocoder")},
        ),
        Stage("codecs", [], codecs, 0.0, {}),
        evaluator(
            "recognizer",
            0.7,
            "--audio_vae",
            str(codecs / "audio_vae"),
            "--vocoder",
            str(codecs / "vocoder"),
        ),
        evaluator("lip_network", 0.5),
        evaluator("face_reader", 0.5, "--video_vae", str(codecs / "vae")),
        Stage(
            "words",
            [*python, "avdiff.train.g2p.train_g2p", "words", "--output_dir", str(out["words"])],
            final("words", "reader"),
            0.5,
            {"g2p/pronouncer": final("words", "reader")},
        ),
        Stage(
            "times",
            [
                *python,
                "avdiff.train.g2p.train_g2p",
                "times",
                "--bank",
                bank,
                "--output_dir",
                str(out["times"]),
            ],
            final("times", "timer"),
            0.1,
            {"g2p/duration_predictor": final("times", "timer")},
        ),
        Stage(
            "contacts",
            [*python, "avdiff.train.evaluators.contacts", "--output", str(out["contacts"])],
            out["contacts"] / "config.json",
            0.2,
            {"contact_detector": out["contacts"]},
        ),
        cache("faces", "--count", "30000", "--stills", "--seed", "17", "--full-captions", "0.75"),
        cache("event_stills", "--count", "4000", "--stills", "--events", "1", "--seed", "18"),
        cache("events", "--count", "1600", "--events", "1", "--seed", "19"),
        cache("long", "--count", "6000", "--events", "0", "--full-captions", "0.4", "--seed", "20"),
        cache("val", "--count", "128", "--split", "val"),
        learn(
            "faces",
            "presenter_faces",
            0.7,
            "--codecs",
            str(codecs),
            "--train_data",
            str(latents / "faces"),
        ),
        learn(
            "presenter",
            "presenter",
            4.0,
            "--pretrained_model_name_or_path",
            str(out["faces"] / "final"),
            "--train_data",
            ",".join(
                str(latents / n)
                for n in ("long", "long", "events", "events", "faces", "event_stills")
            ),
        ),
        learn(
            "presenter_fast",
            "distill_guidance",
            0.6,
            "--pretrained_model_name_or_path",
            str(out["presenter"] / "final"),
            "--teacher",
            str(out["presenter"] / "final"),
            "--train_data",
            ",".join(str(latents / n) for n in ("long", "events", "faces")),
        ),
        cache(
            "more_faces",
            "--count",
            "40000",
            "--stills",
            "--events",
            "0",
            "--seed",
            "31",
            "--full-captions",
            "0.75",
        ),
        cache("more_event_stills", "--count", "8000", "--stills", "--events", "1", "--seed", "32"),
        cache("more_events", "--count", "5000", "--events", "1", "--seed", "33"),
        cache(
            "more_long",
            "--count",
            "4000",
            "--events",
            "0",
            "--full-captions",
            "0.4",
            "--seed",
            "34",
        ),
        learn(
            "presenter_guided",
            "presenter_guided",
            2.0,
            "--pretrained_model_name_or_path",
            str(out["presenter_fast"] / "final"),
            "--train_data",
            ",".join(
                str(latents / n)
                for n in (
                    "more_long",
                    "more_long",
                    "more_events",
                    "more_events",
                    "more_faces",
                    "more_event_stills",
                )
            ),
        ),
    ]


def finish(stage: Stage, folder: Path) -> None:
    """What a stage needs besides its command."""
    if stage.name == "codecs":
        stage.done.mkdir(parents=True, exist_ok=True)
        for part, source in (
            ("vae", "video_vae_decoder"),
            ("audio_vae", "audio_vae"),
            ("vocoder", "vocoder"),
        ):
            shutil.copytree(folder / source / "final" / part, stage.done / part, dirs_exist_ok=True)
    elif stage.name.startswith("latents_"):
        stage.done.touch()


def install(found: list[Stage]) -> None:
    """Put what is there into the package, each part whole or not at all."""
    for stage in found:
        for part, source in stage.ships.items():
            if not source.is_dir():
                print(f"{part}: not there yet ({source}); the package keeps its own")
                continue
            target = BUNDLED / part
            temporary_path = target.with_name(f".{target.name}.new")
            shutil.rmtree(temporary_path, ignore_errors=True)
            temporary_path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, temporary_path)
            halve(temporary_path)
            for note in ("README.md",):
                if (target / note).is_file():
                    shutil.copy2(target / note, temporary_path / note)
            shutil.rmtree(target, ignore_errors=True)
            temporary_path.rename(target)
            print(f"{part}: {source}")
    recommend(
        [
            stage.done
            for stage in found
            if stage.done.name == "model_index.json" and stage.done.is_file()
        ]
    )


def recommend(indices: list[Path]) -> None:
    """Steps and guidance that the last trained pipeline asks for, into the package's own index."""
    if indices:
        from avdiff.pipelines.pipeline_av import RECOMMENDED

        index, newest = (
            BUNDLED / "model_index.json",
            json.loads(indices[-1].read_text(encoding="utf-8")),
        )
        own = json.loads(index.read_text(encoding="utf-8"))
        own |= {key: newest[key] for key in RECOMMENDED if key in newest}
        temporary_path = index.with_name(".model_index.new")
        temporary_path.write_text(
            json.dumps(own, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        temporary_path.replace(index)


def halve(folder: Path) -> None:
    """Weights to half precision, and no path of the machine that made them in the config."""
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        save_file(
            {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()},
            file,
            {"format": "pt"},
        )
    for file in folder.glob("*.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(config, dict) and "_name_or_path" in config:
            del config["_name_or_path"]
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> int:
    """Run the stages that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--bank", default=None, help="speech bank folder; needed for all but --list"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/weights"))
    parser.add_argument("--only", nargs="*", default=None, metavar="STAGE")
    parser.add_argument("--from", dest="first", default=None, metavar="STAGE")
    parser.add_argument(
        "--install", action="store_true", help="copy what is trained into the package, fp16"
    )
    parser.add_argument(
        "--list", action="store_true", help="print the commands and their hours, and run nothing"
    )
    args = parser.parse_args()
    if args.bank is None and not args.list:
        print(
            "--bank: needs the folder of a speech bank; `avdiff data bank` makes one",
            file=sys.stderr,
        )
        return 2
    plan = stages(args.folder, args.bank or "BANK")
    names = [stage.name for stage in plan]
    for name in [*(args.only or ()), *([args.first] if args.first else [])]:
        if name not in names:
            print(f"{name!r} is no stage: needs one of {', '.join(names)}", file=sys.stderr)
            return 2
    chosen = plan[names.index(args.first) if args.first else 0 :]
    chosen = [s for s in chosen if args.only is None or s.name in args.only]
    if args.list:
        for stage in chosen:
            print(
                f"{stage.name}: {stage.hours:.1f} h\n    {shlex.join(stage.command) or '(copies)'}"
            )
        return 0
    for number, stage in enumerate(chosen):
        left = sum(s.hours for s in chosen[number:] if not s.done.exists())
        if stage.done.exists():
            print(f"{stage.name}: there already ({stage.done})")
            continue
        print(
            f"{stage.name}: about {stage.hours:.1f} h of one core; all that is left {left:.1f} h",
            flush=True,
        )
        began = time.monotonic()
        if stage.command and subprocess.run(stage.command, check=False).returncode:
            print(
                f"{stage.name}: failed; the same call goes on from its last checkpoint",
                file=sys.stderr,
            )
            return 1
        finish(stage, args.folder)
        print(f"{stage.name}: {(time.monotonic() - began) / 3600:.2f} h")
    if args.install:
        install(plan)
    return 0


if __name__ == "__main__":
    sys.exit(main())
