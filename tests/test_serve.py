"""The server: the real OpenAI client against it, jobs that outlive kills, hostile requests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from avdiff.serve.errors import ApiError
from avdiff.serve.jobs import MAX_ATTEMPTS, JobStore, new_id
from avdiff.serve.render import changed_span
from avdiff.serve.requests import ClipRequest, parse_json, parse_request
from avdiff.serve.settings import ServeSettings, read_tokens

openai = pytest.importorskip("openai", reason="needs the extra dev: the real client")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra serve")
TOKEN = "a-token-of-the-test"
REQUEST = ClipRequest("create", 'A woman says "hi"', 7)
QUIET = "ignore:The Sora API:DeprecationWarning"


# ------------------------------------------------------------------------------------- the jobs
def test_oldest_job_first_and_only_once(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    ids = [store.add(new_id(), "me", REQUEST).id for _ in range(3)]
    taken = [store.claim(f"w{i}") for i in range(4)]
    assert [job.id for job in taken if job] == ids
    assert taken[3] is None
    assert store.finish(ids[0], "w0", {"seconds": 2.0})
    assert not store.finish(ids[1], "w0", {})  # another worker has it
    assert [store.get(i).status for i in ids] == ["completed", "in_progress", "in_progress"]


def test_what_a_dead_worker_had_waits_again(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    job = store.add(new_id(), "me", REQUEST)
    for attempt in range(MAX_ATTEMPTS):
        assert store.claim("w").attempts == attempt + 1
        assert store.progress(job.id, "w", 1, 8)
        again = JobStore(tmp_path)  # the server was killed and started
        again.release()
    assert store.get(job.id).status == "failed"
    assert store.get(job.id).error_code == "worker_died"


def test_clients_see_their_own_jobs_in_pages(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    mine = [store.add(new_id(), "me", REQUEST).id for _ in range(5)]
    other = store.add(new_id(), "you", REQUEST)
    first, more = store.page("me", 2, None, descending=True)
    assert [job.id for job in first] == mine[:2:-1] and more
    rest, more = store.page("me", 9, first[-1].id, descending=True)
    assert [job.id for job in rest] == mine[2::-1] and not more
    assert store.get(other.id, "me") is None
    with pytest.raises(KeyError):
        store.page("me", 2, other.id, descending=True)


def test_same_idempotency_key_same_job(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    first = store.add(new_id(), "me", REQUEST, idempotency="k")
    assert store.add(new_id(), "me", REQUEST, idempotency="k").id == first.id
    assert store.add(new_id(), "you", REQUEST, idempotency="k").id != first.id


def test_cancel_and_delete(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    waits, runs = (store.add(new_id(), "me", REQUEST) for _ in range(2))
    store.cancel(waits.id, "me")
    assert store.get(waits.id).error_code == "cancelled"
    assert store.claim("w").id == runs.id
    store.cancel(runs.id, "me")
    assert not store.progress(runs.id, "w", 1, 8)
    assert store.delete(runs.id, "me") and store.get(runs.id) is None


# --------------------------------------------------------------------------------- the requests
BAD = {
    "unknown field": ({"prompt": "a", "foo": 1}, "foo"),
    "no prompt": ({}, "prompt"),
    "empty prompt": ({"prompt": " "}, "prompt"),
    "long prompt": ({"prompt": "a" * 5000}, "prompt"),
    "half a character": ({"prompt": "\ud800"}, "prompt"),
    "NUL": ({"prompt": "a\0b"}, "prompt"),
    "other type": ({"prompt": 7}, "prompt"),
    "endless": ({"prompt": "a", "seconds": "1000000"}, "seconds"),
    "NaN": ({"prompt": "a", "seconds": "nan"}, "seconds"),
    "huge integer": ({"prompt": "a", "seed": 10**400}, "seed"),
    "half a seed": ({"prompt": "a", "seed": 1.5}, "seed"),
    "true steps": ({"prompt": "a", "num_inference_steps": True}, "num_inference_steps"),
    "size": ({"prompt": "a", "size": "100x100"}, "size"),
    "huge size": ({"prompt": "a", "size": "65536x65536"}, "size"),
    "language": ({"prompt": "a", "language": "xx"}, "language"),
    "lora path": ({"prompt": "a", "lora": "../../etc"}, "lora"),
    "model": ({"prompt": "a", "model": "/etc/passwd"}, "model"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_fields_are_named(case: str, tmp_path: Path) -> None:
    given, param = BAD[case]
    with pytest.raises(ApiError) as error:
        parse_request("create", given, ServeSettings(tmp_path))
    assert error.value.param == param and 400 <= error.value.status < 500
    assert "\n" not in error.value.message and len(error.value.message) < 400


def test_texts_of_a_form_are_as_good_as_numbers(tmp_path: Path) -> None:
    given = {"prompt": "a", "seed": "3", "seconds": "4", "size": "192x128", "retake": "0.5:1"}
    span = {k: v for k, v in given.items() if k not in ("seconds", "size")}
    request, chosen = parse_request("edit", span, ServeSettings(tmp_path))
    assert (request.seed, request.retake, chosen) == (3, (0.5, 1.0), True)
    request, _ = parse_request(
        "create", {k: v for k, v in given.items() if k != "retake"}, ServeSettings(tmp_path)
    )
    assert (request.seconds, request.width, request.height) == (4.0, 192, 128)
    assert ClipRequest.from_json(request.to_json()) == request


@pytest.mark.parametrize("body", [b"{", b"[1]", b"\xff", b'{"a": NaN}', b"[" * 100000])
def test_no_json(body: bytes) -> None:
    with pytest.raises(ApiError, match="body"):
        parse_json(body)


def test_changed_words_are_found() -> None:
    span = changed_span('A man says "one two three"', 'A man says "one six three"', "en", 2.0)
    assert 0.2 < span.start < span.end < 1.8
    with pytest.raises(ValueError, match="same words"):
        changed_span('A man says "one"', 'A woman says "one"', "en", 1.0)


def test_a_server_for_everybody_needs_a_token(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"host=0\.0\.0\.0: .* --token-file"):
        ServeSettings(tmp_path, host="0.0.0.0").check()
    file = tmp_path / "tokens"
    file.write_text(f"# ours\n{TOKEN}\n")
    settings = ServeSettings(tmp_path, host="0.0.0.0", tokens=read_tokens(file)).check()
    assert settings.client_of(f"Bearer {TOKEN}", "x") == settings.client_of(f"bearer {TOKEN}", "y")
    assert settings.client_of("Bearer wrong", "x") is settings.client_of(None, "x") is None


# ------------------------------------------------------------------------------- a running server
def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server process on loopback, as a user starts it."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = _free_port()
        words = ["serve", "--port", str(self.port), "--folder", str(folder), *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "avdiff", *words],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=TOKEN, max_retries=0, timeout=60
        )

    def wait_ready(self) -> Server:
        limit = time.monotonic() + 120
        while time.monotonic() < limit:
            try:
                self.client.get("/../ready", cast_to=object)
                return self
            except openai.APIError:
                assert self.process.poll() is None, "the server ended"
                time.sleep(0.2)
        raise AssertionError("the server is not ready after two minutes")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    tokens = folder / "tokens"
    tokens.write_text(f"{TOKEN}\nanother-token-of-the-test\n")
    running = Server(folder / "jobs", "--token-file", str(tokens)).wait_ready()
    yield running
    running.process.terminate()
    assert running.process.wait(30) in (0, -15)


@pytest.mark.filterwarnings(QUIET)
def test_the_real_client_makes_continues_and_changes_a_clip(server: Server, tmp_path: Path) -> None:
    videos = server.client.videos
    few = {"num_inference_steps": 2}
    made = videos.create_and_poll(
        prompt='A woman with red hair says "good morning"',
        extra_body=few | {"seed": 3},
        poll_interval_ms=100,
    )
    assert (made.status, made.progress, made.object) == ("completed", 100, "video")
    film = videos.download_content(made.id).read()
    assert film[4:8] == b"ftyp"
    assert videos.download_content(made.id, variant="thumbnail").read()[8:12] == b"WEBP"
    assert videos.download_content(made.id, variant="spritesheet").read()[:3] == b"\xff\xd8\xff"

    same = videos.create_and_poll(
        prompt='A woman with red hair says "good morning"',
        extra_body=few | {"seed": 3},
        poll_interval_ms=100,
    )
    assert videos.download_content(same.id).read() == film
    source = tmp_path / "a.mp4"
    source.write_bytes(film)
    longer = videos.extend(prompt='A woman says "yes"', seconds="1", video=source, extra_body=few)
    longer = videos.poll(longer.id, poll_interval_ms=100)
    assert longer.status == "completed", longer.error
    assert float(longer.seconds) == pytest.approx(float(made.seconds) + 1, abs=0.1)
    other = videos.edit(
        prompt='A woman says "hello"', video=source, extra_body=few | {"retake": [0.2, 0.6]}
    )
    assert videos.poll(other.id, poll_interval_ms=100).status == "completed"
    remixed = videos.remix(made.id, prompt='A woman with red hair says "no"', extra_body=few)
    remixed = videos.poll(remixed.id, poll_interval_ms=100)
    assert remixed.status == "completed" and remixed.remixed_from_video_id == made.id
    listed = [video.id for video in videos.list(limit=2)]  # pages on by itself
    assert listed == [remixed.id, other.id, longer.id, same.id, made.id]
    assert videos.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        videos.retrieve(made.id)
    with pytest.raises(openai.BadRequestError, match="cast"):
        videos.create_character(name="Ann", video=source)
    sound = server.client.audio.speech.create(
        model="tts-1", voice="alloy", input='A man says "yes"', response_format="wav"
    )
    assert sound.read()[:4] == b"RIFF"


@pytest.mark.filterwarnings(QUIET)
def test_hostile_requests_are_refused_in_one_sentence(server: Server) -> None:
    raw = server.client.with_options(api_key="wrong-token-of-the-test").videos
    with pytest.raises(openai.AuthenticationError):
        raw.list()
    videos = server.client.videos
    with pytest.raises(openai.BadRequestError, match="foo: is no field") as error:
        videos.create(prompt="a", extra_body={"foo": 1})
    assert error.value.param == "foo"
    by_url = {"prompt": "a", "input_reference": {"image_url": "http://127.0.0.1/x.png"}}
    with pytest.raises(openai.BadRequestError, match="fetches no URL"):
        server.client.post("/videos", body=by_url, cast_to=object)
    with pytest.raises(openai.BadRequestError, match="input_reference: cannot be used"):
        videos.create(prompt="a", input_reference=("x.png", b"no picture"))
    for method, path in (("GET", "/v1/videos/../../etc/passwd"), ("GET", "/v1/videos/%00")):
        with socket.create_connection(("127.0.0.1", server.port), 10) as plain:
            lines = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n"
            plain.sendall(lines.encode())
            assert plain.recv(100).split()[1] in (b"404", b"400")
    with socket.create_connection(("127.0.0.1", server.port), 10) as plain:
        plain.sendall(
            f"POST /v1/videos HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
            "Content-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n".encode()
        )
        assert plain.recv(100).split()[1] == b"413"


@pytest.mark.filterwarnings(QUIET)
def test_a_killed_server_loses_nothing_and_repeats_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    first = Server(folder).wait_ready()
    body = {"num_inference_steps": 4, "seed": 5}
    ids = [
        first.client.videos.create(prompt=f'A man says "{word}"', extra_body=body).id
        for word in ("one", "two")
    ]
    while first.client.videos.retrieve(ids[0]).status == "queued":
        time.sleep(0.02)
    first.kill()
    second = Server(folder)
    try:
        second.wait_ready()
        done = [second.client.videos.poll(i, poll_interval_ms=100) for i in ids]
        assert [video.status for video in done] == ["completed", "completed"]
        again = second.client.videos.create_and_poll(
            prompt='A man says "one"', extra_body=body | {"guidance_scale": 1.0}
        )
        clips = [second.client.videos.download_content(i).read() for i in (ids[0], again.id)]
        assert clips[0] == clips[1]
    finally:
        second.process.terminate()
        second.process.wait(30)


def test_metrics_and_state(server: Server) -> None:
    text = server.client.get("/../metrics", cast_to=str)
    assert "avdiff_jobs" in text and "avdiff_stage_seconds_count" in text
    page = json.loads(server.client.get("/../openapi.json", cast_to=str))
    assert {"/v1/videos", "/v1/videos/{video_id}/remix"} <= set(page["paths"])
