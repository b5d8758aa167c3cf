"""Jobs in SQLite: an id that was given out never becomes unknown, whatever dies.

One table holds every job from the moment it is accepted. Workers take the oldest that waits by one
atomic statement; what a dead worker had taken waits again. WAL mode lets the application read
while a worker writes, and a commit is on disk before its client hears of it.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avdiff.serve.requests import ClipRequest

QUEUED = "queued"
RUNNING = "in_progress"
COMPLETED = "completed"
FAILED = "failed"
MAX_ATTEMPTS = 8  # a job that kills its worker so often will kill the next one too

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT UNIQUE NOT NULL,
    client TEXT NOT NULL,
    status TEXT NOT NULL,
    request TEXT NOT NULL,
    same TEXT,
    idempotency TEXT,
    created REAL NOT NULL,
    started REAL,
    completed REAL,
    step INTEGER NOT NULL DEFAULT 0,
    steps INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    worker TEXT,
    cancelled INTEGER NOT NULL DEFAULT 0,
    deleted INTEGER NOT NULL DEFAULT 0,
    error_code TEXT,
    error_message TEXT,
    result TEXT
);
CREATE INDEX IF NOT EXISTS by_status ON jobs (status, number);
CREATE INDEX IF NOT EXISTS by_client ON jobs (client, number);
CREATE UNIQUE INDEX IF NOT EXISTS by_idempotency ON jobs (client, idempotency)
    WHERE idempotency IS NOT NULL;
CREATE TABLE IF NOT EXISTS workers (
    name TEXT PRIMARY KEY, pid INTEGER NOT NULL, ready INTEGER NOT NULL, seen REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS stages (
    stage TEXT PRIMARY KEY, seconds REAL NOT NULL, count INTEGER NOT NULL
);
"""


@dataclass(frozen=True)
class Job:
    """One row: see `SCHEMA`."""

    number: int
    id: str
    client: str
    status: str
    request: ClipRequest
    created: float
    started: float | None
    completed: float | None
    step: int
    steps: int
    attempts: int
    cancelled: bool
    error_code: str | None
    error_message: str | None
    result: dict[str, Any]


