"""Settings of a server: folders, limits, tokens."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from dataclasses import dataclass
from pathlib import Path

LOOPBACK_NAMES = ("localhost",)


@dataclass(frozen=True)
class ServeSettings:
    """What a server is allowed to do.

    Args:
        folder: where jobs, uploads and finished clips are kept.
        model: folder or hub name of the pipeline; name: what clients call it.
        workers: processes that compute, each with a model of its own.
        tokens: bearer tokens that are let in; none lets everybody in, on loopback alone.
        lora_folder: folder of LoRAs that requests may name; None for none.
        max_body: bytes of a request. max_seconds: of a clip. max_side: pixels of a side.
        max_queue, max_client: waiting jobs of all clients and of one.
        body_timeout: seconds in which a request has to arrive.
        keep_seconds, keep_bytes: finished clips older than this, or beyond this in all, are
            removed.
    """

    folder: Path
    model: str = "presenter"
    name: str = "presenter"
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    tokens: tuple[str, ...] = ()
    lora_folder: Path | None = None
    max_body: int = 64 * 2**20
    max_seconds: float = 60.0
    max_side: int = 512
    max_queue: int = 500
    max_client: int = 200
    body_timeout: float = 60.0
    keep_seconds: float = 7 * 86400.0
    keep_bytes: int = 20 * 2**30

    def check(self) -> ServeSettings:
        """Refuse what is unsafe or cannot work.

        Raises:
            ValueError: names the option, its value and what fits.
        """
        if self.workers < 1 or self.workers > 64:
            raise ValueError(f"workers={self.workers}: needs a number from 1 to 64")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port}: needs a number from 0 to 65535")
        if not self.tokens and not is_loopback(self.host):
            raise ValueError(
                f"host={self.host}: anybody who reaches it could use this machine; needs "
                "--token-file FILE, or host 127.0.0.1"
            )
        if self.lora_folder is not None and not self.lora_folder.is_dir():
            raise ValueError(f"lora_folder={self.lora_folder}: no such folder")
        return self

    def client_of(self, authorization: str | None, address: str) -> str | None:
        """Stable name of who asks, or None where the token is missing or wrong.

        All tokens are compared, each in constant time, so that the answer's time tells nothing.
        """
        if not self.tokens:
            return f"address:{address}"
        scheme, _, offered = (authorization or "").partition(" ")
        found = None
        for token in self.tokens:
            if hmac.compare_digest(offered.strip().encode(), token.encode()):
                found = token
        if found is None or scheme.lower() != "bearer":
            return None
        return "token:" + hashlib.sha256(found.encode()).hexdigest()[:16]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_tokens(path: Path) -> tuple[str, ...]:
    """Tokens of a file, one a line; empty lines and lines that begin with # are left out.

    Raises:
        ValueError: no such file, no token in it, or one shorter than 16 characters.
    """
    if not path.is_file():
        raise ValueError(f"token_file={path}: no such file")
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    tokens = tuple(line for line in lines if line and not line.startswith("#"))
    if not tokens:
        raise ValueError(f"token_file={path}: holds no token; needs one a line")
    if any(len(token) < 16 for token in tokens):
        raise ValueError(f"token_file={path}: holds a token of under 16 characters; needs longer")
    return tokens
