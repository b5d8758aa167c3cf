"""Worker: a process that loads the model once and makes one waiting clip after the other.

    python -m avdiff.serve.worker --folder FOLDER --model MODEL --name NAME [--loras FOLDER]

It dies with the server that started it. A job that it leaves unfinished waits again and gives the
same bytes from another worker, since the seed is part of the request.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import avdiff
from avdiff.serve.jobs import COMPLETED, Job, JobStore
from avdiff.serve.render import VIDEO_NAME, render, write_assets

if TYPE_CHECKING:
    from avdiff.pipelines.pipeline_av import AVDiffPipeline

IDLE_SECONDS = 0.05  # between looks for work
SIGN_SECONDS = 5.0  # between signs of life
PR_SET_PDEATHSIG = 1  # prctl(2): the signal that this process gets when its parent dies


class Cancelled(Exception):
    """The client no longer wants the clip."""


class Stopped(Exception):
    """The server asks the worker to stop."""


@dataclass
class Worker:
    """One worker's loop.

    Args:
        store: the jobs. pipe: the loaded model. model: what the clips' tags call it.
        loras: folder of LoRAs.
    """

    store: JobStore
    pipe: AVDiffPipeline
    name: str
    model: str
    loras: Path | None = None
    stopping: bool = False
    lora: str | None = None

    def run(self) -> None:
        """Work until asked to stop or left alone."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
        parent = os.getppid()
        last_sign = 0.0
        while not self.stopping and os.getppid() == parent:
            if time.monotonic() - last_sign > SIGN_SECONDS:
                self.store.note_worker(self.name, os.getpid(), ready=True)
                last_sign = time.monotonic()
            job = self.store.claim(self.name)
            if job is None:
                time.sleep(IDLE_SECONDS)
            else:
                self.work(job)

    def work(self, job: Job) -> None:
        """Make one clip; whatever happens, the job ends or waits again."""
        try:
            began = time.perf_counter()
            result = self._make(job)
            self.store.note_stage("total", time.perf_counter() - began)
            self.store.finish(job.id, self.name, result)
        except Stopped:
            self.store.give_back(job.id, self.name)
        except Cancelled:
            self.store.fail(job.id, self.name, "cancelled", "cancelled by the client")
        except ValueError as error:
            self.store.fail(job.id, self.name, "invalid_value", " ".join(str(error).split()))
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            self.store.fail(job.id, self.name, "server_error", " ".join(said.split())[:300])

    def _make(self, job: Job) -> dict[str, Any]:
        request = job.request
        folder = self.store.assets(job.id)
        inputs = {role: _only(self.store.inputs(job.id), role) for role in request.inputs}
        source = None
        source_prompt = None
        if request.source is not None and request.kind in ("extend", "edit"):
            earlier = self.store.get(request.source)
            source = self.store.assets(request.source) / VIDEO_NAME
            if earlier is None or earlier.status != COMPLETED or not source.is_file():
                raise ValueError(f"video={request.source}: is no finished clip any more")
            source_prompt = earlier.request.prompt
        self._use_lora(request.lora)

        def on_step(step: int, steps: int) -> None:
            if self.stopping:
                raise Stopped
            if not self.store.progress(job.id, self.name, step, steps):
                raise Cancelled

        began = time.perf_counter()
        rendered = render(self.pipe, request, inputs, source, source_prompt, on_step)
        generated = time.perf_counter() - began
        facts = {
            "model": self.model,
            "seed": request.seed,
            "prompt": request.prompt,
            "avdiff": avdiff.__version__,
        }
        shape = write_assets(rendered, folder, facts)
        self.store.note_stage("generate", generated)
        self.store.note_stage("write", shape["write_seconds"])
        return shape | {"generate_seconds": round(generated, 4)}

    def _use_lora(self, name: str | None) -> None:
        """Put the asked LoRA on the pipeline, and only that."""
        if name == self.lora:
            return
        if self.lora is not None:
            self.pipe.unload_lora_weights()
            self.lora = None
        if name is not None:
            assert self.loras is not None  # requests were checked against this folder
            self.pipe.load_lora_weights(str(self.loras / name))
            self.lora = name

    def _stop(self, *_: Any) -> None:
        self.stopping = True


def _only(folder: Path, role: str) -> Path:
    """The file that was uploaded for a role."""
    found = sorted(folder.glob(f"{role}.*"))
    if not found:
        raise ValueError(f"{role}: the uploaded file is gone")
    return found[0]


def die_with_parent() -> None:
    """On Linux: be killed when the server is, so that no orphan computes on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def load_model(model: str) -> AVDiffPipeline:
    """The pipeline by a preset's name or a folder, on the best device there is."""
    import torch
    from diffusers.utils import logging

    from avdiff import PRESENTER, AVDiffPipeline

    logging.set_verbosity_error()
    pipe = AVDiffPipeline.from_pretrained(PRESENTER if model == "presenter" else model)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def main(folder: Path, model: str, name: str, loras: Path | None = None) -> None:
    """Entry point of the process."""
    die_with_parent()
    store = JobStore(folder)
    store.note_worker(name, os.getpid(), ready=False)
    pipe = load_model(model)
    for left in (folder / "assets").glob(f".*.{os.getpid()}"):
        shutil.rmtree(left, ignore_errors=True)
    Worker(store, pipe, name, model, loras).run()


if __name__ == "__main__":
    typer.run(main)
