"""Who may ask the local page for what: method, host, token, and what a browser may do with it."""

from __future__ import annotations

import hmac
import ipaddress
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN = "token"
METHODS = ("GET", "HEAD")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
"""What every answer says, unless it says something stricter of its own."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at a host name or address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Guard:
    """Lets nothing through but reading, by whom it is meant for.

    On loopback another site could have its own name point here and read along (DNS rebinding), so
    only loopback names are answered. Elsewhere the token keeps everybody else out.
    """

    app: ASGIApp
    token: str | None
    """What must be known to read anything; None asks for nothing."""
    loopback_only: bool
    """Whether requests must have been sent to a loopback name or address."""
    cookie: str
    """Name of the cookie that holds the token; cookies do not know ports, so it bears one."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        answer: ASGIApp = self._refusal(scope) or self.app
        await answer(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        """What is answered instead of the page; None where the request is fine."""
        headers = Headers(scope=scope)
        if self.loopback_only and not is_loopback(_host_of(headers.get("host", ""))):
            return _told("this address is not the server's: open the one that it printed", 403)
        if scope["method"] not in METHODS:
            refused = _told("this page is read-only: it answers GET and HEAD", 405)
            refused.headers["allow"] = ", ".join(METHODS)
            return refused
        return None if self.token is None else self._token_refusal(scope, headers, self.token)

    def _token_refusal(self, scope: Scope, headers: Headers, token: str) -> Response | None:
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for name, value in query if name == TOKEN]
        if given and _same(given[-1], token):
            if scope["path"] != "/":
                return None
            # The address that is kept in the history, and sent on, is one without the token.
            rest = urlencode([pair for pair in query if pair[0] != TOKEN])
            moved = RedirectResponse(f"/?{rest}" if rest else "/", 303)
            moved.set_cookie(self.cookie, token, path="/", httponly=True, samesite="strict")
            return moved
        # Other servers of this machine set cookies too, of any form: a strict parser would stop.
        cookies = cookie_parser("; ".join(headers.getlist("cookie")))
        if _same(cookies.get(self.cookie, ""), token):
            return None
        return _told("a token is missing or wrong: open the address that the server printed", 401)


def _told(message: str, status: int) -> Response:
    return PlainTextResponse(f"{message}\n", status)


def _same(given: str, expected: str) -> bool:
    """Compare in a time that tells nothing of where the first difference is."""
    return hmac.compare_digest(given.encode(), expected.encode())


def _host_of(header: str) -> str:
    """The name or address of a Host header, without port and brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]
