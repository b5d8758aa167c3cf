"""`avdiff generate`: a clip from a description, or one clip for each line of a file."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

import typer

import avdiff
from avdiff.cli.terminal import is_unicode

if TYPE_CHECKING:
    from avdiff.pipelines.pipeline_av import AVDiffPipeline

PATHS = ("image", "audio", "video", "last_image", "mask")
TEXTS = ("prompt", "output", "language", "negative_prompt", "retake", *PATHS)
MAX_SECONDS = 3600  # longer clips are made piece by piece, by pipe.stream
SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".m4a", ".wav", ".gif", ".webp", ".apng", ".png")
SOUND_SUFFIXES = (".wav", ".m4a")  # containers that hold no picture
LONGEST_LINE = 1_000_000  # characters of a prompts file; a prompt itself may have far fewer


@dataclass(frozen=True)
class GenerationRequest:
    """One clip to make: what a line of a prompts file may say. None leaves the default."""

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

    def check(self, where: str = "") -> GenerationRequest:
        """Itself, when each value has its type and range.

        Args:
            where: names the line of a file in the error.

        Raises:
            ValueError: names the field, its value and what fits.
        """
        for name in TEXTS:
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "prompt"):
                raise ValueError(f"{where}{name}={_short(value)}: needs a text")
            if value is not None and not is_unicode(value):
                raise ValueError(f"{where}{name}={_short(value)}: is not UTF-8 text")
        if not self.prompt.strip():
            raise ValueError(f"{where}prompt: is empty, needs a description of the clip")
        for name in ("seconds", "extend"):
            value = getattr(self, name)
            # NaN compares false, so it is refused too.
            if value is not None and not (type(value) in (int, float) and 0 < value <= MAX_SECONDS):
                raise ValueError(
                    f"{where}{name}={_short(value)}: needs a duration above 0 and at most "
                    f"{MAX_SECONDS} s"
                )
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 2**63):
            raise ValueError(
                f"{where}seed={_short(self.seed)}: needs a whole number from 0 to 2^63 - 1"
            )
        return self

    @property
    def path(self) -> Path:
        """The file that is written."""
        return Path(str(self.output))


@dataclass(frozen=True)
class Sampling:
    """How clips are made: the same for all of a call. None leaves the pipeline's own default."""

    height: int | None = None
    width: int | None = None
    frame_rate: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    audio_guidance_scale: float | None = None
    deflicker_strength: float | None = None
    generate_video: bool | None = None
    generate_audio: bool | None = None
    check_prompt: bool | None = None

    def arguments(self) -> dict[str, Any]:
        """Those that were given, as keyword arguments of the pipeline."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class ClipReport:
    """What was made: the object that `--json` prints."""

    output: str
    model: str
    seed: int
    prompt: str
    avdiff: str
    seconds: float
    compute_seconds: float
    frames: int | None = None
    height: int | None = None
    width: int | None = None

    def to_json(self) -> str:
        """One line; a clip without a picture has no size."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(known, ensure_ascii=False)

    def sentence(self) -> str:
        """One line for a person."""
        made = f"made in {self.compute_seconds} s"
        return f"{self.output}: {self.seconds:.2f} s, seed {self.seed}, {made}"


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The clip, with spoken words in double quotes.")
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
    deflicker: Annotated[
        float | None,
        typer.Option(
            "--deflicker",
            "--deflicker-strength",
            help="Changes of a pixel, of 255, that count as flicker and are averaged away.",
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
    skip_domain_check: Annotated[
        bool,
        typer.Option(
            "--skip-domain-check", help="Try a prompt that the model says it cannot follow."
        ),
    ] = False,
    lora: Annotated[
        str | None,
        typer.Option(
            help="Folder of a LoRA that `avdiff train` made; guidance is then 2 unless given."
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
    common = GenerationRequest(
        prompt=prompt or "",
        output=output,
        seed=seed,
        seconds=seconds,
        language=language,
        negative_prompt=negative_prompt,
        image=image,
        audio=audio,
        video=video,
        last_image=last_image,
        mask=mask,
        retake=retake,
        extend=extend,
    )
    requests = [common.check()] if prompts is None else read_requests(prompts, common)
    for request in requests:
        check_output(request)
    sampling = Sampling(
        height=height,
        width=width,
        frame_rate=fps,
        num_inference_steps=steps,
        guidance_scale=guidance,
        audio_guidance_scale=audio_guidance,
        deflicker_strength=deflicker,
        generate_video=False if no_video else None,
        generate_audio=False if no_audio else None,
        check_prompt=False if skip_domain_check else None,
    )
    pipe = load_pipeline(model, device)
    if lora is not None:
        load_lora(pipe, lora)
    for request in requests:
        report = generate_clip(pipe, request, sampling, model)
        print(report.to_json() if as_json else report.sentence())


# ------------------------------------------------------------------------------- a file of prompts


def read_requests(path: Path, common: GenerationRequest) -> list[GenerationRequest]:
    """A prompts file: one JSON object a line; what a line does not say is taken from the command's
    options. Makes the folder of the clips.

    Raises:
        ValueError: unreadable file, or a line that is no object, has an unknown key or a wrong
            value.
    """
    if not path.is_file():
        raise ValueError(f"prompts={path}: no such file")
    try:
        # utf-8-sig: also without the byte order mark that some editors put in front.
        text = path.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise ValueError(f"prompts={path}: needs UTF-8 text ({error})") from error
    folder = Path(common.output or ".")
    requests = [
        read_request(line, f"{path}, line {number}: ", number, common, folder)
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not requests:
        raise ValueError(f"prompts={path}: holds no line")
    if folder.suffix in SUFFIXES or folder.is_file():
        raise ValueError(f"output={folder}: needs a folder when --prompts is given")
    names = [request.output for request in requests]
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"{path}: output={double} is asked for twice, needs a name of its own for each line"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return requests


def read_request(
    line: str, where: str, number: int, common: GenerationRequest, folder: Path
) -> GenerationRequest:
    """One line of a prompts file, with its output inside `folder`.

    Raises:
        ValueError: begins with `where`.
    """
    known = {field.name for field in fields(GenerationRequest)}
    if len(line) > LONGEST_LINE:
        raise ValueError(f"{where}has {len(line)} characters, needs at most {LONGEST_LINE}")
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}is not JSON ({shorten(str(error), 200)})") from error
    if not isinstance(values, dict) or not set(values) <= known:
        raise ValueError(f"{where}needs an object with keys among {', '.join(sorted(known))}")
    given = {"output": f"{number:04}.mp4"} | values
    request = replace(common, **given).check(where)
    if request.path.is_absolute() or ".." in request.path.parts:
        raise ValueError(f"{where}output={request.output}: needs a name inside {folder}")
    return replace(request, output=str(folder / request.path))


def check_output(request: GenerationRequest) -> None:
    """Before minutes of work: can the file be written?

    Raises:
        ValueError: another suffix, or no folder for it.
    """
    path = request.path
    if path.suffix.lower() not in SUFFIXES:
        endings = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise ValueError(f"output={path}: needs a name that ends in {endings}")
    if "\0" in str(path) or path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(
            f"output={str(path)!r}: needs a file name, without NUL, in a folder that exists"
        )


# --------------------------------------------------------------------------------------- the model


def load_pipeline(model: str, device: str | None) -> AVDiffPipeline:
    """The pipeline by a preset's name, a folder or a hub name, on its device.

    Raises:
        ValueError: one sentence on why it cannot be loaded, or the device cannot be used.
    """
    folder = _model_folder(model)
    import torch
    from diffusers.utils import logging

    from avdiff import AVDiffPipeline  # by its public name: with the collector paused

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = str(folder) if folder.is_dir() else model
    try:
        pipe = AVDiffPipeline.from_pretrained(source, use_safetensors=True)
    except Exception as error:  # whatever a broken or foreign file provokes in the loaders
        raise ValueError(f"model={model}: cannot be loaded ({_reason(error)})") from error
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty(), leave=False)
    try:
        if device == "meta":
            raise RuntimeError("it holds no values")
        return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(f"device={device}: is not usable here ({first_line})") from error


def _model_folder(model: str) -> Path:
    """The path that a model's name stands for; a hub name is one that is not on disk."""
    if len(model) > 1000:
        raise ValueError(f"model={model[:40]}...: needs the folder or the hub name of a pipeline")
    folder = Path(avdiff.PRESENTER) if model == "presenter" else Path(model)
    index = folder / "model_index.json"
    if model == "presenter" and not index.is_file():
        raise ValueError(
            "model=presenter: this copy of avdiff has no weights in it; give --model FOLDER"
        )
    if folder.is_file() or (folder.is_dir() and not index.is_file()):
        raise ValueError(
            f"model={model}: needs the folder of a pipeline, with a model_index.json in it"
        )
    return folder


def load_lora(pipe: AVDiffPipeline, folder: str) -> None:
    """Put a LoRA on the pipeline.

    Raises:
        ValueError: one sentence on why it cannot be loaded.
    """
    try:
        pipe.load_lora_weights(folder)
    except Exception as error:  # whatever a broken or foreign file provokes in the loaders
        raise ValueError(f"lora={folder}: cannot be loaded ({_reason(error)})") from error


# ---------------------------------------------------------------------------------------- one clip


def generate_clip(
    pipe: AVDiffPipeline, request: GenerationRequest, sampling: Sampling, model: str
) -> ClipReport:
    """Generate one clip, write it, and tell what was made.

    Raises:
        ValueError: what the pipeline or a given file refuses.
    """
    import secrets

    import torch

    from avdiff.cli.generate_inputs import conditioning_from_files, continue_clip

    seed = secrets.randbits(31) if request.seed is None else request.seed
    arguments = sampling.arguments() | {
        "generator": torch.Generator("cpu").manual_seed(seed),
        "negative_prompt": request.negative_prompt,
        "language": request.language,
        "seconds": request.seconds,
    }
    if request.path.suffix.lower() in SOUND_SUFFIXES:
        arguments["generate_video"] = False
    arguments |= conditioning_from_files(pipe, request, arguments)
    facts = {"model": model, "seed": seed, "prompt": request.prompt, "avdiff": avdiff.__version__}
    start = time.perf_counter()
    if request.extend is not None:
        shape = continue_clip(pipe, request, arguments, facts)
    else:
        shape = _write_new_clip(pipe, request, arguments, facts)
    return ClipReport(
        output=str(request.output),
        compute_seconds=round(time.perf_counter() - start, 2),
        **facts,
        **shape,
    )


def _write_new_clip(
    pipe: AVDiffPipeline,
    request: GenerationRequest,
    arguments: dict[str, Any],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Call the pipeline, write its answer to the request's file; length and size for the report."""
    from avdiff.media.write import write_clip

    result = pipe(request.prompt, output_type="np", **arguments)
    frames = None if result.frames is None else result.frames[0]  # (F, H, W, 3) in [0, 1]
    audio = None if result.audio is None else result.audio[0].float().cpu().numpy()  # (C, S)
    write_clip(str(request.output), frames, result.frame_rate, audio, result.sampling_rate, facts)
    if frames is not None:
        seconds = len(frames) / result.frame_rate
        num_frames, height, width = frames.shape[:3]
        size = {"frames": num_frames, "height": height, "width": width}
        return {"seconds": round(float(seconds), 3), **size}
    assert audio is not None, "the pipeline generates at least one modality"
    return {"seconds": round(float(audio.shape[-1] / result.sampling_rate), 3)}


def _reason(error: Exception) -> str:
    """What a loader said, short enough for one sentence."""
    return shorten(str(error).strip() or type(error).__name__, 240)


def _short(value: object) -> str:
    """A wrong value as it is shown: a number of a thousand digits is not."""
    try:
        return shorten(repr(value), 80, placeholder="...")
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        return "a huge number"
