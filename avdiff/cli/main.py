"""The command line, the roof of the house: `avdiff generate | info | doctor | train | ...`.

Commands import what they need when they run, so that `avdiff --help` answers at once. Errors of the
user are one line on stderr with exit code 2; `--debug`, anywhere on the line, shows the traceback
instead.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

import avdiff
from avdiff.cli.data import app as data_app
from avdiff.cli.evaluate import app as eval_app

app = typer.Typer(
    help="Joint audio-video diffusion: make clips that speak, train and measure.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# Commands that have a command line of their own, in their own module: name -> (module, help).
PASSED_ON = {
    "train": ("avdiff.train.finetune", "Train or fine-tune by a recipe (see avdiff train --help)."),
    "train-codec": (
        "avdiff.train.codecs.train_codec",
        "Train or fine-tune a codec (see avdiff train-codec --help).",
    ),
    "train-evaluator": (
        "avdiff.train.evaluators.train_evaluator",
        "Train a evaluator: recognizer, face reader or lip network.",
    ),
    "train-reader": ("avdiff.train.g2p.train_g2p", "Train the pronunciation reader."),
}


# ----------------------------------------------------------------------------------------- generate


@dataclass(frozen=True)
class Wish:
    """One clip to make: what a line of a prompts file may say."""

    prompt: str = ""
    output: str | None = None
    seed: int | None = None
    seconds: float | None = None
    language: str | None = None
    negative_prompt: str | None = None
    image: str | None = None
    audio: str | None = None
    video: str | None = None
    last_image: str | None = None
    mask: str | None = None
    retake: str | None = None
    extend: float | None = None

    def check(self, where: str = "") -> Wish:
        """Refuse what has the wrong type or is out of range; `where` names the line of a file."""
        texts = "prompt output language negative_prompt image audio video last_image mask retake"
        for name in texts.split():
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "prompt"):
                raise ValueError(f"{where}{name}={value!r}: needs a text")
        if not self.prompt.strip():
            raise ValueError(f"{where}prompt: is empty, needs a description of the clip")
        for name in ("seconds", "extend"):
            value = getattr(self, name)
            if value is not None and (
                type(value) not in (int, float) or not 0 < value <= 3600
            ):  # also refuses NaN
                raise ValueError(
                    f"{where}{name}={value}: needs a duration above 0 and at most 3600 s"
                )
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 2**63):
            raise ValueError(f"{where}seed={self.seed}: needs a whole number from 0 to 2^63 - 1")
        return self


@dataclass(frozen=True)
class Sampling:
    """How clips are made: the same for all of a call. None leaves the pipeline's own default."""

    height: int | None
    width: int | None
    frame_rate: str | None
    num_inference_steps: int | None
    guidance_scale: float | None
    audio_guidance_scale: float | None
    deflicker_strength: float | None
    generate_video: bool | None
    generate_audio: bool | None
    check_prompt: bool | None = None

    def arguments(self) -> dict[str, Any]:
        """Those that were given, as keyword arguments of the pipeline."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Description; spoken words in double quotes.")
    ] = None,
    output: Annotated[
        str, typer.Option("-o", "--output", help="File (.mp4, .wav), or folder for --prompts.")
    ] = "out.mp4",
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines: prompt and any of output, seed, seconds...")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Folder or hub name of a pipeline; 'presenter' is in the package.")
    ] = "presenter",
    seed: Annotated[
        int | None, typer.Option(help="Same seed, same clip. Drawn and reported if not given.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Length; by default as long as the words take.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", "--num-inference-steps", help="Denoising steps.")
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(
            help="Of the spoken words: en, es, fr, hi, it, ja, pt or zh; found out if not given."
        ),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to lead away from.")] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            "--guidance", "--guidance-scale", help="Text guidance of the picture; 1 is none."
        ),
    ] = None,
    audio_guidance: Annotated[
        float | None,
        typer.Option(
            "--audio-guidance",
            "--audio-guidance-scale",
            help="Text guidance of the sound; 1 is none.",
        ),
    ] = None,
    deflicker_strength: Annotated[
        float | None,
        typer.Option(
            help="Changes of a pixel, of 255, that count as flicker and are averaged away."
        ),
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    fps: Annotated[str | None, typer.Option(help="Frames a second: 25, 29.97, 30000/1001.")] = None,
    image: Annotated[str | None, typer.Option(help="Picture file: the first frame.")] = None,
    audio: Annotated[str | None, typer.Option(help="Sound file that drives the picture.")] = None,
    video: Annotated[
        str | None, typer.Option(help="Film that gets its sound, or is changed as below.")
    ] = None,
    last_image: Annotated[str | None, typer.Option(help="Picture file: the last frame.")] = None,
    extend: Annotated[
        float | None, typer.Option(help="Seconds by which --video is continued.")
    ] = None,
    retake: Annotated[
        str | None, typer.Option(help="START:END, seconds of --video or --audio made anew.")
    ] = None,
    mask: Annotated[
        str | None, typer.Option(help="Picture file: white where --video is made anew.")
    ] = None,
    no_video: Annotated[bool, typer.Option("--no-video", help="Sound alone.")] = False,
    no_audio: Annotated[bool, typer.Option("--no-audio", help="Picture alone.")] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Try a prompt that the model says it cannot follow.")
    ] = False,
    lora: Annotated[
        str | None,
        typer.Option(
            help="Folder of a LoRA that `avdiff train` made; guidance is then 2 unless told."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, mps; the best there is if not given.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each clip.")
    ] = False,
) -> None:
    """Make a clip from a description: `avdiff generate 'A woman says "good morning"' -o
    out.mp4`.
    """
    if (prompt is None) == (prompts is None):
        raise ValueError("needs either a prompt or --prompts FILE")
    given = (image, audio, video, last_image, mask, retake, extend)
    common = Wish(prompt or "", output, seed, seconds, language, negative_prompt, *given)
    wishes = [common.check()] if prompts is None else read_wishes(prompts, common)
    _check_outputs(wishes)
    sampling = Sampling(
        height,
        width,
        fps,
        steps,
        guidance,
        audio_guidance,
        deflicker_strength,
        *(False if left_out else None for left_out in (no_video, no_audio, anyway)),
    )
    pipe = load_pipeline(model, device)
    if lora is not None:
        load_lora(pipe, lora)
    for wish in wishes:
        report = make(pipe, wish, sampling, model)
        print(json.dumps(report, ensure_ascii=False) if as_json else _sentence(report))


def read_wishes(path: Path, common: Wish) -> list[Wish]:
    """A prompts file: one JSON object a line; what a line does not say is taken from the command's
    options.

    Raises:
        ValueError: unreadable file, or a line that is no object, has an unknown key or a wrong
            value.
    """
    if not path.is_file():
        raise ValueError(f"prompts={path}: no such file")
    known = {f.name for f in fields(Wish)}
    folder = Path(common.output or ".")
    wishes = []
    try:
        text = path.read_text(
            encoding="utf-8-sig"
        )  # also without the mark that some editors put in front
    except ValueError as error:
        raise ValueError(f"prompts={path}: needs UTF-8 text ({error})") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}: "
        try:
            told = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}is not JSON ({error})") from error
        if not isinstance(told, dict) or not set(told) <= known:
            raise ValueError(f"{where}needs an object with keys among {', '.join(sorted(known))}")
        wish = replace(common, **{"output": f"{number:04}.mp4", **told}).check(where)
        name = Path(str(wish.output))
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"{where}output={name}: needs a name inside {folder}")
        wishes.append(replace(wish, output=str(folder / name)))
    if not wishes:
        raise ValueError(f"prompts={path}: holds no line")
    if folder.suffix in (".mp4", ".wav") or folder.is_file():
        raise ValueError(f"output={folder}: needs a folder when --prompts is given")
    names = [wish.output for wish in wishes]
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"{path}: output={double} is asked for twice, needs a name of its own for each line"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return wishes


def _check_outputs(wishes: list[Wish]) -> None:
    """Before minutes of work: can the files be written?"""
    for wish in wishes:
        path = Path(str(wish.output))
        if path.suffix.lower() not in (".mp4", ".mov", ".m4a", ".wav"):
            raise ValueError(f"output={path}: needs a name that ends in .mp4, .mov, .m4a or .wav")
        if "\0" in str(path) or path.is_dir() or not path.absolute().parent.is_dir():
            raise ValueError(
                f"output={str(path)!r}: needs a file name, without NUL, in a folder that exists"
            )


def load_pipeline(model: str, device: str | None) -> Any:
    """The pipeline by a preset's name, a folder or a hub name; a model that cannot be loaded is one
    sentence.
    """
    if len(model) > 1000:
        raise ValueError(f"model={model[:40]}...: needs the folder or the hub name of a pipeline")
    folder = Path(avdiff.PRESENTER) if model == "presenter" else Path(model)
    if model == "presenter" and not (folder / "model_index.json").is_file():
        raise ValueError(
            "model=presenter: this copy of avdiff has no weights in it; give --model FOLDER"
        )
    if folder.is_file() or (folder.is_dir() and not (folder / "model_index.json").is_file()):
        raise ValueError(
            f"model={model}: needs the folder of a pipeline, with a model_index.json in it"
        )
    import torch
    from diffusers.utils import logging

    from avdiff.pipelines.pipeline_av import AVDiffPipeline

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        pipe = AVDiffPipeline.from_pretrained(
            str(folder) if folder.is_dir() else model, use_safetensors=True
        )
    except Exception as error:  # whatever a broken or foreign file provokes in the loaders
        said = shorten(str(error).strip() or type(error).__name__, 240)
        raise ValueError(f"model={model}: cannot be loaded ({said})") from error
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
    try:
        if device == "meta":
            raise RuntimeError("it holds no values")
        return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={device}: is not usable here ({str(error).splitlines()[0]})"
        ) from error


def load_lora(pipe: Any, folder: str) -> None:
    """Put a LoRA on the pipeline; one that cannot be loaded is one sentence.

    Guidance that was distilled into the weights is asked for again by default: plain training
    unlearns it.
    """
    from avdiff.pipelines.pipeline_av import RECOMMENDED

    try:
        pipe.load_lora_weights(folder)
    except Exception as error:  # whatever a broken or foreign file provokes in the loaders
        said = shorten(str(error).strip() or type(error).__name__, 240)
        raise ValueError(f"lora={folder}: cannot be loaded ({said})") from error
    again = {
        key: value
        for key, value in RECOMMENDED.items()
        if "guidance" in key and pipe.config[key] <= 1
    }
    pipe.register_to_config(**again)


def make(pipe: Any, wish: Wish, sampling: Sampling, model: str) -> dict[str, Any]:
    """Generate one clip and write it; returns the facts that --json prints."""
    import secrets

    import torch

    from avdiff.cli.generate_inputs import conditioning_from_files, continue_clip
    from avdiff.media.write import write_clip

    seed = secrets.randbits(31) if wish.seed is None else wish.seed
    arguments = sampling.arguments() | {
        "generator": torch.Generator("cpu").manual_seed(seed),
        "negative_prompt": wish.negative_prompt,
        "language": wish.language,
        "seconds": wish.seconds,
    }
    if str(wish.output).lower().endswith((".wav", ".m4a")):
        arguments["generate_video"] = False
    given = conditioning_from_files(pipe, wish, arguments)
    facts = {"model": model, "seed": seed, "prompt": wish.prompt, "avdiff": avdiff.__version__}
    start = time.perf_counter()
    if wish.extend is not None:
        shape = continue_clip(pipe, wish, arguments | given, facts)
    else:
        result = pipe(wish.prompt, output_type="np", **(arguments | given))
        frames = None if result.frames is None else result.frames[0]
        audio = None if result.audio is None else result.audio[0].float().cpu().numpy()
        write_clip(str(wish.output), frames, result.frame_rate, audio, result.sampling_rate, facts)
        shape = {
            "seconds": round(
                float(0 if audio is None else audio.shape[-1] / result.sampling_rate), 3
            )
        }
        if frames is not None:
            shape = {
                "seconds": round(float(len(frames) / result.frame_rate), 3),
                "frames": len(frames),
                "height": frames.shape[1],
                "width": frames.shape[2],
            }
    seconds = time.perf_counter() - start
    return {"output": wish.output, **facts, **shape, "compute_seconds": round(seconds, 2)}


def _sentence(report: dict[str, Any]) -> str:
    return (
        f"{report['output']}: {report['seconds']:.2f} s, seed {report['seed']}, made in "
        f"{report['compute_seconds']} s"
    )


# ---------------------------------------------------------------------------------- info and doctor


@app.command()
def info(
    file: Annotated[
        Path | None, typer.Argument(help="A media file; without one, what is in the package.")
    ] = None,
    presets: Annotated[
        bool, typer.Option("--presets", help="How large the sizes are that can be trained.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What the package holds (networks, licence, training data), the presets' sizes, or what is in
    a media file.
    """
    from avdiff.cli.info import describe_bundled, describe_file, describe_presets

    if file is not None:
        print(describe_file(file, as_json))
    else:
        print(
            describe_presets(as_json)
            if presets
            else describe_bundled(Path(avdiff.PRESENTER), as_json)
        )


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Is everything here that avdiff needs? Exit code 1 if not."""
    from avdiff.cli.info import examine

    text, healthy = examine(Path(avdiff.PRESENTER), as_json)
    print(text)
    raise typer.Exit(0 if healthy else 1)


# ------------------------------------------------------------------------ commands of other modules


def _passed_on(name: str, module: str) -> Callable[[typer.Context], None]:
    def command(context: typer.Context) -> None:
        sys.argv = [f"avdiff {name}", *context.args]  # what argparse shows as the program
        import_module(module).main(context.args)

    return command


app.add_typer(data_app, name="data")
app.add_typer(eval_app, name="eval")
for _name, (_module, _help) in PASSED_ON.items():
    _settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(_name, help=_help, add_help_option=False, context_settings=_settings)(
        _passed_on(_name, _module)
    )


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script: run, and turn the user's errors into one line and exit
    code 2.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        code = app([w for w in words if w != "--debug"], standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        text = (
            error.format_message()
            if isinstance(error, TyperException)
            else str(error) or type(error).__name__
        )
        if not isinstance(error, TyperException | ValueError | OSError):
            text = f"{type(error).__name__}: {text} (a fault of avdiff; --debug shows where)"
        print(f"avdiff: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)
