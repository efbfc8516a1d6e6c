"""Plivo's REST API as far as a gateway needs it: requests as values. Nothing is sent here.

Sources: plivo.com/docs/voice/api/call, /docs/voice/api/overview, November 2026.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from urllib.parse import quote

from gateway.errors import UnsupportedCommand
from gateway.provider import ApiReply, HttpRequest

from . import _account, _xml
from ._json import read_object, text, write

API_URL = "https://api.plivo.com"
_ACCOUNT = re.compile("[A-Z0-9]{20}")


def check(account_id: str | None, auth_token: str | list[str] | None, api_url: str) -> Iterable[str]:
    """The credentials are complete; else yields what is wrong."""
    yield from _account.check_api(account_id, auth_token, api_url)
    if account_id is not None and not _ACCOUNT.fullmatch(account_id):
        yield "account_id: is no Auth ID; those are 20 capital letters and digits, on the console's first page"


class Api:
    """Requests of one account; without `account_id` each raises UnsupportedCommand."""

    def __init__(self, account_id: str | None, auth_token: str | list[str] | None, api_url: str) -> None:
        self._account_id = account_id
        self._auth_token = auth_token
        self._api_url = api_url

    def place(self, to: str, from_: str, answer_url: str, status_url: str | None) -> HttpRequest:
        """201 with a `request_uuid`, which is the call's id where one number is called."""
        if "<" in to:  # Plivo's separator of several numbers
            raise UnsupportedCommand("to: one number; several take a call each")
        status = {} if status_url is None else {"hangup_url": status_url, "hangup_method": "POST"}
        return self._send("POST", "", {"from": from_, "to": to, "answer_url": answer_url, "answer_method": "POST"} | status)

    def hang_up(self, call_id: str) -> HttpRequest:
        """204; 404 for a call that is over."""
        return self._send("DELETE", f"{quote(call_id, safe='')}/")

    def transfer(self, call_id: str, *, xml: str, url: str, publish: Callable[[str], str] | None) -> HttpRequest:
        """202: the call goes on with what `url` answers, for Plivo takes no document; its stream ends."""
        if xml:
            for problem in _xml.check_elements("xml", xml):
                raise UnsupportedCommand(problem)
            if publish is None:
                raise UnsupportedCommand("xml: Plivo takes the url of a document, not the document")
            url = publish(_xml.response(xml.strip()))
        return self._send("POST", f"{quote(call_id, safe='')}/", {"legs": "aleg", "aleg_url": url, "aleg_method": "POST"})

    def _send(self, method: str, path: str, fields: Mapping[str, str] | None = None) -> HttpRequest:
        headers = {"authorization": _account.basic(self._account_id, self._auth_token), "accept": "application/json"}
        url = f"{self._api_url}/v1/Account/{self._account_id}/Call/{path}"
        if fields is None:
            return HttpRequest(method, url, headers)
        return HttpRequest(method, url, headers | {"content-type": "application/json"}, body=write(fields).encode())


def reply(status: int, body: bytes) -> ApiReply:
    """What an answer means. Never raises."""
    read = read_object(body.decode(errors="replace")) or {}
    if 200 <= status < 300:
        return ApiReply("done", call_id=text(read, "request_uuid"))
    why = text(read, "error") or text(read, "message")
    return ApiReply("over" if status == 404 else "refused", problem=f"HTTP {status}" + (f": {why}" if why else ""))
