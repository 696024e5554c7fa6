"""Starting the local page: what it is of, where it listens, who may read it."""

from __future__ import annotations

import secrets
import socket
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from uvicorn.config import Config
from uvicorn.server import Server

from pipeline.browse.application import Browse, application
from pipeline.browse.guard import Guard, is_loopback
from pipeline.browse.reports import run_folders
from stages.errors import UserError
from store import PredictionStore
from store.object_url import ObjectUrl, place_of

LEAST_TOKEN_LETTERS = 16
LAST_ANSWERS_S = 2


@dataclass(frozen=True)
class Listening:
    """Where the page listens, and who may read it."""

    host: str = "127.0.0.1"
    """Name or address of this machine; another one than loopback is reached from elsewhere."""
    port: int = 8765
    """TCP port; 0 takes any free one."""
    token: str | None = None
    """What readers must know; None asks for none on loopback, and draws one elsewhere."""

    def __post_init__(self) -> None:
        if self.token is not None and len(self.token) < LEAST_TOKEN_LETTERS:
            raise UserError(
                f"--token has {len(self.token)} letters but must have at least "
                f"{LEAST_TOKEN_LETTERS}: leave it out where one is to be drawn"
            )


@dataclass(frozen=True)
class PageServer:
    """A page that takes connections, which `run` answers."""

    address: str
    """What to open, with the token where one is needed."""
    bound: socket.socket
    server: Server

    def run(self) -> None:
        """Answer until `server.should_exit` is set or the process is interrupted."""
        with self.bound:
            self.server.run(sockets=[self.bound])


def page_server(browse: Browse, listening: Listening) -> PageServer:
    """Listen; raises `UserError` where the address is in use or not this machine's."""
    local = is_loopback(listening.host)
    token = listening.token or (None if local else secrets.token_urlsafe(24))
    bound = _bound(listening)
    port = bound.getsockname()[1]
    app = Guard(application(browse), token, local, f"foretell-{port}")
    server = Server(_server_config(app))
    return PageServer(_address(listening.host, port, token), bound, server)


def serve_page(
    browse: Browse, listening: Listening, tell: Callable[[str], None], *, open_browser: bool
) -> None:
    """Serve until interrupted; `tell` gets the address once connections are taken.

    Raises `UserError` as `page_server` does.
    """
    page = page_server(browse, listening)
    tell(page.address)
    if open_browser:
        webbrowser.open(page.address)
    with suppress(KeyboardInterrupt):  # which is how a person ends it
        page.run()


def browse_of(place: str, runs: Sequence[Path], dataset: Path | None) -> Browse:
    """Return what is shown of a store, or of a run's folder, and of further runs' folders.

    A store that lies in a run's folder brings this run, as soon as there is anything to show of it.
    Raises `UserError` and `StoreError`.
    """
    at = place_of(place)
    store_at = _store_at(at)
    for folder in runs:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder of a run: name one of runs/")
    store = None if store_at is None else PredictionStore.open(store_at)
    if isinstance(at, Path) and at != store_at:
        return Browse(store, run_folders([at, *runs]), dataset)
    around = at.parent if isinstance(at, Path) else None
    return Browse(store, run_folders(runs, around), dataset)


def _store_at(at: Path | ObjectUrl) -> Path | ObjectUrl | None:
    """Where the store is of what a person named; None for a run without one."""
    if not isinstance(at, Path) or (at / "manifest.json").exists():
        return at
    if (at / "store" / "manifest.json").exists():
        return at / "store"
    if (at / "report" / "report.json").is_file():
        return None
    raise UserError(
        f"{at} is neither a store nor the folder of a run: it has no manifest.json, no "
        "store/manifest.json and no report/report.json"
    )


def _bound(listening: Listening) -> socket.socket:
    """Bind and listen; raises `UserError`."""
    host, port = listening.host, listening.port
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=64)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; "
            "choose another --port (0 takes any free one) or --host"
        ) from error


def _address(host: str, port: int, token: str | None) -> str:
    shown = f"[{host}]" if ":" in host else host
    if host in ("0.0.0.0", "::"):
        shown = socket.gethostname()
    query = "" if token is None else "?" + urlencode({"token": token})
    return f"http://{shown}:{port}/{query}"


def _server_config(app: Any) -> Config:
    """No log of requests, for their addresses may hold the token."""
    return Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        interface="asgi3",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=LAST_ANSWERS_S,
    )
