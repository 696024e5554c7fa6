"""Local pages that tests ask: the real server in a thread of its own."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from pipeline.browse.application import Browse
from pipeline.browse.serving import Listening, page_server


@dataclass
class Answer:
    """What a server answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def value(self) -> Any:
        return json.loads(self.body)


@dataclass
class Served:
    """A page that is served."""

    address: str
    port: int

    def ask(self, path: str, method: str = "GET", **headers: str) -> Answer:
        """Send a request as it is: nothing of the path is changed on the way."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.putrequest(
                method, path, skip_host="Host" in given, skip_accept_encoding=True
            )
            for name, value in given.items():
                connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            names = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, names, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **parameters: Any) -> Any:
        """JSON value at an address of which all is well."""
        answer = self.ask(f"{path}?{urlencode(parameters)}")
        assert answer.status == 200, answer.body
        return answer.value


@contextmanager
def served(browse: Browse, listening: Listening | None = None) -> Iterator[Served]:
    """Serve a page while the block runs."""
    page = page_server(browse, listening or Listening(port=0))
    thread = threading.Thread(target=page.run)
    thread.start()
    try:
        yield Served(page.address, page.bound.getsockname()[1])
    finally:
        page.server.should_exit = True
        thread.join()
