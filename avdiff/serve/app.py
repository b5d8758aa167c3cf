"""The application: OpenAI's videos resource, sound alone, lip-sync of a clip, and operations.

Every route takes or tells; workers compute. START HERE to see what a client can ask for.
"""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

import avdiff
from avdiff.serve.accepting import Client, accept_request, finished_job, known_job, video_object
from avdiff.serve.bodies import read_body
from avdiff.serve.errors import ApiError, answer_error, bad
from avdiff.serve.jobs import COMPLETED, FAILED, Job, JobStore
from avdiff.serve.limits import Gate
from avdiff.serve.metrics import exposition
from avdiff.serve.openapi import describe
from avdiff.serve.render import SHEET_NAME, SOUND_NAME, THUMBNAIL_NAME, VIDEO_NAME
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


# ---------------------------------------------------------------------------------- the routes
def _add_video_routes(app: FastAPI) -> None:
    store: JobStore = app.state.store

    async def accept(request: Request, client: str, kind: str, source: Job | None = None) -> Any:
        return video_object(store, await accept_request(app, request, client, kind, source))

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
        source = finished_job(store, video_id, client, "video_id")
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
        return video_object(store, known_job(store, video_id, client))

    @app.delete("/v1/videos/{video_id}")
    def delete(video_id: str, client: Client) -> Any:
        """Cancel and forget a clip, and remove its files."""
        known_job(store, video_id, client)
        store.delete(video_id, client)
        shutil.rmtree(store.assets(video_id), ignore_errors=True)
        shutil.rmtree(store.inputs(video_id), ignore_errors=True)
        return {"id": video_id, "object": "video.deleted", "deleted": True}

    @app.post("/v1/videos/{video_id}/cancel")
    def cancel(video_id: str, client: Client) -> Any:
        """Stop a clip after the running step; it ends as failed with the code `cancelled`."""
        known_job(store, video_id, client)
        store.cancel(video_id, client)
        return video_object(store, known_job(store, video_id, client))


def _add_content_routes(app: FastAPI) -> None:
    store: JobStore = app.state.store

    @app.get("/v1/videos/{video_id}/content")
    def content(
        video_id: str,
        client: Client,
        variant: Annotated[str, Query(pattern="^(video|thumbnail|spritesheet)$")] = "video",
    ) -> Response:
        """The clip (mp4), its thumbnail (webp) or its sprite sheet (jpg)."""
        job = known_job(store, video_id, client)
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
        known_job(store, video_id, client)
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
        job = await accept_request(app, request, client, "speech")
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
