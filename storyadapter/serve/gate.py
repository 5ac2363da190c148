"""What every request passes before it is read: known host, valid key, a body of a known kind and limited length.

And what every answer gets: its headers.
"""

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable, Mapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from storyadapter.method.errors import Field, InputError
from storyadapter.serve.limits import Limits
from storyadapter.serve.problems import Problem, response

COOKIE: Final = "storyadapter-key"
_OPEN: Final = re.compile(r"/|/healthz|/readyz|/page/.*|/session|/docs|/openapi\.json")  # nothing of anybody's is there
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_KIND: Final = "content-type"
_BODY_METHODS: Final = ("POST", "PUT", "PATCH")
UPLOADS: Final = "/v1/uploads"  # where pictures are sent, and everywhere else JSON
_PICTURE: Final = re.compile(r"image/.+|application/octet-stream")


class Keys:
    """API keys: a name and the SHA-256 of a key in each line of a file, `alice:9f86d0…`; `#` begins a comment.

    Raises:
        InputError: the file can't be read, or a line is something else.
    """

    def __init__(self, path: Path | None) -> None:
        self._by_digest: dict[str, str] = {}
        if path is None:
            return
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(Field("keys"), f": {path} can't be read: {error}") from error
        for number, line in enumerate(lines, 1):
            if not (line := line.partition("#")[0].strip()):
                continue
            match = re.fullmatch(r"([\w.@-]+):([0-9a-f]{64})", line)
            if match is None:
                raise InputError(
                    Field("keys"), f": {path}, line {number} is no key,", expected="NAME:SHA-256 in hexadecimal digits"
                )
            self._by_digest[match[2]] = match[1]
        if not self._by_digest:
            raise InputError(Field("keys"), f": {path} holds no key")

    def __bool__(self) -> bool:
        return bool(self._by_digest)

    def owner(self, key: str) -> str | None:
        """Whose key it is; compares with every one, so that the time doesn't tell how far it was right."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        for known, name in self._by_digest.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Gate:
    """The outermost layer. Puts the owner of the key into the request's state: "" where there are no keys.

    Args:
        app: what is behind it.
        keys: none, or one of them is needed.
        hosts: names by which the server may be called, without a port.
        limits: of the server.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys, hosts: Iterable[str], limits: Limits) -> None:
        self._app = app
        self._keys = keys
        self._hosts = frozenset(host.lower() for host in hosts)
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        read, limit = 0, self._limits.limit_upload if scope["path"] == UPLOADS else self._limits.limit_body

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                raise _too_long(limit)
            return message

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            scope.setdefault("state", {})["owner"] = self._checked(scope, limit)
        except Problem as problem:
            await response(problem)(scope, receive, guarded)
            return
        await self._app(scope, limited, guarded)

    def _checked(self, scope: Scope, limit: int) -> str:
        """The owner; `limit`: bytes of the body. Raises Problem."""
        headers = Headers(scope=scope)
        host = re.sub(r":\d+$", "", headers.get("host", "")).lower()
        if host not in self._hosts:
            raise Problem(421, f"this server isn't called {host!r}", field="host")
        if scope["method"] in _BODY_METHODS:
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if scope["path"] == UPLOADS:
                if not _PICTURE.fullmatch(kind):
                    raise Problem(415, "the body isn't a picture; expected Content-Type: image/png", field=_KIND)
            elif kind != "application/json":
                raise Problem(415, "the body isn't JSON; expected Content-Type: application/json", field=_KIND)
            if int(length) > limit if (length := headers.get("content-length", "")).isdecimal() else False:
                raise _too_long(limit)
        if not self._keys or _OPEN.fullmatch(scope["path"]):
            return ""
        owner = self._keys.owner(_given_key(headers))
        if owner is None:
            raise Problem(401, "expected Authorization: Bearer KEY")
        return owner


def _too_long(limit: int) -> Problem:
    return Problem(413, f"the body has more than {limit} bytes", field="body")


def _given_key(headers: Mapping[str, str]) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return cookie.value if cookie else ""
