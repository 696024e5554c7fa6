"""Parts of a file over HTTP, which a browser asks for to play audio from somewhere else on."""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.responses import Response

ONE_RANGE = re.compile(r"bytes=(?P<first>[0-9]{0,18})-(?P<last>[0-9]{0,18})")


def in_ranges(request: Request, content: bytes, media_type: str) -> Response:
    """Return content, or the one range of it that was asked for (RFC 9110, 14).

    A header of several ranges, or of another form, is answered with all of the content.
    """
    headers = {"accept-ranges": "bytes"}
    asked = ONE_RANGE.fullmatch(request.headers.get("range", ""))
    if asked is None or not (asked["first"] or asked["last"]):
        return Response(content, media_type=media_type, headers=headers)
    size = len(content)
    if asked["first"]:
        first = int(asked["first"])
        last = min(int(asked["last"] or size - 1), size - 1)
    else:  # the last so many bytes
        first, last = max(0, size - int(asked["last"])), size - 1
    if first > last:
        return Response(status_code=416, headers=headers | {"content-range": f"bytes */{size}"})
    headers["content-range"] = f"bytes {first}-{last}/{size}"
    return Response(content[first : last + 1], 206, headers=headers, media_type=media_type)
