"""The application: OpenAI's videos resource, sound alone, lip-sync of a clip, and operations.

Every route takes or tells; workers compute. START HERE to see what a client can ask for.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

import avdiff
from avdiff.serve.bodies import Body, read_body
from avdiff.serve.errors import ApiError, answer_error, bad
from avdiff.serve.jobs import COMPLETED, FAILED, QUEUED, Job, JobStore, new_id
from avdiff.serve.limits import Gate
from avdiff.serve.metrics import exposition
from avdiff.serve.openapi import describe
from avdiff.serve.render import SHEET_NAME, SOUND_NAME, THUMBNAIL_NAME, VIDEO_NAME
from avdiff.serve.requests import UPLOADS, ClipRequest, parse_request
from avdiff.serve.settings import ServeSettings
from avdiff.serve.supervisor import Supervisor
from avdiff.serve.uploads import accept_upload

VARIANTS = {
    "video": (VIDEO_NAME, "video/mp4"),
    "thumbnail": (THUMBNAIL_NAME, "image/webp"),
    "spritesheet": (SHEET_NAME, "image/jpeg"),
}
SOUND_FORMATS = {
    "wav": ("WAV", "audio/wav"),
    "flac": ("FLAC", "audio/flac"),
    "mp3": ("MP3", "audio/mpeg"),
    "opus": ("OGG", "audio/ogg"),
}
EVENT_SECONDS = 0.1  # between looks at a job that a client follows
SPEECH_SECONDS = 300.0  # a client of the speech route waits at most so long
LIPSYNC_SECONDS = 180.0


def build_app(settings: ServeSettings, supervise: bool = True) -> FastAPI:
    """The application of a server.

    Args:
        supervise: start workers with it; False where they run elsewhere.
    """
    settings.check()
    settings.folder.mkdir(parents=True, exist_ok=True)
    store = JobStore(settings.folder)
    supervisor = Supervisor(settings, store)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        if supervise:
            supervisor.start()
        yield
        if supervise:
            await asyncio.to_thread(supervisor.stop)

    app = FastAPI(
        title="avdiff",
        version=avdiff.__version__,
        description="Joint audio-video generation behind OpenAI's videos resource.",
        lifespan=life,
    )
    app.state.settings = settings
    app.state.store = store
    app.state.supervisor = supervisor
    app.add_exception_handler(ApiError, answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_middleware(Gate, settings=settings)
    _add_video_routes(app)
    _add_character_routes(app)
    _add_reading_routes(app)
    _add_content_routes(app)
    _add_other_routes(app)
    _add_operations(app)
    describe(app)
    return app


async def _answer_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    said = {404: "this path is not here", 405: "this path takes another method"}
    text = said.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, text).response(dict(error.headers or {}))


async def _answer_validation_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = str(first["loc"][-1])
    return bad(field, f"{field}: {first['msg']}").response()


# ------------------------------------------------------------------------------------ the clip
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


async def _accept(
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
        source = _finished(store, body.references["video"], client, "video")
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


def _finished(store: JobStore, job_id: str, client: str, param: str) -> Job:
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


def _known(store: JobStore, job_id: str, client: str) -> Job:
    job = store.get(job_id, client)
    if job is None:
        raise ApiError(404, f"video_id={job_id[:60]!r}: no such clip", "video_id", "not_found")
    return job


# ---------------------------------------------------------------------------------- the routes
def _add_video_routes(app: FastAPI) -> None:
    store: JobStore = app.state.store

    async def accept(request: Request, client: str, kind: str, source: Job | None = None) -> Any:
        return video_object(store, await _accept(app, request, client, kind, source))

    @app.post("/v1/videos")
    async def create(request: Request, client: Client) -> Any:
        """Queue a clip."""
        return await accept(request, client, "create")

    @app.post("/v1/videos/extensions")
    async def extend(request: Request, client: Client) -> Any:
        """Continue a finished clip, or an uploaded one."""
        return await accept(request, client, "extend")

    @app.post("/v1/videos/edits")
    async def edit(request: Request, client: Client) -> Any:
        """Make a span or a region of a clip anew; without either, the span whose words changed."""
        return await accept(request, client, "edit")

    @app.post("/v1/videos/{video_id}/remix")
    async def remix(video_id: str, request: Request, client: Client) -> Any:
        """Other words by the same person: the seed and settings of a finished clip."""
        source = _finished(store, video_id, client, "video_id")
        return await accept(request, client, "remix", source)


def _add_character_routes(app: FastAPI) -> None:
    @app.post("/v1/videos/characters")
    async def create_character(request: Request) -> Any:
        """Characters are the cast; this model has none yet."""
        raise ApiError(
            400, "characters: this model has no cast to add one to", None, "not_supported"
        )

    @app.get("/v1/videos/characters/{character_id}")
    async def get_character(character_id: str) -> Any:
        """Characters are the cast; this model has none yet."""
        raise ApiError(400, "characters: this model has no cast", None, "not_supported")


def _add_reading_routes(app: FastAPI) -> None:
    store: JobStore = app.state.store

    @app.get("/v1/videos")
    def list_videos(
        client: Client,
        after: Annotated[str | None, Query(max_length=100)] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Annotated[str, Query(pattern="^(asc|desc)$")] = "desc",
    ) -> Any:
        """Clips of this client, newest first."""
        try:
            jobs, more = store.page(client, limit, after, order == "desc")
        except KeyError as error:
            raise bad("after", f"after={after!r}: no such clip") from error
        data = [video_object(store, job) for job in jobs]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
        return {"object": "list", "data": data, "has_more": more} | ends

    @app.get("/v1/videos/{video_id}")
    def retrieve(video_id: str, client: Client) -> Any:
        """State of a clip."""
        return video_object(store, _known(store, video_id, client))

    @app.delete("/v1/videos/{video_id}")
    def delete(video_id: str, client: Client) -> Any:
        """Cancel and forget a clip, and remove its files."""
        _known(store, video_id, client)
        store.delete(video_id, client)
        shutil.rmtree(store.assets(video_id), ignore_errors=True)
        shutil.rmtree(store.inputs(video_id), ignore_errors=True)
        return {"id": video_id, "object": "video.deleted", "deleted": True}

    @app.post("/v1/videos/{video_id}/cancel")
    def cancel(video_id: str, client: Client) -> Any:
        """Stop a clip after the running step; it ends as failed with the code `cancelled`."""
        _known(store, video_id, client)
        store.cancel(video_id, client)
        return video_object(store, _known(store, video_id, client))


def _add_content_routes(app: FastAPI) -> None:
    store: JobStore = app.state.store

    @app.get("/v1/videos/{video_id}/content")
    def content(
        video_id: str,
        client: Client,
        variant: Annotated[str, Query(pattern="^(video|thumbnail|spritesheet)$")] = "video",
    ) -> Response:
        """The clip (mp4), its thumbnail (webp) or its sprite sheet (jpg)."""
        job = _known(store, video_id, client)
        if job.status != COMPLETED:
            said = f"video_id={video_id}: is {job.status}, needs a completed clip"
            raise ApiError(409, said, "video_id", "not_ready")
        name, kind = VARIANTS[variant]
        path = store.assets(video_id) / name
        if not path.is_file():
            said = f"variant={variant}: this clip has none"
            raise ApiError(404, said, "variant", "not_found")
        return FileResponse(path, media_type=kind)

    @app.get("/v1/videos/{video_id}/events")
    async def events(video_id: str, client: Client) -> StreamingResponse:
        """Progress as server-sent events until the clip is completed or failed."""
        _known(store, video_id, client)
        stream = _follow(store, video_id, client)
        return StreamingResponse(stream, media_type="text/event-stream")


async def _follow(store: JobStore, video_id: str, client: str) -> AsyncIterator[str]:
    """One event for each change of a clip's state."""
    told = ""
    while True:
        job = await asyncio.to_thread(store.get, video_id, client)
        if job is None:
            yield "event: deleted\ndata: {}\n\n"
            return
        text = json.dumps(video_object(store, job))
        if text != told:
            told = text
            yield f"event: {job.status}\ndata: {text}\n\n"
        if job.status in (COMPLETED, FAILED):
            return
        await asyncio.sleep(EVENT_SECONDS)


