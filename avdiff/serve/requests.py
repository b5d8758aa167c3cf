"""What a client may ask for: fields checked one by one, each error naming its field."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from avdiff.serve.errors import ApiError, bad
from avdiff.serve.settings import ServeSettings

LANGUAGES = ("en", "es", "fr", "hi", "it", "ja", "pt", "zh")
MAX_PROMPT = 4000  # characters
SIDE_STEP = 64  # pixels: one token of the presenter's picture
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class ClipRequest:
    """One clip to make; what a worker needs and nothing else.

    `kind` is create, extend, edit, remix or speech. `inputs` names uploaded files by role (image,
    last_image, audio, video, mask); `source` is the job that is continued or changed.
    """

    kind: str
    prompt: str
    seed: int
    model: str = "presenter"
    seconds: float | None = None
    height: int | None = None
    width: int | None = None
    language: str | None = None
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    audio_guidance_scale: float | None = None
    num_inference_steps: int | None = None
    deflicker_strength: float | None = None
    generate_audio: bool | None = None
    lora: str | None = None
    retake: tuple[float, float] | None = None
    source: str | None = None
    inputs: tuple[str, ...] = ()

    def to_json(self) -> str:
        """As it is kept in the database."""
        return json.dumps(asdict(self), ensure_ascii=True, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> ClipRequest:
        """Back from `to_json`."""
        known = {f.name for f in fields(ClipRequest)}
        values = {k: v for k, v in json.loads(text).items() if k in known}
        values["inputs"] = tuple(values.get("inputs", ()))
        if values.get("retake") is not None:
            values["retake"] = tuple(values["retake"])
        return ClipRequest(**values)


# What each kind of call takes, beside what every one takes.
COMMON = {
    "prompt",
    "model",
    "seed",
    "language",
    "negative_prompt",
    "guidance_scale",
    "audio_guidance_scale",
    "num_inference_steps",
    "deflicker_strength",
    "lora",
}
FIELDS: dict[str, set[str]] = {
    "create": COMMON
    | {"seconds", "size", "input_reference", "last_image", "audio", "generate_audio"},
    "extend": COMMON | {"seconds", "video"},
    "edit": COMMON | {"video", "retake", "mask"},
    "remix": COMMON,
    "speech": {"input", "voice", "model", "response_format", "speed", "seed", "language"},
}
UPLOADS = {"input_reference": "image", "last_image": "last_image", "audio": "audio"}
UPLOADS |= {"video": "video", "mask": "mask"}


def parse_request(
    kind: str, given: Mapping[str, Any], settings: ServeSettings
) -> tuple[ClipRequest, bool]:
    """Fields of a body -> the clip to make, and whether the client chose the seed.

    Args:
        given: values by field; texts of a form are as good as JSON's numbers. Uploads are not
            looked at here.

    Raises:
        ApiError: an unknown field, or a value that does not fit.
    """
    unknown = sorted(set(given) - FIELDS[kind])
    if unknown:
        takes = ", ".join(sorted(FIELDS[kind]))
        raise ApiError(400, f"{unknown[0]}: is no field of this call; it takes {takes}", unknown[0])
    values = {k: v for k, v in given.items() if k not in UPLOADS}
    _check_model(values, settings)
    words = "input" if kind == "speech" else "prompt"
    prompt = _text(values, words, MAX_PROMPT)
    if prompt is None:
        raise bad(words, f"{words}: is missing, needs a description or words to say")
    height, width = _size(values, settings)
    seed = _number(values, "seed", int, 0, 2**63 - 1)
    request = ClipRequest(
        kind=kind,
        prompt=prompt,
        seed=secrets.randbits(31) if seed is None else seed,
        model=settings.name,
        seconds=_number(values, "seconds", float, 0.2, settings.max_seconds),
        height=height,
        width=width,
        language=_choice(values, "language", LANGUAGES),
        negative_prompt=_text(values, "negative_prompt", MAX_PROMPT),
        guidance_scale=_number(values, "guidance_scale", float, 0, 20),
        audio_guidance_scale=_number(values, "audio_guidance_scale", float, 0, 20),
        num_inference_steps=_number(values, "num_inference_steps", int, 1, 200),
        deflicker_strength=_number(values, "deflicker_strength", float, 0, 255),
        generate_audio=_boolean(values, "generate_audio"),
        lora=_lora(values, settings),
        retake=_span(values),
    )
    return request, seed is not None


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ApiError: not UTF-8, not JSON, NaN or Infinity in it, too deep, or no object.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    try:
        found = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        said = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"body: is not JSON ({said[:200]})") from error
    if not isinstance(found, dict):
        raise ApiError(400, f"body: is a JSON {type(found).__name__}, needs an object")
    return found


def _check_model(values: Mapping[str, Any], settings: ServeSettings) -> None:
    """A client's default model name is taken for ours; any other name is refused."""
    model = values.get("model")
    if model is None or model == settings.name or str(model).startswith(("sora-2", "tts-1")):
        return
    raise ApiError(
        404, f"model={_short(model)}: is not here; needs {settings.name}", "model", "no_such_model"
    )


