"""The OpenAPI page: bodies that the routes read themselves, described field by field."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from avdiff.serve.requests import FIELDS, LANGUAGES, UPLOADS

TEXT = {"type": "string", "minLength": 1, "maxLength": 4000}
DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "prompt": TEXT | {"description": "Description; words to say stand in double quotes."},
    "input": TEXT | {"description": "Description with the words to say in double quotes."},
    "voice": TEXT | {"description": "Taken and not read: the description tells the voice."},
    "model": TEXT | {"description": "Name of the server's model, or a client's default."},
    "seconds": {"type": "string", "description": "Length; by default as long as the words take."},
    "size": {"type": "string", "description": "WIDTHxHEIGHT in pixels, multiples of 64."},
    "seed": {"type": "integer", "minimum": 0, "description": "Same seed, same clip."},
    "language": {"type": "string", "enum": list(LANGUAGES)},
    "negative_prompt": TEXT | {"description": "What guidance leads away from."},
    "guidance_scale": {"type": "number", "minimum": 0, "maximum": 20},
    "audio_guidance_scale": {"type": "number", "minimum": 0, "maximum": 20},
    "num_inference_steps": {"type": "integer", "minimum": 1, "maximum": 200},
    "deflicker_strength": {"type": "number", "minimum": 0, "maximum": 255},
    "generate_audio": {"type": "boolean"},
    "lora": {"type": "string", "description": "Name of a LoRA of the server's LoRA folder."},
    "retake": {
        "type": "array",
        "items": {"type": "number"},
        "minItems": 2,
        "maxItems": 2,
        "description": "Start and end in seconds of the span that is made anew.",
    },
    "response_format": {"type": "string", "enum": ["wav", "flac", "mp3", "opus"]},
    "speed": {"type": "number", "description": "Taken and not read."},
}
KINDS = {
    ("/v1/videos", "post"): "create",
    ("/v1/videos/extensions", "post"): "extend",
    ("/v1/videos/edits", "post"): "edit",
    ("/v1/videos/{video_id}/remix", "post"): "remix",
    ("/v1/audio/speech", "post"): "speech",
}
REQUIRED = {
    "create": ["prompt"],
    "extend": ["prompt", "video"],
    "edit": ["prompt", "video"],
    "remix": ["prompt"],
    "speech": ["input"],
}
ERRORS = ("400", "401", "404", "408", "409", "413", "415", "429", "503")


def describe(app: FastAPI) -> None:
    """Give the application a page that tells every field and every error."""

    def page() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            _add_bodies(schema)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = page  # type: ignore[method-assign]


def _add_bodies(schema: dict[str, Any]) -> None:
    error = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    }
    answer = {"description": "Error", "content": {"application/json": {"schema": error}}}
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            operation["responses"].pop("422", None)
            for status in ERRORS:
                operation["responses"].setdefault(status, answer)
            kind = KINDS.get((path, method))
            if kind is not None:
                operation["requestBody"] = {"required": True, "content": _body(kind)}
            elif path == "/v1/evaluations/lipsync":
                operation["requestBody"] = {"required": True, "content": _film_body()}


def _body(kind: str) -> dict[str, Any]:
    names = sorted(FIELDS[kind])
    reference = {"type": "object", "properties": {"id": {"type": "string"}}}
    plain = {n: DESCRIPTIONS.get(n, reference) for n in names}
    form = {
        n: {"type": "string", "format": "binary"} if n in UPLOADS else DESCRIPTIONS[n]
        for n in names
    }
    required = REQUIRED[kind]
    base: dict[str, Any] = {"type": "object", "required": required, "additionalProperties": False}
    return {
        "application/json": {"schema": base | {"properties": plain}},
        "multipart/form-data": {"schema": base | {"properties": form}},
    }


def _film_body() -> dict[str, Any]:
    film = {"video": {"type": "string", "format": "binary"}}
    schema = {"type": "object", "required": ["video"], "properties": film}
    return {"multipart/form-data": {"schema": schema}}