def _add_other_routes(app: FastAPI) -> None:
    store: JobStore = app.state.store

    @app.post("/v1/audio/speech")
    async def speech(request: Request, client: Client) -> Response:
        """Sound alone: waits for it and sends it."""
        raw = await request.body()
        fields = json.loads(raw) if raw[:1] == b"{" and _is_json(raw) else {}
        asked = fields.get("response_format", "wav")
        kind = asked if isinstance(asked, str) else ""
        if kind not in SOUND_FORMATS:
            said = f"response_format={kind[:20]!r}: needs one of {', '.join(SOUND_FORMATS)}"
            raise bad("response_format", said)
        job = await _accept(app, request, client, "speech")
        limit = time.monotonic() + SPEECH_SECONDS
        while job.status not in (COMPLETED, FAILED):
            if time.monotonic() > limit or await request.is_disconnected():
                store.cancel(job.id, client)
                raise ApiError(503, "speech: was not made in time; try again later")
            await asyncio.sleep(EVENT_SECONDS)
            job = await asyncio.to_thread(store.get, job.id) or job
        if job.status == FAILED:
            raise ApiError(400, job.error_message or "failed", None, job.error_code)
        data = await asyncio.to_thread(_as_format, store.assets(job.id) / SOUND_NAME, kind)
        return Response(data, media_type=SOUND_FORMATS[kind][1])

    @app.post("/v1/evaluations/lipsync")
    async def lipsync(request: Request, client: Client) -> Any:
        """Lip-sync of a clip that is sent as the form's field `video`."""
        folder = app.state.settings.folder / "inputs"
        body = await read_body(request, folder)
        work = Path(tempfile.mkdtemp(prefix=".lipsync-", dir=folder))
        try:
            unknown = sorted(set(body.fields) - {"video"})
            if unknown or "video" not in body.uploads:
                name = unknown[0] if unknown else "video"
                raise bad(name, f"{name}: this call takes a file in the field video and no other")
            s = app.state.settings
            source = body.uploads["video"]
            await accept_upload("video", "video", source, work, 4096, s.max_seconds)
            return await _measure_lipsync(work / "video.mp4", work / "report.json")
        finally:
            body.close()
            shutil.rmtree(work, ignore_errors=True)


