"""Twilio's REST API as far as a gateway needs it: requests as values. Nothing is sent here.

Sources: twilio.com/docs/voice/api/call-resource, /docs/usage/requests-to-twilio, /docs/usage/twilios-response, November 2026.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote

from gateway.errors import UnsupportedCommand
from gateway.provider import ApiReply, HttpRequest

from . import _account, _xml
from ._json import read_object, text

API_URL = "https://api.twilio.com"
_INLINE_CHARACTERS = 4000  # "twiml … Max 4000 characters"
_OVER = frozenset({20404, 21220})  # no such call; "Call is not in-progress"
_ACCOUNT = re.compile("AC[0-9a-fA-F]{32}")


def check(account_id: str | None, auth_token: str | list[str] | None, api_url: str) -> Iterable[str]:
    """The credentials are complete; else yields what is wrong."""
    yield from _account.check_api(account_id, auth_token, api_url)
    if account_id is not None and not _ACCOUNT.fullmatch(account_id):
        yield "account_id: is no Account SID; those are AC and 32 hexadecimal digits, on the console's first page"


class Api:
    """Requests of one account; without `account_id` each raises UnsupportedCommand."""

    def __init__(self, account_id: str | None, auth_token: str | list[str] | None, api_url: str) -> None:
        self._account_id = account_id
        self._auth_token = auth_token
        self._api_url = api_url

    def place(self, to: str, from_: str, answer_url: str, status_url: str | None) -> HttpRequest:
        """201 with the call's `sid`; Twilio then asks `answer_url` once somebody answers."""
        status = {} if status_url is None else {"StatusCallback": status_url, "StatusCallbackMethod": "POST"}
        return self._post("Calls.json", {"To": to, "From": from_, "Url": answer_url, "Method": "POST"} | status)

    def hang_up(self, call_id: str) -> HttpRequest:
        """Ends the call, ringing or not."""
        return self._post(f"Calls/{quote(call_id, safe='')}.json", {"Status": "completed"})

    def transfer(self, call_id: str, *, xml: str, url: str) -> HttpRequest:
        """The call goes on with these elements, or with what `url` answers; its stream ends."""
        if not xml:
            form = {"Url": url, "Method": "POST"}
        else:
            document = _xml.response(xml.strip())
            for problem in _xml.check_elements("xml", xml):
                raise UnsupportedCommand(problem)
            if len(document) > _INLINE_CHARACTERS:
                raise UnsupportedCommand(f"xml: {len(document)} characters; Twilio takes {_INLINE_CHARACTERS}, or a url")
            form = {"Twiml": document}
        return self._post(f"Calls/{quote(call_id, safe='')}.json", form)

    def _post(self, path: str, form: Mapping[str, str]) -> HttpRequest:
        authorization = _account.basic(self._account_id, self._auth_token)
        return HttpRequest(
            "POST",
            f"{self._api_url}/2010-04-01/Accounts/{self._account_id}/{path}",
            {"authorization": authorization, "content-type": "application/x-www-form-urlencoded", "accept": "application/json"},
            form,
        )


def reply(status: int, body: bytes) -> ApiReply:
    """What an answer means. Never raises."""
    read = read_object(body.decode(errors="replace")) or {}
    if 200 <= status < 300:
        return ApiReply("done", call_id=text(read, "sid"))
    code = read.get("code") if isinstance(read.get("code"), int) else None
    why = text(read, "message")
    problem = f"HTTP {status}" + (f", error {code}" if code is not None else "") + (f": {why}" if why else "")
    return ApiReply("over" if status == 404 or code in _OVER else "refused", problem=problem)
