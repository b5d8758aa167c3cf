"""From a request to a queued job, and from a job to what the client is told of it."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import replace
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request

import avdiff
from avdiff.serve.bodies import Body, read_body
from avdiff.serve.errors import ApiError, bad
from avdiff.serve.jobs import COMPLETED, FAILED, QUEUED, Job, JobStore, new_id
from avdiff.serve.requests import UPLOADS, ClipRequest, parse_request
from avdiff.serve.settings import ServeSettings
from avdiff.serve.uploads import accept_upload


def video_object(store: JobStore, job: Job) -> dict[str, Any]:
    """A job as OpenAI's `Video`, with position in the queue and time left beside."""
    request = job.request
    share = 100 if job.status == COMPLETED else 99 * job.step // max(job.steps, 1)
    seconds = job.result.get("seconds", request.seconds)
    height = job.result.get("height", request.height)
    width = job.result.get("width", request.width)
    error = None
    if job.status == FAILED:
        error = {"code": job.error_code or "failed", "message": job.error_message or "failed"}
    position = store.position(job) if job.status == QUEUED else 0
    return {
        "id": job.id,
        "object": "video",
        "created_at": int(job.created),
        "completed_at": None if job.completed is None else int(job.completed),
        "expires_at": None,
        "error": error,
        "model": request.model,
        "progress": int(share),
        "prompt": request.prompt,
        "remixed_from_video_id": request.source if request.kind == "remix" else None,
        "seconds": "auto" if seconds is None else f"{seconds:g}",
        "size": "auto" if not width or not height else f"{width}x{height}",
        "status": job.status,
        "seed": request.seed,
        "queue_position": position,
        "seconds_left": _seconds_left(store, job, position),
    }


def _seconds_left(store: JobStore, job: Job, position: int) -> float | None:
    if job.status in (COMPLETED, FAILED):
        return 0.0
    mean = store.mean_seconds()
    if mean is None:
        return None
    done = job.step / max(job.steps, 1)
    workers = max(1, store.ready_workers())
    return round(mean * (1 - done) + mean * position / workers, 2)


def _client(request: Request) -> str:
    return str(request.state.client)


Client = Annotated[str, Depends(_client)]


async def accept_request(
    app: FastAPI, request: Request, client: str, kind: str, source: Job | None = None
) -> Job:
    """Read, check and queue a request; a repeated idempotency key gives the earlier job."""
    store: JobStore = app.state.store
    settings: ServeSettings = app.state.settings
    uploads_folder = settings.folder / "inputs"
    body = await read_body(request, uploads_folder)
    try:
        clip, chosen_seed = parse_request(kind, body.fields, settings)
        _check_room(store, settings, client)
        clip = _with_source(store, client, clip, body, source, chosen_seed)
        job_id = new_id()
        await _take_uploads(app, body, job_id)
        roles = tuple(sorted(UPLOADS[name] for name in body.uploads if name in UPLOADS))
        clip = replace(clip, inputs=roles)
        key = request.headers.get("idempotency-key")
        same = _same_key(store, clip, job_id) if chosen_seed else None
        earlier = store.find_same(client, same) if same else None
        job = store.add(job_id, client, clip, key[:200] if key else None, same)
        if job.id != job_id:
            shutil.rmtree(store.inputs(job_id), ignore_errors=True)
        elif earlier is not None and _link_assets(store, earlier, job):
            store.complete_from(job.id, earlier)
            job = store.get(job.id) or job
        return job
    finally:
        body.close()


def _check_room(store: JobStore, settings: ServeSettings, client: str) -> None:
    if store.waiting() >= settings.max_queue:
        raise ApiError(429, f"queue: {settings.max_queue} clips wait already", None, "queue_full")
    if store.waiting(client) >= settings.max_client:
        said = f"queue: {settings.max_client} clips of yours wait already"
        raise ApiError(429, said, None, "client_queue_full")


def _with_source(
    store: JobStore,
    client: str,
    clip: ClipRequest,
    body: Body,
    source: Job | None,
    chosen_seed: bool,
) -> ClipRequest:
    """Name the clip that is continued, changed or said anew."""
    if "video" in body.references:
        source = finished_job(store, body.references["video"], client, "video")
    if clip.kind in ("extend", "edit") and source is None and "video" not in body.uploads:
        raise bad("video", "video: is missing, needs an upload or {'id': 'video_...'}")
    for name in body.references:
        if name != "video":
            raise bad(name, f"{name}: a reference is taken for video alone; send the file")
    if source is None:
        return clip
    earlier = source.request
    if clip.kind == "remix":
        kept = {
            name: getattr(clip, name) if getattr(clip, name) is not None else getattr(earlier, name)
            for name in ("height", "width", "lora", "guidance_scale", "audio_guidance_scale")
        }
        seed = clip.seed if chosen_seed else earlier.seed
        return replace(clip, source=source.id, seed=seed, **kept)
    return replace(clip, source=source.id)


def finished_job(store: JobStore, job_id: str, client: str, param: str) -> Job:
    job = store.get(job_id, client)
    if job is None:
        raise ApiError(404, f"{param}={job_id[:60]!r}: no such clip", param, "not_found")
    if job.status != COMPLETED:
        raise ApiError(409, f"{param}={job.id}: is {job.status}, needs a completed clip", param)
    return job


async def _take_uploads(app: FastAPI, body: Body, job_id: str) -> None:
    settings: ServeSettings = app.state.settings
    folder = app.state.store.inputs(job_id)
    try:
        for name, path in body.uploads.items():
            if name not in UPLOADS:
                raise bad(name, f"{name}: is no field of this call")
            limits = (4096 if name != "video" else settings.max_side, settings.max_seconds)
            await accept_upload(UPLOADS[name], name, path, folder, *limits)
    except ApiError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _same_key(store: JobStore, clip: ClipRequest, job_id: str) -> str:
    """Requests with the same fields and files give the same clip."""
    parts = [clip.to_json().encode(), avdiff.__version__.encode()]
    for path in sorted(store.inputs(job_id).glob("*")):
        parts += [path.name.encode(), path.read_bytes()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _link_assets(store: JobStore, earlier: Job, job: Job) -> bool:
    """The earlier clip's files under the new id too; False where they are gone."""
    target = store.assets(job.id)
    temporary = target.with_name(f".{job.id}.{os.getpid()}")
    try:
        shutil.copytree(store.assets(earlier.id), temporary, copy_function=os.link)
        os.replace(temporary, target)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        return False
    return True


def known_job(store: JobStore, job_id: str, client: str) -> Job:
    job = store.get(job_id, client)
    if job is None:
        raise ApiError(404, f"video_id={job_id[:60]!r}: no such clip", "video_id", "not_found")
    return job
