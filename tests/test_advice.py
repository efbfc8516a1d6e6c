"""Advice: what works and is probably not meant is told with its place, and nothing else is."""

from __future__ import annotations

import re
import time
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import config
from gateway.advice import covers
from gateway.routing import match
from gateway.settings import Route

LONG = "s3cret-CANARY-value-of-more-than-32-characters"
ENVIRON = {"SECRET": LONG, "SHORT": "s3cret-CANARY-short", "DULL": "ab" * 20}

DOOR = "public_url: https://voice.example.com\nsecret: ${SECRET}\n"
PHONE = 'phone: {kind: twilio_media_streams, auth_token: "${SECRET}"}'
LINE = 'line: {kind: plivo_audio_streaming, auth_token: "${SECRET}"}'
BASE = f"{DOOR}providers:\n  {PHONE}\nservices:\n  echo: {{kind: echo}}\nroutes:\n  - {{name: all, service: echo}}\n"
LOCAL = "providers: {phone: {kind: twilio_media_streams, auth: none}}\nservices:\n  echo: {kind: echo}\n"


def routes(*lines: str) -> str:
    """A file with two providers, two services and these routes."""
    services = '  echo: {kind: echo}\n  agent: {kind: websocket, url: "wss://agent.example"}\n'
    known = f"{DOOR}providers:\n  {PHONE}\n  {LINE}\nservices:\n{services}routes:\n"
    return known + "".join(f"  - {line}\n" for line in lines)


LAST = "{name: last, service: [agent, echo]}"

DOUBTFUL: list[tuple[str, str]] = [
    # secrets
    (
        BASE.replace("secret: ${SECRET}", f"secret: ‸{LONG}"),
        "secret: a secret in the file itself; write secret: ${NAME}, or file:",
    ),
    (BASE.replace("secret: ${SECRET}", f"secret: ‸${{X:-{LONG}}}"), "secret: a secret in the file itself, as a default"),
    (
        BASE.replace("secret: ${SECRET}", "secret: ‸${SHORT}"),
        "secret: a secret of 19 characters; 32 or more can't be guessed: make",
    ),
    (BASE.replace("secret: ${SECRET}", "secret: ‸${DULL}"), "secret: a secret of 2 different characters; make one with"),
    (
        BASE.replace('"${SECRET}"', f"‸{LONG}"),
        "providers.phone.auth_token: a secret in the file itself; write auth_token: ${NAME}",
    ),
    (
        BASE.replace('"${SECRET}"', '["${SECRET}", ‸"${SHORT}"]'),
        "providers.phone.auth_token[1]: a secret of 19 characters; 32 or m",
    ),
    (BASE.replace('"${SECRET}"', '‸"${SHORT}"'), "can't be guessed: was it copied whole?"),
    (
        routes(LAST).replace('url: "wss://agent.example"', 'url: "wss://agent.example", authorization: ‸"${SHORT}"'),
        "services.agent.authorization: a secret of 19 characters",
    ),
    # what nobody uses
    (routes("{name: all, service: echo}").replace("agent: {", "agent: ‸{"), "services.agent: no route leads to it; name it in"),
    (
        routes("{name: all, provider: phone, service: [agent, echo]}").replace("line: {", "line: ‸{"),
        "providers.line: no route takes its calls, so each ends at once",
    ),
    # services
    (
        routes(LAST).replace('"wss://agent.example"', '‸"ws://10.0.0.5:9000/call"'),
        "services.agent.url: calls to 10.0.0.5 go in clear text; write wss://",
    ),
    (
        routes(LAST).replace('"wss://agent.example"', '‸"wss://agent.example?api_key=abc"'),
        "services.agent.url: `api_key` in a URL ends up in logs of others",
    ),
    # routes
    (routes("{name: all, service: agent}", "‸{name: b, service: echo}"), "routes[1]: no call comes this far, all takes them all"),
    (
        routes('{name: a, called: "+1*", service: agent}', '‸{name: b, called: "+1415*", service: agent}', LAST),
        "routes[1]: no call",
    ),
    (
        routes('{name: a, called: "sip:*@x", service: agent}', '‸{name: b, called: "SIP:bot@X", service: agent}', LAST),
        "a takes the",
    ),
    (
        routes(
            '{name: a, called: "*", service: agent}', '‸{name: b, called: "1?", provider: line, service: echo}', "{service: echo}"
        )
        .replace("- {service: echo}", "")
        .rstrip(" "),
        "routes[1]: no call comes this far, a takes",
    ),
    (
        routes("{name: a, provider: phone, service: agent}", "{name: b, provider: line, service: agent}", "‸" + LAST),
        "routes[2]: no call comes this far, a and b take them all",
    ),
    (routes("‸{service: agent, provider: line}", LAST), "routes[0]: a route without a name is known by its place"),
    (
        routes("{name: a, service: [agent, echo, ‸agent]}").replace("echo, ‸", "‸").replace("echo: {kind: echo}", ""),
        "tried already",
    ),
    (
        routes("{name: a, service: [echo, ‸agent]}"),
        "routes[0].service[1]: an echo service before it takes every call; put it last",
    ),
    (
        routes('{name: a, called: "1*", on_lost: ‸next, service: agent}', LAST),
        "routes[0].on_lost: there is no next one; give `service` a list",
    ),
    # who is let in
    (
        LOCAL.replace("none}", "‸none}") + "routes: [{service: echo}]\npublic_url: https://voice.example.com\n",
        "providers.phone.auth: whoever finds voice.example.com can call; give it its account's `auth_token`",
    ),
    (BASE + "listen: ‸0.0.0.0:8080\n", "listen: voice.example.com is https and this is not: all calls seem"),
]