class JobStore:
    """The jobs of a folder.

    Args:
        folder: holds `jobs.sqlite`, `inputs/` and `assets/`; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("inputs", "assets"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._path = folder / "jobs.sqlite"
        with self._open() as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.executescript(SCHEMA)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction: threads and processes share nothing but the file."""
        database = sqlite3.connect(self._path, timeout=30, isolation_level=None)
        database.row_factory = sqlite3.Row
        try:
            # FULL: what a client was told survives a loss of power too
            database.execute("PRAGMA synchronous = FULL")
            yield database
        finally:
            database.close()

    def assets(self, job_id: str) -> Path:
        """Folder of what a job made."""
        return self.folder / "assets" / job_id

    def inputs(self, job_id: str) -> Path:
        """Folder of what was uploaded for a job."""
        return self.folder / "inputs" / job_id

    # -- the application's side

    def add(
        self,
        job_id: str,
        client: str,
        request: ClipRequest,
        idempotency: str | None = None,
        same: str | None = None,
    ) -> Job:
        """Accept a job; with an idempotency key that this client used before, the earlier job.

        Args:
            same: key of requests that give the same clip; None where the seed was drawn.
        """
        with self._open() as database:
            database.execute(
                "INSERT INTO jobs (id, client, status, request, same, idempotency, created) "
                "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (job_id, client, QUEUED, request.to_json(), same, idempotency, time.time()),
            )
            query = "SELECT * FROM jobs WHERE id = ?"
            row = database.execute(query, (job_id,)).fetchone()
            if row is None:
                query = "SELECT * FROM jobs WHERE client = ? AND idempotency = ?"
                row = database.execute(query, (client, idempotency)).fetchone()
        return _job(row)

    def find_same(self, client: str, same: str) -> Job | None:
        """A finished job of this client that made the same clip, with its file."""
        query = (
            "SELECT * FROM jobs WHERE client = ? AND same = ? AND status = ? AND deleted = 0 "
            "ORDER BY number DESC LIMIT 1"
        )
        with self._open() as database:
            row = database.execute(query, (client, same, COMPLETED)).fetchone()
        return None if row is None else _job(row)

    def get(self, job_id: str, client: str | None = None) -> Job | None:
        """A job; with `client`, only one of theirs."""
        with self._open() as database:
            row = database.execute(
                "SELECT * FROM jobs WHERE id = ? AND deleted = 0", (job_id,)
            ).fetchone()
        if row is None or (client is not None and row["client"] != client):
            return None
        return _job(row)

    def page(
        self, client: str, limit: int, after: str | None, descending: bool
    ) -> tuple[list[Job], bool]:
        """Jobs of a client in order of creation, and whether there are more.

        Raises:
            KeyError: `after` is no job of this client.
        """
        sign, order = ("<", "DESC") if descending else (">", "ASC")
        values: list[Any] = [client]
        query = "SELECT * FROM jobs WHERE client = ? AND deleted = 0"
        with self._open() as database:
            if after is not None:
                mark = database.execute(
                    "SELECT number FROM jobs WHERE id = ? AND client = ?", (after, client)
                ).fetchone()
                if mark is None:
                    raise KeyError(after)
                query += f" AND number {sign} ?"
                values.append(mark["number"])
            rows = database.execute(
                f"{query} ORDER BY number {order} LIMIT ?", (*values, limit + 1)
            ).fetchall()
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    def delete(self, job_id: str, client: str) -> bool:
        """Forget a job of a client; one that waits or runs is cancelled by it."""
        with self._open() as database:
            done = database.execute(
                "UPDATE jobs SET deleted = 1, cancelled = 1 "
                "WHERE id = ? AND client = ? AND deleted = 0",
                (job_id, client),
            )
            database.execute(
                "UPDATE jobs SET status = ?, error_code = 'cancelled', completed = ? "
                "WHERE id = ? AND status = ?",
                (FAILED, time.time(), job_id, QUEUED),
            )
        return done.rowcount > 0

    def cancel(self, job_id: str, client: str) -> bool:
        """Stop a job: at once where it waits, after the running step where it runs."""
        said = "cancelled by the client"
        with self._open() as database:
            found = database.execute(
                "UPDATE jobs SET cancelled = 1 WHERE id = ? AND client = ? AND deleted = 0",
                (job_id, client),
            )
            database.execute(
                "UPDATE jobs SET status = ?, error_code = 'cancelled', error_message = ?, "
                "completed = ? WHERE id = ? AND client = ? AND status = ?",
                (FAILED, said, time.time(), job_id, client, QUEUED),
            )
        return found.rowcount > 0

    def waiting(self, client: str | None = None) -> int:
        """Jobs that wait or run, of all or of one client."""
        query = "SELECT COUNT(*) FROM jobs WHERE status IN (?, ?) AND deleted = 0"
        values = [QUEUED, RUNNING]
        if client is not None:
            query += " AND client = ?"
            values.append(client)
        with self._open() as database:
            return int(database.execute(query, values).fetchone()[0])

    def position(self, job: Job) -> int:
        """Jobs that will be taken before this one."""
        with self._open() as database:
            row = database.execute(
                "SELECT COUNT(*) FROM jobs WHERE status = ? AND number < ?", (QUEUED, job.number)
            ).fetchone()
        return int(row[0])

    # -- the workers' side

    def claim(self, worker: str) -> Job | None:
        """Take the oldest job that waits; None where none does."""
        with self._open() as database:
            row = database.execute(
                "UPDATE jobs SET status = ?, worker = ?, started = ?, step = 0, "
                "attempts = attempts + 1 WHERE number = (SELECT number FROM jobs "
                "WHERE status = ? AND deleted = 0 ORDER BY number LIMIT 1) RETURNING *",
                (RUNNING, worker, time.time(), QUEUED),
            ).fetchone()
        return None if row is None else _job(row)

    def progress(self, job_id: str, worker: str, step: int, steps: int) -> bool:
        """Note a step; returns whether the job is still wanted of this worker."""
        with self._open() as database:
            row = database.execute(
                "UPDATE jobs SET step = ?, steps = ? WHERE id = ? AND worker = ? AND status = ? "
                "RETURNING cancelled",
                (step, steps, job_id, worker, RUNNING),
            ).fetchone()
        return row is not None and not row["cancelled"]

    def finish(self, job_id: str, worker: str, result: dict[str, Any]) -> bool:
        """The clip is in its folder; returns False where another worker has the job by now."""
        with self._open() as database:
            done = database.execute(
                "UPDATE jobs SET status = ?, completed = ?, result = ?, step = steps, "
                "worker = NULL WHERE id = ? AND worker = ? AND status = ?",
                (COMPLETED, time.time(), json.dumps(result), job_id, worker, RUNNING),
            )
        return done.rowcount > 0

    def fail(self, job_id: str, worker: str, code: str, message: str) -> None:
        """End a job without a clip."""
        with self._open() as database:
            database.execute(
                "UPDATE jobs SET status = ?, completed = ?, error_code = ?, error_message = ?, "
                "worker = NULL WHERE id = ? AND worker = ? AND status = ?",
                (FAILED, time.time(), code, message, job_id, worker, RUNNING),
            )

    def complete_from(self, job_id: str, earlier: Job) -> None:
        """End a job that waits with the clip of an earlier one, whose files were linked already."""
        with self._open() as database:
            database.execute(
                "UPDATE jobs SET status = ?, completed = ?, result = ?, step = ?, steps = ? "
                "WHERE id = ? AND status = ?",
                (
                    COMPLETED,
                    time.time(),
                    json.dumps(earlier.result | {"answered_from_store": True}),
                    earlier.steps,
                    earlier.steps,
                    job_id,
                    QUEUED,
                ),
            )

    def release(self, worker: str | None = None) -> int:
        """What a dead worker had taken (None: any) waits again; returns how many jobs.

        A job that was taken too often fails instead: it would take one worker after the other down.
        """
        chosen = "status = ?" if worker is None else "status = ? AND worker = ?"
        who = [RUNNING] if worker is None else [RUNNING, worker]
        said = f"the worker died {MAX_ATTEMPTS} times while it made this clip"
        with self._open() as database:
            database.execute(
                "UPDATE jobs SET status = ?, completed = ?, error_code = 'worker_died', "
                f"error_message = ? WHERE {chosen} AND attempts >= ?",
                (FAILED, time.time(), said, *who, MAX_ATTEMPTS),
            )
            back = database.execute(
                f"UPDATE jobs SET status = ?, worker = NULL, started = NULL WHERE {chosen}",
                (QUEUED, *who),
            )
        return back.rowcount

    def give_back(self, job_id: str, worker: str) -> None:
        """A worker that is asked to stop leaves its job as if it had never taken it."""
        with self._open() as database:
            database.execute(
                "UPDATE jobs SET status = ?, worker = NULL, started = NULL, "
                "attempts = attempts - 1 WHERE id = ? AND worker = ? AND status = ?",
                (QUEUED, job_id, worker, RUNNING),
            )

    def note_worker(self, name: str, pid: int, ready: bool) -> None:
        """A sign of life."""
        with self._open() as database:
            database.execute(
                "INSERT OR REPLACE INTO workers VALUES (?, ?, ?, ?)",
                (name, pid, int(ready), time.time()),
            )

    def forget_workers(self, name: str | None = None) -> None:
        """No signs of life of one worker, or of those before a start."""
        with self._open() as database:
            if name is None:
                database.execute("DELETE FROM workers")
            else:
                database.execute("DELETE FROM workers WHERE name = ?", (name,))

    def ready_workers(self) -> int:
        """Workers with a loaded model."""
        with self._open() as database:
            row = database.execute("SELECT COUNT(*) FROM workers WHERE ready = 1").fetchone()
        return int(row[0])

    def note_stage(self, stage: str, seconds: float) -> None:
        """Add to the time that a stage of making clips took."""
        with self._open() as database:
            database.execute(
                "INSERT INTO stages VALUES (?, ?, 1) ON CONFLICT (stage) DO UPDATE SET "
                "seconds = seconds + excluded.seconds, count = count + 1",
                (stage, seconds),
            )

    def counts(self) -> dict[str, dict[str, float]]:
        """For the metrics: jobs by status, failures by code, seconds and counts by stage."""
        with self._open() as database:
            status = database.execute("SELECT status, COUNT(*) FROM jobs GROUP BY status")
            by_status = {row[0]: float(row[1]) for row in status}
            codes = database.execute(
                "SELECT error_code, COUNT(*) FROM jobs WHERE error_code IS NOT NULL "
                "GROUP BY error_code"
            )
            by_code = {row[0]: float(row[1]) for row in codes}
            stages = database.execute("SELECT stage, seconds, count FROM stages").fetchall()
        return {
            "status": by_status,
            "code": by_code,
            "seconds": {row["stage"]: row["seconds"] for row in stages},
            "count": {row["stage"]: float(row["count"]) for row in stages},
        }

    def mean_seconds(self) -> float | None:
        """Mean time of a finished clip in its worker, for the time left."""
        with self._open() as database:
            row = database.execute(
                "SELECT AVG(completed - started) FROM (SELECT completed, started FROM jobs "
                "WHERE status = ? AND started IS NOT NULL ORDER BY number DESC LIMIT 20)",
                (COMPLETED,),
            ).fetchone()
        return row[0]

    def expired(self, before: float) -> list[Job]:
        """Finished jobs from before a time, oldest first, deleted ones too."""
        with self._open() as database:
            rows = database.execute(
                "SELECT * FROM jobs WHERE status IN (?, ?) AND completed < ? ORDER BY completed",
                (COMPLETED, FAILED, before),
            ).fetchall()
        return [_job(row) for row in rows]

    def expire(self, job_id: str) -> None:
        """A finished clip was removed for its age or for room."""
        with self._open() as database:
            database.execute(
                "UPDATE jobs SET status = ?, error_code = 'expired', error_message = "
                "'the clip was removed after its time' WHERE id = ? AND status = ?",
                (FAILED, job_id, COMPLETED),
            )


def new_id(prefix: str = "video") -> str:
    """An id that nobody can guess."""
    return f"{prefix}_{secrets.token_hex(16)}"


def _job(row: sqlite3.Row) -> Job:
    return Job(
        number=row["number"],
        id=row["id"],
        client=row["client"],
        status=row["status"],
        request=ClipRequest.from_json(row["request"]),
        created=row["created"],
        started=row["started"],
        completed=row["completed"],
        step=row["step"],
        steps=row["steps"],
        attempts=row["attempts"],
        cancelled=bool(row["cancelled"]),
        error_code=row["error_code"],
        error_message=row["error_message"],
        result=json.loads(row["result"]) if row["result"] else {},
    )