def _text(values: Mapping[str, Any], name: str, longest: int) -> str | None:
    value = values.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip():
        raise bad(name, f"{name}={_short(value)}: needs a text that is not empty")
    if len(value) > longest:
        raise bad(name, f"{name}: has {len(value)} characters, needs at most {longest}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise bad(name, f"{name}: holds half of a character ({error.reason})") from error
    if "\0" in value:
        raise bad(name, f"{name}: holds a NUL character")
    return value


def _number(
    values: Mapping[str, Any],
    name: str,
    kind: Callable[[Any], Any],
    low: float,
    high: float,
) -> Any:
    value = values.get(name)
    if value is None:
        return None
    wanted = f"needs a {'whole ' if kind is int else ''}number from {low:g} to {high:g}"
    try:
        if isinstance(value, bool) or (isinstance(value, str) and len(value) > 40):
            raise ValueError("no number")
        number = kind(value)
        fits = math.isfinite(number) and low <= number <= high
        if kind is int and not isinstance(value, str) and number != value:
            raise ValueError("no whole number")
    except (TypeError, ValueError, OverflowError) as error:
        raise bad(name, f"{name}={_short(value)}: {wanted}") from error
    if not fits:
        raise bad(name, f"{name}={_short(value)}: {wanted}")
    return number


def _boolean(values: Mapping[str, Any], name: str) -> bool | None:
    value = values.get(name)
    if value is None or isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    raise bad(name, f"{name}={_short(value)}: needs true or false")


def _choice(values: Mapping[str, Any], name: str, options: tuple[str, ...]) -> str | None:
    value = values.get(name)
    if value is not None and value not in options:
        raise bad(name, f"{name}={_short(value)}: needs one of {', '.join(options)}")
    return value


def _size(values: Mapping[str, Any], settings: ServeSettings) -> tuple[int | None, int | None]:
    """ "256x192" is width x height -> (height, width)."""
    value = values.get("size")
    if value is None:
        return None, None
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(value))
    sides = [int(side) for side in found.groups()] if found else []
    if not sides or any(
        side % SIDE_STEP or not SIDE_STEP <= side <= settings.max_side for side in sides
    ):
        raise bad(
            "size",
            f"size={_short(value)}: needs WIDTHxHEIGHT, multiples of {SIDE_STEP} up to "
            f"{settings.max_side}, such as 128x128",
        )
    return sides[1], sides[0]


def _lora(values: Mapping[str, Any], settings: ServeSettings) -> str | None:
    value = values.get("lora")
    if value is None:
        return None
    here = settings.lora_folder
    known = sorted(p.name for p in here.iterdir() if p.is_dir()) if here is not None else []
    if not isinstance(value, str) or not NAME.fullmatch(value) or value not in known:
        have = f"needs one of {', '.join(known)}" if known else "this server has none"
        raise bad("lora", f"lora={_short(value)}: is not here; {have}")
    return value


def _span(values: Mapping[str, Any]) -> tuple[float, float] | None:
    """ "0.5:1.2" or [0.5, 1.2] -> (start, end) in seconds."""
    value = values.get("retake")
    if value is None:
        return None
    parts = value.split(":") if isinstance(value, str) else value
    if isinstance(parts, list) and len(parts) == 2:
        start, end = (_number({"retake": part}, "retake", float, 0, 3600) for part in parts)
        if start is not None and end is not None and start < end:
            return start, end
    raise bad("retake", f"retake={_short(value)}: needs [START, END] in seconds, START below END")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