def told(text: str) -> list[str]:
    _, found = config.examine_text(text, source="gateway.yaml", environ=ENVIRON)
    assert not any("CANARY" in line or not line.isprintable() for line in found)
    return found


@pytest.mark.parametrize(("marked", "fragment"), DOUBTFUL, ids=range(len(DOUBTFUL)))
def test_what_is_doubtful_is_told_with_its_place(marked: str, fragment: str) -> None:
    before, mark, after = marked.partition("‸")
    assert mark
    place = f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"

    (line,) = told(before + after)

    assert line.startswith(f"gateway.yaml:{place}: warning: "), line
    assert fragment in line


@pytest.mark.parametrize(
    "text",
    [
        BASE,
        LOCAL + "routes: [{service: echo}]\n",
        LOCAL + 'routes: [{service: echo, called: "1*"}, {service: echo}]\n',  # no tokens, nobody else knows a route's label
        LOCAL + "routes: [{service: echo}]\npublic_url: http://localhost:8080\n",
        BASE + "listen: 0.0.0.0:8080\ntrusted_proxies: 10.0.0.0/8\n",
        routes(LAST),
        routes('{name: a, called: "+1*", service: agent}', '{name: b, called: "+4*", service: agent}', LAST),
        routes('{name: a, called: "+1*", caller: "+1*", service: agent}', '{name: b, called: "+1*", service: agent}', LAST),
        routes("{name: a, provider: phone, service: agent}", LAST),
        routes(LAST).replace("wss://agent.example", "ws://127.0.0.1:9000"),
        routes(LAST).replace("wss://agent.example", "wss://agent.example?tenant=1&key="),
    ],
)
def test_what_is_well_meant_is_not_doubted(text: str) -> None:
    assert [] == told(text)


def test_warnings_do_not_stand_beside_errors() -> None:
    with pytest.raises(config.ConfigError) as caught:
        told(BASE.replace("secret: ${SECRET}", f"secret: {LONG}") + "zzz: 1\n")

    assert "warning" not in str(caught.value)


# --- which pattern covers which -----------------------------------------------------------------------------------------------

NUMBERS = ["".join(letters) for length in range(1, 5) for letters in product("1a9", repeat=length)]


def fits(pattern: str, number: str) -> bool:
    return match([Route(service=("x",), called=pattern)], provider="p", called=number) is not None


patterns = st.text("1a*?", min_size=1, max_size=5)


@given(patterns, patterns)
def test_a_pattern_covers_another_one_exactly_if_every_number_says_so(wide: str, narrow: str) -> None:
    counterexamples = [number for number in NUMBERS if fits(narrow, number) and not fits(wide, number)]

    if covers(wide, narrow):
        assert [] == counterexamples
    elif len(wide) < 5 and len(narrow) < 5 and not re.fullmatch(r"\*+", narrow):  # the counterexample may be longer than ours
        assert counterexamples


def test_what_takes_too_long_to_tell_is_not_told() -> None:
    began = time.perf_counter()
    covers("*a" + "?" * 60 + "b", "*" + "a?" * 40 + "*b")
    covers("*1" * 60, "*1" * 61)
    assert time.perf_counter() - began < 1


def test_a_thousand_routes_are_looked_through_in_no_time() -> None:
    lines = [f'{{name: r{number}, called: "+1415555{number:04}{"*" * (number % 2)}", service: agent}}' for number in range(1000)]
    text = routes(*lines, LAST)
    config.parse(BASE, environ=ENVIRON)
    began = time.process_time()
    assert [] == told(text)
    assert time.process_time() - began < 4
