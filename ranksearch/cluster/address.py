"""Checks addresses of Ray clusters before Ray is imported, which takes seconds."""

from __future__ import annotations

import socket

from ranksearch.errors import UsageError

CONNECT_SECONDS = 10


def check_address(address: str | None) -> None:
    """Raises UsageError for a Ray address where nothing answers: Ray itself would keep trying for minutes.

    "auto" (or None) is left to Ray, which fails at once if this machine is part of no cluster.
    """
    if address in (None, "auto", "local"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        raise UsageError(f"--address {address}: expected auto or HOST:PORT, such as 10.0.0.1:6379.")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"--address {address}: no Ray cluster answers there ({error}); is `ray start --head` running?"
        ) from error
