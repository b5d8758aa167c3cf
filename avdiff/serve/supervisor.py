"""Supervisor: keeps the worker processes alive and gives back what a dead one had taken."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

from avdiff.serve.jobs import JobStore
from avdiff.serve.settings import ServeSettings

LOOK_SECONDS = 0.2
MAX_RESTARTS = 5  # in a row without a loaded model: then the model is at fault
CLEAN_SECONDS = 300.0
STOP_SECONDS = 10.0
log = logging.getLogger("avdiff.serve")


@dataclass
class Supervisor:
    """Starts workers, restarts them when they die, removes old clips.

    Attributes:
        broken: why no worker can be started any more, or None.
    """

    settings: ServeSettings
    store: JobStore
    broken: str | None = None
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _restarts: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Give back what a killed server left running, then start the workers."""
        back = self.store.release()
        self.store.forget_workers()
        if back:
            log.info("jobs of before wait again", extra={"jobs": back})
        for left in (self.settings.folder / "assets").glob(".*"):
            shutil.rmtree(left, ignore_errors=True)
        for number in range(self.settings.workers):
            self._start(f"worker-{number}")
        self._thread = threading.Thread(target=self._watch, daemon=True, name="supervisor")
        self._thread.start()

    def stop(self) -> None:
        """Ask the workers to leave after their step, then make them."""
        self._ended.set()
        for process in self._processes.values():
            process.terminate()
        limit = time.monotonic() + STOP_SECONDS
        for process in self._processes.values():
            try:
                process.wait(max(0.1, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.store.release()

    def _start(self, name: str) -> None:
        s = self.settings
        command = [sys.executable, "-m", "avdiff.serve.worker", str(s.folder), s.model, name]
        if s.lora_folder is not None:
            command += ["--loras", str(s.lora_folder)]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        self._processes[name] = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )

    def _watch(self) -> None:
        cleaned = 0.0
        while not self._ended.wait(LOOK_SECONDS):
            for name, process in list(self._processes.items()):
                if process.poll() is not None and not self._ended.is_set():
                    self._revive(name, process.returncode)
            if time.monotonic() - cleaned > CLEAN_SECONDS:
                cleaned = time.monotonic()
                remove_old(self.store, self.settings)

    def _revive(self, name: str, code: int) -> None:
        """A worker died: its job waits again, and another takes its place."""
        back = self.store.release(name)
        self.store.forget_workers(name)
        log.warning("a worker died", extra={"worker": name, "code": code, "jobs": back})
        self._restarts = 0 if self.store.ready_workers() or back else self._restarts + 1
        if self._restarts > MAX_RESTARTS:
            self.broken = f"workers die before they have loaded {self.settings.model}"
            log.error(self.broken)
            del self._processes[name]
            return
        self._start(name)


def remove_old(store: JobStore, settings: ServeSettings) -> int:
    """Remove finished clips that are too old, and the oldest where they are too large in all.

    Returns:
        How many were removed.
    """
    removed = 0
    for job in store.expired(time.time() - settings.keep_seconds):
        if store.assets(job.id).is_dir() or store.inputs(job.id).is_dir():
            shutil.rmtree(store.assets(job.id), ignore_errors=True)
            shutil.rmtree(store.inputs(job.id), ignore_errors=True)
            store.expire(job.id)
            removed += 1
    sizes = {
        job.id: sum(f.stat().st_size for f in store.assets(job.id).glob("*"))
        for job in store.expired(time.time())
        if store.assets(job.id).is_dir()
    }
    total = sum(sizes.values())
    for job_id, size in sizes.items():
        if total <= settings.keep_bytes:
            break
        shutil.rmtree(store.assets(job_id), ignore_errors=True)
        store.expire(job_id)
        total -= size
        removed += 1
    return removed
