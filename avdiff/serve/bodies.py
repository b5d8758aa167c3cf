"""Bodies of requests: JSON or a form with files -> plain fields and uploads on disk."""

from __future__ import annotations

import base64
import binascii
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException

from avdiff.serve.errors import ApiError, bad
from avdiff.serve.requests import UPLOADS, parse_json

MAX_FIELDS = 64
MAX_TEXT = 256 * 1024  # bytes of one field of a form


@dataclass
class Body:
    """What was sent.

    Attributes:
        fields: values by name, as sent. uploads: file of each field that came as one, in a folder
            for temporary files; `close` removes them. references: ids of clips that a field names.
    """

    fields: dict[str, Any]
    uploads: dict[str, Path] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)

    def close(self) -> None:
        """Remove the uploaded files."""
        for path in self.uploads.values():
            with suppress(FileNotFoundError):
                path.unlink()


async def read_body(request: Request, folder: Path) -> Body:
    """Read a request's body.

    Args:
        folder: where uploaded files are put.

    Raises:
        ApiError: another type than JSON or a form, or one that cannot be read.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "multipart/form-data" or kind == "application/x-www-form-urlencoded":
        return await _read_form(request, folder)
    raw = await request.body()
    if kind not in ("application/json", "") or (not kind and raw):
        raise ApiError(
            415, f"content-type={kind[:60]}: needs application/json or multipart/form-data"
        )
    return _take_references(parse_json(raw or b"{}"), {}, folder)


async def _read_form(request: Request, folder: Path) -> Body:
    try:
        form = await request.form(
            max_files=MAX_FIELDS, max_fields=MAX_FIELDS, max_part_size=MAX_TEXT
        )
    except (MultiPartException, ValueError, KeyError) as error:
        raise ApiError(400, f"body: is no form that can be read ({error})") from error
    except ApiError:
        raise
    fields: dict[str, Any] = {}
    uploads: dict[str, Path] = {}
    try:
        for name, value in form.multi_items():
            plain = name.removesuffix("[]")
            if isinstance(value, UploadFile):
                uploads[plain] = await _keep(value, folder)
            elif plain in fields:
                held = fields[plain]
                fields[plain] = [*(held if isinstance(held, list) else [held]), value]
            else:
                fields[plain] = value
    finally:
        await form.close()
    return _take_references(_nested(fields), uploads, folder)


def _nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """ "video[id]" of a form is the `id` of the object `video`, as clients write it."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        head, bracket, rest = name.partition("[")
        if bracket and rest.endswith("]") and head in UPLOADS:
            inner = found.setdefault(head, {})
            if isinstance(inner, dict):
                inner[rest[:-1]] = value
        else:
            found[name] = value
    return found


def _take_references(fields: dict[str, Any], uploads: dict[str, Path], folder: Path) -> Body:
    """Fields that hold pictures, sounds or films: data URLs become files, ids references."""
    body = Body({}, uploads)
    for name, value in fields.items():
        if name not in UPLOADS:
            body.fields[name] = value
            continue
        try:
            _take_reference(name, value, body, folder)
        except ApiError:
            body.close()
            raise
    for name in uploads:
        if name in UPLOADS:
            body.fields[name] = True
    return body


def _take_reference(name: str, value: Any, body: Body, folder: Path) -> None:
    wanted = "needs an upload, {'image_url': 'data:...'} or, for a film, {'id': 'video_...'}"
    if isinstance(value, str):
        value = {"image_url": value}
    if not isinstance(value, dict):
        raise bad(name, f"{name}: {wanted}")
    url = value.get("image_url") or value.get("url")
    if isinstance(value.get("id"), str):
        body.references[name] = value["id"]
    elif isinstance(url, str) and url.startswith("data:"):
        _, _, encoded = url.partition(";base64,")
        try:
            data = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise bad(name, f"{name}: is no base64 ({error})") from error
        body.uploads[name] = _write(data, folder)
    elif isinstance(url, str):
        raise bad(name, f"{name}: this server fetches no URL; send the file or a data: URL")
    else:
        raise bad(name, f"{name}: {wanted}")
    body.fields[name] = True


async def _keep(upload: UploadFile, folder: Path) -> Path:
    """Copy an upload piece by piece; its own name is never used."""
    handle, name = tempfile.mkstemp(prefix=".upload-", dir=folder)
    with os.fdopen(handle, "wb") as file:
        while piece := await upload.read(1 << 20):
            file.write(piece)
    return Path(name)


def _write(data: bytes, folder: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix=".upload-", dir=folder)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    return Path(name)
