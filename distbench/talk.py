"""What rank 0 and a driver say to each other beside the queries, and how a driver is called.

JSON and arrays of int64 over a link of ``wire``: nothing is unpickled. Callers show a token.
"""

from __future__ import annotations

import importlib
import json
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distbench import wire
from distbench.errors import UsageError
from distbench.wire import Link, LinkClosed, Seat

TELL, RAW = 40, 41
"""Kinds of frames between rank 0 and the driver: JSON, and int64 numbers that belong to it."""
PIECE_BYTES = 32 << 20
LIMIT_BYTES = 2 << 30
"""Of one array: more than all columns of as many samples as are gathered."""
CALL_S, LOAD_S = 60.0, 600.0
"""How long all links together may take to open, and a model to load its samples."""


def tell(link: Link, value: dict[str, Any], *arrays: Any) -> None:
    """Send JSON, and after it arrays of int64 in pieces.

    Raises:
        LinkClosed: the other end is gone.
    """
    blobs = [np.ascontiguousarray(each, "<i8").tobytes() for each in arrays]
    link.send(TELL, json.dumps({**value, "sizes": [len(each) for each in blobs]}).encode())
    for blob in blobs:
        for begin in range(0, len(blob), PIECE_BYTES):
            link.send(RAW, blob[begin : begin + PIECE_BYTES])


def hear(link: Link) -> tuple[dict[str, Any], list[Any]]:
    """Receive what ``tell`` sent: the JSON, and the arrays, flat.

    Raises:
        LinkClosed: the other end is gone, or says something else.
        TimeoutError: it said nothing in time.
    """
    kind, payload = link.receive()
    if kind != TELL:
        raise LinkClosed(f"{link.seat} sent a frame of kind {kind}")
    value = json.loads(payload)
    arrays = []
    for size in value.pop("sizes"):
        if not 0 <= size <= LIMIT_BYTES:
            raise LinkClosed(f"{link.seat} sends {size} bytes at once; {LIMIT_BYTES} is the limit")
        blob = bytearray()
        while len(blob) < size:
            kind, piece = link.receive()
            if kind != RAW:
                raise LinkClosed(f"{link.seat} sent a frame of kind {kind}")
            blob += piece
        arrays.append(np.frombuffer(bytes(blob), "<i8").astype(np.int64))
    return value, arrays


def take_link(server: socket.socket, own: Seat, token: str, until: float) -> Link | None:
    """Take one proven link; strays are dropped. None after ``until``, of ``time.monotonic``."""
    while (left := until - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            connection, _ = server.accept()
        except TimeoutError:
            return None
        link = wire.greet(connection, own, token)
        if link is None:
            connection.close()
            continue
        wire.echo(link, own, answers=True)
        return link
    return None


def read_token(path: str) -> str:
    """Read a token.

    Raises:
        UsageError: the file cannot be read or holds no word of 16 characters or more.
    """
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UsageError(f"the token file {path} cannot be read: {error}") from error
    if len(token) < 16:
        raise UsageError(f"the token in {path} has fewer than 16 characters: make a longer one")
    return token


def address_of(text: str) -> tuple[str, int]:
    """Split ADDR, ADDR:PORT or [ADDR]:PORT; without a port it is 0.

    Raises:
        UsageError: the port is no number.
    """
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        host, port = text, "0"
    if not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{text!r} has no port: write ADDR:PORT, such as 10.0.0.2:29600")
    return host.strip("[]"), int(port)


def encoder(module: str) -> Callable[[Sequence[int]], Sequence[bytes]]:
    """Return the function that encodes samples, from an embedded model's module.

    Raises:
        UsageError: it is none.
    """
    if not module.startswith("distbench.models."):
        raise UsageError(f"{module} is no module of an embedded model's samples")
    found: Callable[[Sequence[int]], Sequence[bytes]] = importlib.import_module(module).samples
    return found