def _is_json(raw: bytes) -> bool:
    try:
        return isinstance(json.loads(raw), dict)
    except (ValueError, RecursionError):
        return False


def _as_format(path: Path, kind: str) -> bytes:
    """A WAV file in another container."""
    import io

    import soundfile

    if kind == "wav":
        return path.read_bytes()
    sound, rate = soundfile.read(path)
    target = io.BytesIO()
    container = SOUND_FORMATS[kind][0]
    subtype = {"opus": "OPUS", "mp3": "MPEG_LAYER_III"}.get(kind)
    soundfile.write(target, sound, rate, format=container, subtype=subtype)
    return target.getvalue()


async def _measure_lipsync(clip: Path, report: Path) -> Any:
    """In a process of its own: the measurement loads networks that the server has no use for."""
    words = ["-m", "avdiff", "eval", "lipsync", str(clip), "--json", str(report)]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, said = await asyncio.wait_for(process.communicate(), LIPSYNC_SECONDS)
    except TimeoutError as error:
        process.kill()
        raise ApiError(503, "lipsync: was not measured in time") from error
    if not report.is_file():
        text = said.decode("utf-8", "replace").strip().split("\n")[-1][:300]
        raise bad("video", f"video: {text.removeprefix('avdiff: ')}")
    rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
    row = {k: v for k, v in rows[0].items() if k not in ("file", "id")}
    return {"object": "evaluation.lipsync"} | _finite(row)


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _add_operations(app: FastAPI) -> None:
    store: JobStore = app.state.store

    @app.get("/health")
    def health() -> Any:
        """The process answers."""
        return {"status": "ok", "version": avdiff.__version__}

    @app.get("/ready")
    def ready() -> Response:
        """A worker has loaded the model: 200, else 503."""
        workers = store.ready_workers()
        state = {"ready": workers > 0, "workers": workers, "problem": app.state.supervisor.broken}
        return JSONResponse(state, 200 if workers else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        """Prometheus: queue, jobs by state, failures by code, time by stage."""
        return Response(exposition(store), media_type="text/plain; version=0.0.4")
