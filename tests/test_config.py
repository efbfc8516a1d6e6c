"""Configuration: what loads, and what every mistake is told."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import providers
from gateway import cli, config, schema, yaml_nodes
from gateway.errors import ConfigError
from gateway.media import MULAW_8K, Encoding, MediaFormat, Track
from gateway.settings import EchoService, ProviderEntry, RecorderService, Route, Settings, Tls, Tracing, WebsocketService
from tests.test_tls import Files

ROOT = Path(__file__).parent.parent
SECRET = "s3cret-CANARY-value"  # never in any message
LONG_SECRET = f"{SECRET}-of-more-than-32-characters"


class Acme(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of a provider that lives outside this tree."""

    auth_token: str | list[str] | None = None
    signing_key: str | None = None
    auth: Literal["none"] | None = None
    media_format: MediaFormat = MULAW_8K
    parameters: dict[str, str] = {}
    noise: bool = False
    gain: float = 1.0
    lead_ms: int | None = None

    def __post_init__(self) -> None:
        if self.auth and self.auth_token:
            raise ValueError(f"give exactly one of auth and auth_token, not {self.auth_token}")
        if self.lead_ms == 13:
            raise ValueError("`lead_ms` is 13; that brings bad luck")


class Own(msgspec.Struct, frozen=True):
    """The options of one that needs no secret of ours."""

    certificate_name: str = ""


@pytest.fixture(autouse=True)
def _acme(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in {
        "acme.carrier": {"Provider": type("Provider", (), {"Config": Acme})},
        "acme.own": {"Provider": type("Provider", (), {"Config": Own})},
        "acme.empty": {},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(autouse=True, params=["libyaml", "python"])
def _loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(yaml_nodes, "_Loader", yaml.SafeLoader)
    elif not hasattr(yaml, "CSafeLoader"):
        pytest.skip("PyYAML was built without libyaml")


PROVIDERS = "providers: {p: {kind: acme.carrier, auth: none}}\n"
SERVICES = "services: {echo: {kind: echo}}\n"
ROUTES = "routes: [{service: echo}]\n"
BASE = PROVIDERS + SERVICES + ROUTES
DOOR = "public_url: https://voice.example.com\nsecret: ${TOKEN}\n"
SIGNED = 'providers: {p: {kind: acme.carrier, auth_token: "${TOKEN}"}}\n' + SERVICES + ROUTES


def with_provider(fields: str) -> str:
    return f"providers:\n  p: {{kind: acme.carrier, {fields}}}\n" + SERVICES + ROUTES


def with_service(fields: str) -> str:
    return f"services:\n  echo: {{{fields}}}\n" + PROVIDERS + ROUTES


def with_route(route: str) -> str:
    return f"routes:\n  - {route}\n" + PROVIDERS + SERVICES


def parse(text: str, **environ: str) -> Settings:
    return config.parse(text, source="gateway.yaml", environ=environ)


def findings(text: str, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, TOKEN=SECRET, **environ)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    return str(caught.value).split("\n")


# --- what loads ----------------------------------------------------------------------------------------------------------


def test_the_shortest_useful_file_has_three_lines() -> None:
    kind = providers.names()[0]
    settings = parse(
        f"providers: {{phone: {{kind: {kind}, auth: none}}}}\nservices: {{echo: {{kind: echo}}}}\nroutes: [{{service: echo}}]"
    )

    assert settings.providers["phone"].kind == kind
    assert isinstance(settings.providers["phone"].config, providers.load(kind).Config)
    assert settings.services == {"echo": EchoService()}
    assert settings.routes == (Route(service=("echo",), name="route-0"),)
    assert settings.listen == "127.0.0.1:8080"
    assert settings.base_url() == "http://127.0.0.1:8080"


def test_a_dotted_kind_admits_a_provider_outside_this_tree() -> None:
    settings = parse(with_provider("auth: none, media_format: {encoding: pcm_s16le, sample_rate: 16000}, noise: yes, gain: 2"))

    assert settings.providers["p"] == ProviderEntry(
        kind="acme.carrier",
        config=Acme(auth="none", media_format=MediaFormat(Encoding.PCM_S16LE, 16000), noise=True, gain=2.0),
        auth="none",
    )


def test_everything_set() -> None:
    text = """
listen: "[::1]:0"
admin: localhost:9090
admin_token: ${TOKEN}
public_url: https://voice.example.com/tel
secret: ${TOKEN}
tls: {certificate: "${FILE}", key: "${FILE}"}
trusted_proxies: [10.0.0.0/8, "::1"]
max_calls: 100
max_calls_per_second: 12.5
max_pending_per_address: 10
start_timeout_secs: 2.5
capacity_ms: 60_000
hold_ms: ${HOLD:-1000}
log_level: debug
providers:
  p: {kind: acme.carrier, auth: none, parameters: {tenant: "${TENANT}", price: "$${x}"}}
services:
  agent:
    kind: websocket
    url: wss://agent.internal:9000/call?tenant=1
    media_format: {encoding: mulaw, sample_rate: 8000}
    frame_ms: 40
    authorization: ${TOKEN}
    connect_timeout_secs: 1
    track: outbound
  echo: {kind: echo, delay_ms: 500}
routes:
  - {name: india, provider: p, called: "+91*", service: [agent]}
  - {caller: "sip:*@example.com", service: echo}
  - service: echo
"""
    settings = parse(text, TOKEN=SECRET, TENANT="1415", FILE=__file__)

    assert settings == Settings(
        providers={
            "p": ProviderEntry(
                kind="acme.carrier", config=Acme(auth="none", parameters={"tenant": "1415", "price": "${x}"}), auth="none"
            )
        },
        services={
            "agent": WebsocketService(
                url="wss://agent.internal:9000/call?tenant=1",
                media_format=MULAW_8K,
                frame_ms=40,
                authorization=SECRET,
                connect_timeout_secs=1.0,
                track=Track.OUTBOUND,
            ),
            "echo": EchoService(delay_ms=500),
        },
        routes=(
            Route(service=("agent",), provider="p", called="+91*", name="india"),
            Route(service=("echo",), caller="sip:*@example.com", name="route-1"),
            Route(service=("echo",)),
        ),
        listen="[::1]:0",
        admin="localhost:9090",
        admin_token=SECRET,
        public_url="https://voice.example.com/tel",
        secret=SECRET,
        tls=Tls(certificate=__file__, key=__file__),
        trusted_proxies=("10.0.0.0/8", "::1"),
        max_calls=100,
        max_calls_per_second=12.5,
        max_pending_per_address=10,
        start_timeout_secs=2.5,
        capacity_ms=60_000,
        hold_ms=1000,
        log_level="debug",
    )
    assert settings.base_url() == "https://voice.example.com/tel"
    assert SECRET not in repr(settings) + repr(settings.services) + repr(settings.providers)


@pytest.mark.parametrize("listen", ["127.0.0.1:80", "127.9.9.9:0", "localhost:8080", '"[::1]:8080"'])
def test_loopback_addresses(listen: str) -> None:
    assert parse(BASE + f"listen: {listen}").listen == listen.strip('"')


def test_the_derived_url_takes_the_port_really_bound() -> None:
    assert parse(BASE + "listen: 127.0.0.1:0").base_url(4711) == "http://127.0.0.1:4711"
    assert parse(BASE + 'listen: "[::1]:80"').base_url() == "http://[::1]:80"


def test_with_tokens_any_address_may_listen() -> None:
    settings = parse(SIGNED + DOOR + "listen: 0.0.0.0:8080", TOKEN=SECRET)

    assert settings.listen == "0.0.0.0:8080"
    assert settings.providers["p"].auth is None
    assert settings.secret == SECRET


def test_any_of_a_providers_secrets_will_do() -> None:
    settings = parse(with_provider('signing_key: "${TOKEN}"') + DOOR, TOKEN=SECRET)

    assert settings.providers["p"].config == Acme(signing_key=SECRET)


def test_a_provider_of_another_kind_may_know_its_carrier_in_its_own_way() -> None:
    text = "providers: {p: {kind: acme.own}}\n" + SERVICES + ROUTES

    assert parse(text + DOOR + "listen: 0.0.0.0:80", TOKEN=SECRET).providers["p"].auth is None
    assert len(findings(text)) == 2  # secret and public_url are needed all the same


def test_with_a_certificate_the_derived_url_is_https() -> None:
    settings = parse(BASE + f"tls: {{certificate: {__file__}, key: {__file__}}}")

    assert settings.base_url() == "https://127.0.0.1:8080"


def test_a_loopback_url_needs_no_tls() -> None:
    assert parse(BASE + "public_url: http://localhost:8080").base_url() == "http://localhost:8080"


def test_a_route_is_found_by_its_label() -> None:
    settings = parse(PROVIDERS + SERVICES + "routes: [{service: echo, caller: a}, {service: echo, name: b}, {service: echo}]")

    assert [route.label for route in settings.routes] == ["route-0", "b", "route-2"]
    assert settings.route("b") is settings.routes[1]
    assert settings.route("route-2") is settings.routes[2]
    assert settings.route("route-1") is None


def test_secrets_from_files(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{SECRET}\n")

    assert parse(BASE + f"secret: file:{tmp_path}/secret").secret == SECRET
    assert parse(BASE + 'secret: "file:${DIR}/secret"', DIR=str(tmp_path)).secret == SECRET


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff", b"x" * 70_000, b"short"])
def test_bad_secret_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "secret").write_bytes(content)

    (finding,) = findings(BASE + f"secret: file:{tmp_path}/secret")

    assert finding.startswith("gateway.yaml:4:9: secret: ")


def test_an_escaped_reference_and_what_a_variable_holds_stay_as_they_are() -> None:
    settings = parse(BASE + "public_url: ${URL}", URL="https://x.example/${HOME}")
    assert settings.public_url == "https://x.example/${HOME}"


# --- mistakes ------------------------------------------------------------------------------------------------------------

BROKEN: list[tuple[str, str]] = [
    # the file as a whole
    ("‸", "empty; the shortest useful file is:"),
    ("‸# nothing\n---\n", "empty"),
    ("‸just text", "expected keys and values"),
    ("‸- a\n- b", "expected keys and values; known keys: providers"),
    (BASE + "‸---\n" + BASE, "a second document"),
    (BASE + "a: [1, 2", "not YAML"),
    (BASE + "a: 'x‸", "not YAML"),
    ("a:\n‸\tb: 1\n", "never with tabs"),
    (BASE + "listen: a‸: b", "mapping values are not allowed"),
    (BASE + "listen: ‸@x", "needs quotes"),
    (BASE + "listen: a‸\x00b", "U+0000"),
    (BASE + "listen: a‸\ud800b", "U+D800"),
    (BASE + 'listen: "\\UFFFFFFFF"', "not YAML"),
    ("[" * 32 + "‸" + "[" * 100_000, "nested more than 32 deep"),
    ("‸" + " " * ((1 << 20) + 1), "too large"),
    (BASE + "secret: ‸&x abcdefghijklmnopq\n", "anchors are refused: '&x'"),
    (BASE + "secret: ‸*x\n", "aliases are refused: '*x'"),
    (BASE + "secret: ‸!!python/name:os.system x\n", "YAML tags are refused"),
    ("‸<<: {a: 1}\n" + BASE, "merge keys are refused"),
    # keys
    (BASE + "‸lisen: 127.0.0.1:80", "unknown key: 'lisen'; did you mean listen? known: providers,"),
    (BASE + "‸max_messages: 3", "unknown key: 'max_messages'; known:"),
    (BASE + "listen: 127.0.0.1:80\n‸listen: 127.0.0.1:81", "duplicate key: 'listen'; it stands in line 4 already"),
    (BASE + "‸12: x", "a key that YAML reads as int: '12'; write it in quotes"),
    (BASE + "? ‸[a]\n: x", "a key must be text"),
    ("‸" + PROVIDERS + SERVICES, "missing key routes; expected a list, for instance `routes: [{service: echo}]`"),
    (PROVIDERS + SERVICES + "routes: ‸[]", "routes: must not be empty"),
    (PROVIDERS + SERVICES + "routes: ‸{service: echo}", "routes: expected a list; begin each of its entries with `- `"),
    (PROVIDERS + SERVICES + "‸routes:", "routes: expected a list"),
    # settings of the gateway
    (BASE + "listen: ‸8080", "listen: not host:port: '8080'; write for instance"),
    (BASE + "listen: ‸127.0.0.1:99999", "listen: not host:port: '127.0.0.1:99999'"),
    (BASE + "listen: ‸0.0.0.0:8080", "listen: not a loopback address: '0.0.0.0:8080'; provider p has `auth: none`"),
    (BASE + "listen: ‸example.com:80", "not a loopback address"),
    (BASE + 'listen: ‸"::1:80"', "an IPv6 address needs brackets"),
    (BASE + 'listen: ‸":80"', "no host before the port"),
    (BASE + "‸listen:", "listen: no value; expected text"),
    (BASE + "listen: ‸[a]", "listen: expected text, found a list"),
    (BASE + "admin: ‸localhost", "admin: not host:port: 'localhost'"),
    (BASE + "admin: ‸127.0.0.1:8080", "admin: the same as `listen`"),
    (BASE + "admin: ‸0.0.0.0:9090", "admin: anybody could reach 0.0.0.0:9090; write 127.0.0.1:9090, or an admin_token"),
    (BASE + "admin_token: ‸Bearer 0123456789abcdef", 'the word "Bearer" is added for you'),
    (BASE + "admin_token: ‸0123456789", "admin_token: "),
    (BASE + "public_url: ‸voice.example.com", "must begin with http:// or https://: 'voice.example.com'"),
    (BASE + "public_url: ‸https://voice.example.com/", "ends in a slash: 'https://voice.example.com/'; write https://voice.ex"),
    (BASE + "public_url: ‸https://voice.example.com?x=1", "has a query"),
    (BASE + "public_url: ‸https://u:p@voice.example.com", "credentials"),
    (BASE + 'public_url: ‸"https://a b"', "printable ASCII"),
    (BASE + "public_url: ‸https://", "names no host"),
    (BASE + "public_url: ‸https://[x", "not a URL"),
    (BASE + "public_url: ‸http://voice.example.com/x", "not https: 'http://voice.example.com/x'; calls go"),
    ("‸" + SIGNED + "public_url: https://a.example", "missing key secret; provider p needs it; make one with `openssl rand -hex"),
    ("‸" + SIGNED + "secret: ${TOKEN}", "missing key public_url; provider p needs it; write what carriers dial"),
    (SIGNED + "public_url: https://a.example\n‸secret:", "missing key secret"),
    (BASE + f"tls: ‸{{certificate: {__file__}}}", "tls: missing key key; expected text"),
    (
        BASE + f"tls: {{certificate: {__file__}, key: ‸/no/key.pem}}",
        "tls.key: no such file: '/no/key.pem'; write the path",
    ),
    (BASE + f"tls: {{certificate: {__file__}, key: ‸/dev/zero}}", "tls.key: no such file: '/dev/zero'"),
    (BASE + f"tls: {{certificate: ‸file:{__file__}, key: {__file__}}}", "tls.certificate: what a file holds, where the path"),
    (BASE + "tls: ‸yes", "tls: expected keys and values: 'yes'; known keys: certificate, key"),
    (BASE + "trusted_proxies: ‸10.0.0.1/8", "not an address or a network of addresses: '10.0.0.1/8'; write 10.0.0.0/8"),
    (BASE + "trusted_proxies: [‸proxy]", "trusted_proxies[0]: not an address or a network of addresses: 'proxy'; write for inst"),
    (BASE + "trusted_proxies: [‸0.0.0.0/0]", "trusted_proxies[0]: that is everybody, and anybody could claim any address"),
    (BASE + "max_calls: ‸0", "max_calls: out of range: '0'; expected a whole number from 1 to 100000"),
    (BASE + "max_calls_per_second: ‸0", "max_calls_per_second: out of range: '0'; expected a number above 0"),
    (BASE + "max_pending_per_address: ‸2.5", "max_pending_per_address: expected a whole number"),
    (BASE + "secret: ‸s3cret-CANARY", "secret: too short: ***; at least 16 characters"),
    (BASE + "secret: ‸1234567890123456", "secret: YAML reads this as a number: ***; write it in quotes"),
    (BASE + "secret: ‸${NOPE}", "secret: environment variable NOPE is not set; set it"),
    (BASE + "hold_ms: ‸${NOPE}", "hold_ms: environment variable NOPE is not set; set it, or write ${NOPE:-default}"),
    (BASE + "secret: ‸${EMPTY}", "secret: environment variable EMPTY is set but empty"),
    (BASE + "secret: ‸${not closed", "secret: not a reference"),
    (BASE + "secret: ‸file:secret", "secret: not an absolute path"),
    (BASE + "secret: ‸file:/nowhere/secret", "secret: no such file: ***"),
    (BASE + "secret: ‸file:/dev/zero", "secret: no such file"),
    (BASE + "capacity_ms: ‸lots", "capacity_ms: expected a whole number from 1000 to 3600000: 'lots'; write digits only"),
    (BASE + "capacity_ms: ‸12", "capacity_ms: out of range: '12'"),
    (BASE + "capacity_ms: ‸0120000", "expected a whole number"),
    (BASE + "capacity_ms: ‸1:30", "expected a whole number"),
    (BASE + "capacity_ms: ‸1e4", "expected a whole number"),
    (BASE + "capacity_ms: ‸" + "9" * 5000, "expected a whole number"),
    (BASE + 'hold_ms: ‸"20"', "hold_ms: expected a number, found text: '20'; write it without quotes"),
    (BASE + "hold_ms: ‸${TOKEN}", "hold_ms: expected a whole number from 0 to 60000: '${TOKEN}'"),
    (BASE + "hold_ms: ‸yes", "hold_ms: expected a whole number"),
    (BASE + "start_timeout_secs: ‸0", "start_timeout_secs: out of range: '0'; expected a number above 0 to 60"),
    (BASE + "start_timeout_secs: ‸.nan", "start_timeout_secs: expected a number above 0 to 60: '.nan'; write for instance 2.5"),
    (BASE + "log_level: ‸inf", "log_level: unknown value: 'inf'; did you mean info? known: debug, error, info, warning"),
    # providers
    ("providers: ‸{}\n" + SERVICES + ROUTES, "providers: must not be empty"),
    ("providers: ‸[a]\n" + SERVICES + ROUTES, "providers: expected names and values"),
    ("providers: {p: ‸x}\n" + SERVICES + ROUTES, "providers.p: expected keys and values: 'x'; known keys: kind"),
    ("providers: {p: ‸{auth: none}}\n" + SERVICES + ROUTES, "providers.p: missing key kind; write kind: and one of "),
    ("providers: {p: {kind: ‸twilio_media_stream, auth: none}}\n" + SERVICES + ROUTES, "did you mean twilio_media_streams?"),
    (
        "providers: {p: {kind: ‸acme.missing, auth: none}}\n" + SERVICES + ROUTES,
        "providers.p.kind: can't be loaded: 'acme.missing'",
    ),
    ("providers: {p: {kind: ‸acme.empty, auth: none}}\n" + SERVICES + ROUTES, "can't be loaded: 'acme.empty'; AttributeError"),
    ('providers: {p: {kind: ‸"..", auth: none}}\n' + SERVICES + ROUTES, "can't be loaded: '..'"),
    ('providers: {‸"p/q": {kind: acme.carrier, auth: none}}\n' + SERVICES + ROUTES, "providers: not a name: 'p/q'"),
    (
        "providers:\n  p: ‸{kind: acme.carrier, gain: 1}\n" + SERVICES + ROUTES,
        "providers.p: missing key auth_token; write auth_token: ${NAME} with the account's token, or `auth: none`",
    ),
    (with_provider("auth: ‸no"), "providers.p.auth: unknown value: 'no'; did you mean none? known: none"),
    (
        'providers:\n  p: ‸{kind: acme.carrier, auth: none, auth_token: "${TOKEN}"}\n' + SERVICES + ROUTES,
        "providers.p: give exactly one of auth and auth_token, not ***",
    ),
    (with_provider("auth: none, ‸auth_tokn: s3cret-CANARY-value"), "unknown key: 'auth_tokn'; did you mean auth_token?"),
    (with_provider("auth: none, signing_key: ‸[s3cret-CANARY-value]"), "providers.p.signing_key: expected text, found a list"),
    (with_provider("auth: none, signing_key: ‸1234567890"), "signing_key: YAML reads this as a number: ***"),
    (with_provider("auth: none, lead_ms: ‸13"), "providers.p.lead_ms: `lead_ms` is 13; that brings bad luck"),
    (with_provider("auth: none, noise: ‸maybe"), "providers.p.noise: expected true or false: 'maybe'"),
    (with_provider("auth: none, gain: ‸loud"), "providers.p.gain: expected a number: 'loud'"),
    (with_provider("auth: none, parameters: {pin: ‸0123}"), "providers.p.parameters.pin: YAML reads this as a number: '0123'"),
    (with_provider("auth: none, media_format: {encoding: ‸mulow, sample_rate: 8000}"), "did you mean mulaw?"),
    (
        with_provider("auth: none, media_format: {encoding: mulaw, sample_rate: ‸800}"),
        "out of range: '800'; expected a whole number from 8000",
    ),
    (with_provider("auth: none, media_format: ‸{encoding: mulaw}"), "providers.p.media_format: missing key sample_rate"),
    (with_provider("auth: $‸{X}"), 'a reference needs quotes: "${VAR}"'),
    # services
    (with_service("kind: ‸recordr"), "unknown kind: 'recordr'; did you mean recorder? known: websocket, echo, recorder"),
    (with_service("kind: recorder, directory: ‸/etc/hosts"), "services.echo.directory: a file, where a directory is wanted"),
    (with_service('kind: recorder, directory: r, name: ‸"{session}{caller}"'), "a phone number does not belong into a file's"),
    (with_service('kind: recorder, directory: r, name: ‸"{time}"'), "does not tell streams apart"),
    (with_service('kind: recorder, directory: r, name: ‸"../{session}"'), "is not a name inside the directory"),
    (with_service('kind: recorder, directory: r, name: ‸"{session}{day}"'), "knows no {day}"),
    (with_service("kind: recorder, directory: r, format: ‸mp3"), "unknown value: 'mp3'"),
    (with_route("{service: echo, listeners: ‸a}"), "routes[0].listeners: unknown service: 'a'; known: echo"),
    (with_route("{service: echo, listeners: [‸echo]}"), "routes[0].listeners: speaks on this route: 'echo'"),
    (
        "services:\n  echo: ‸{delay_ms: 3}\n" + PROVIDERS + ROUTES,
        "services.echo: missing key kind; write kind: and one of websocket, echo",
    ),
    (with_service("kind: ‸[echo]"), "services.echo.kind: expected text, found a list"),
    (with_service("kind: echo, ‸delay: 3"), "unknown key: 'delay'; did you mean delay_ms? known: kind, delay_ms"),
    (with_service("kind: echo, delay_ms: ‸-1"), "services.echo.delay_ms: out of range: '-1'"),
    ("services:\n  echo:\n    ‸kind: websocket\n" + PROVIDERS + ROUTES, "services.echo: missing key url; expected text"),
    (with_service('kind: websocket, url: ‸"http://x"'), "must begin with wss:// or ws://: 'http://x'; write for instance ws://"),
    (with_service('kind: websocket, url: "ws://x", ‸carrier: twilio'), "unknown key: 'carrier'; known: kind, url"),
    (with_service('kind: websocket, url: "ws://x", frame_ms: ‸30'), "frame_ms: unknown value: '30'; known: 10, 20, 40, 60, 100"),
    (with_service('kind: websocket, url: "ws://x", track: ‸both'), "track: unknown value: 'both'; known: inbound, outbound"),
    (with_service('kind: websocket, url: "ws://x", authorization: ‸Bearer x'), 'the word "Bearer" is added for you: ***'),
    # routes
    (with_route("{service: ‸ecko}"), "routes[0].service: unknown service: 'ecko'; did you mean echo? known: echo"),
    (
        with_route("{service: echo, name: ‸a b}"),
        "routes[0].name: not a name: 'a b'; names are letters, digits, -",
    ),
    (with_route("{service: echo, name: ‸route-7}"), "routes[0].name: what routes without a name are called: 'route-7'"),
    (with_route("{service: echo, name: a}\n  - {service: echo, name: ‸a}"), "routes[1].name: a second route of this name: 'a'"),
    (with_route("{service: ‸[]}"), "routes[0].service: an empty list; name one of `services`"),
    (with_route("{provider: ‸q, service: echo}"), "routes[0].provider: unknown provider: 'q'; known: p"),
    (with_route("‸{}"), "routes[0]: missing key service; expected text"),
    (with_route("‸echo"), "routes[0]: expected keys and values: 'echo'"),
    (with_route("{service: echo, ‸listener: [a]}"), "unknown key: 'listener'; did you mean listeners? known: service"),
    (with_route("{called: ‸+14155550100, service: echo}"), "a number: '+14155550100'; write it in quotes: \"+14155550100\""),
    (with_route("{called: ‸911, service: echo}"), "YAML reads this as a number: '911'; write it in quotes: \"911\""),
    (with_route("{caller: ‸no, service: echo}"), "YAML reads this as true or false: 'no'; write it in quotes: \"no\""),
    (with_route("{called: *‸, service: echo}"), 'text that begins with * or & needs quotes: "*"'),
    (with_route('{called: ‸"+1 415", service: echo}'), "a pattern has no spaces: '+1 415'"),
    (with_route("{called: ‸[a], service: echo}"), "routes[0].called: expected text, found a list"),
]


TEXTS = [text.replace("‸", "") for text, _ in BROKEN]


@pytest.mark.parametrize(("marked", "fragment"), BROKEN, ids=range(len(BROKEN)))
def test_a_mistake_is_told_with_its_place(marked: str, fragment: str) -> None:
    """`‸` stands before the mistake; without it the two YAML parsers disagree about the place."""
    before, mark, after = marked.partition("‸")
    place = f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}" if mark else r"\d+:\d+"

    found = findings(before + after, EMPTY="")

    told = [line for line in found if re.match(rf"gateway\.yaml:{place}: ", line) and fragment in line]
    assert len(told) == 1, found
    assert len(found) == 1 or "empty" in fragment, found


def test_all_mistakes_at_once_in_the_order_of_the_file() -> None:
    found = findings(
        """listen: 8080
hold_ms: "20"
providers:
  a: {kind: twilio_media_stream, auth: none}
  b: {kind: acme.carrier, auth: none, gain: loud, nois: 1}
services:
  x: {kind: recordr}
routes:
  - {service: y}
"""
    )

    assert [line.split(": ")[0] for line in found] == [
        "gateway.yaml:1:9",
        "gateway.yaml:2:10",
        "gateway.yaml:4:13",
        "gateway.yaml:5:45",
        "gateway.yaml:5:51",
        "gateway.yaml:7:13",
        "gateway.yaml:9:15",
    ]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_mistake_hides_no_other(text: str) -> None:
    alone = findings(text, EMPTY="")
    if re.search("not YAML|empty; |second document|too large|U\\+|1:1: expected keys", "\n".join(alone)):
        return  # there is no telling what else would have stood there

    assert {*alone} < {*findings(text + "\nzzz: 1\n", EMPTY="")}


def test_values_from_the_environment_are_never_shown() -> None:
    text = BASE + "log_level: ${TOKEN}\npublic_url: ${TOKEN}\nlisten: ${TOKEN}\nhold_ms: ${TOKEN}\nsecret: ${TOKEN}x\n"

    assert len(findings(text)) == 4


def test_hostile_names_are_shown_escaped() -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse('"\\e[2J\\u202e": 1\nproviders: {"\\e[1m": 3}', source="a\x1b[2J\nb", environ={})

    assert all(line.isprintable() for line in str(caught.value).split("\n"))


# --- files ---------------------------------------------------------------------------------------------------------------


def test_load_reads_a_file(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + BASE.encode() + b"log_level: ${LEVEL}\r\n")

    assert config.load(file, environ={"LEVEL": "error"}).log_level == "error"


def test_load_asks_the_process_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(BASE + "log_level: ${LEVEL}\n")
    monkeypatch.setenv("LEVEL", "warning")

    assert config.load(file).log_level == "warning"


@pytest.mark.parametrize("content", [None, b"a: \xff\n", b"listen: 1\n", b"x" * (2 << 20), b"\x00"])
def test_load_names_the_file(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "gateway.yaml"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(ConfigError, match=re.escape(str(file))):
        config.load(file)
    with pytest.raises(ConfigError):
        config.load(tmp_path)
    with pytest.raises(ConfigError):
        config.load("nul\0")


def test_bad_bytes_have_a_place(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_bytes("listen: x\nadmin: é".encode() + b"\xff\n")

    with pytest.raises(ConfigError, match=":2:9: not UTF-8: byte 0xff"):
        config.load(file)


# --- any text ------------------------------------------------------------------------------------------------------------

_WORDS = [word for text in TEXTS if len(text) < 1000 for word in re.findall(r"[\w./+-]+|\W", text)]


def survives(text: str) -> None:
    try:
        parse(text, TOKEN=SECRET)
    except ConfigError as error:
        said = str(error)
    else:
        return
    assert said
    assert SECRET not in said
    assert all(line.isprintable() for line in said.split("\n"))


@given(st.text())
def test_any_text_raises_config_error_or_nothing(text: str) -> None:
    survives(text)
    survives(BASE + text)


@given(st.lists(st.sampled_from(_WORDS), max_size=60).map("".join))
def test_any_mixture_of_words_raises_config_error_or_nothing(text: str) -> None:
    survives(text)
    survives(BASE + text)


plain: Any = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["none", "echo", "acme.carrier"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["kind", "auth", "url", "service", "p"]) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.too_slow])  # the first text of a run costs seconds on a busy machine
@given(st.dictionaries(st.sampled_from([*Settings.__struct_fields__]), plain))
def test_any_tree_raises_config_error_or_nothing(tree: dict[str, Any]) -> None:
    survives(yaml.safe_dump(tree, allow_unicode=True))
    survives(yaml.safe_dump(tree, default_flow_style=True))


# --- the files in config/ ------------------------------------------------------------------------------------------------

ENVIRON = dict.fromkeys(["GATEWAY_SECRET", "TWILIO_AUTH_TOKEN", "PLIVO_AUTH_TOKEN", "AGENT_TOKEN"], LONG_SECRET)


def sections() -> dict[str, type[msgspec.Struct]]:
    """Every struct that an operator can fill in, by its heading in the reference."""
    found: dict[str, type[msgspec.Struct]] = {
        "The file": Settings,
        "`tls`": Tls,
        "`tracing`": Tracing,
        "`providers`: each": ProviderEntry,
        **{f"`providers`: `kind: {kind}`": providers.load(kind).Config for kind in providers.names()},
        "`services`: `kind: websocket`": WebsocketService,
        "`services`: `kind: echo`": EchoService,
        "`services`: `kind: recorder`": RecorderService,
        "`routes`: each": Route,
    }
    for struct in [*found.values()]:
        for inner in sorted(inner_structs(msgspec.inspect.type_info(struct)), key=lambda inner: inner.__name__):
            if inner not in found.values() and inner is not MediaFormat:
                found[f"`{inner.__name__}`: each"] = inner
    return found


def inner_structs(want: Any) -> set[type[msgspec.Struct]]:
    if isinstance(want, (list, tuple)):
        return set().union(*map(inner_structs, want))
    if isinstance(want, msgspec.inspect.StructType):
        return {want.cls}.union(*(inner_structs(field.type) for field in want.fields))
    if isinstance(want, msgspec.inspect.Type):
        return inner_structs([getattr(want, name) for name in want.__struct_fields__ if name.endswith(("type", "types"))])
    return set()


def keys_of(struct: type[msgspec.Struct]) -> list[str]:
    fields = [field.encode_name for field in msgspec.structs.fields(struct)]
    return [field for field in fields if not (struct is ProviderEntry and field == "config")]


def reference() -> str:
    """The tables of config/README.md."""
    lines = []
    for title, struct in sections().items():
        lines += [f"### {title}", "", "| option | value | default | meaning |", "|---|---|---|---|"]
        by_name = {field.encode_name: field for field in msgspec.structs.fields(struct)}
        told = schema.meanings(struct)
        for key in keys_of(struct):
            field = by_name[key]
            meaning, _, default = told[key].rstrip(".").replace("default: ", "default ").partition("; default ")
            meaning, _, condition = meaning.partition("; required")
            if field.required or condition:
                default = f"required{condition}"
            elif field.default not in (msgspec.NODEFAULT, None, ""):
                default = f"`{json.dumps(field.default, default=str)}`".replace('"', "")
            cells = [f"`{key}`", config._describe(msgspec.inspect.type_info(field.type)), default, meaning]
            lines.append(f"| {' | '.join(cell.replace('|', '&#124;').replace('<', '&lt;') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


README = ROOT / "config" / "README.md"
BEGIN, END = "<!-- reference: begin (written by `python -m tests.test_config`) -->\n", "<!-- reference: end -->"


def with_reference(text: str) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{reference()}\n{END}{rest.split(END)[1]}"


def test_the_reference_has_every_option_as_the_code_has_it() -> None:
    assert with_reference(README.read_text()) == README.read_text(), "run `python -m tests.test_config`"


def test_the_shortest_file_in_the_readme_loads() -> None:
    (example,) = re.findall("```yaml\n(.*?)```", README.read_text(), re.DOTALL)

    assert len(example.splitlines()) == 3
    parse(example)


def test_the_development_configuration_needs_nothing() -> None:
    settings, warnings = config.examine(ROOT / "config" / "gateway.dev.yaml", environ={})

    assert [] == warnings
    assert sorted(entry.kind for entry in settings.providers.values()) == providers.names()
    assert settings.services == {"echo": EchoService()}
    assert len(settings.routes) == 1


def test_the_example_loads() -> None:
    settings, warnings = config.examine(ROOT / "config" / "gateway.example.yaml", environ=ENVIRON)

    assert [] == warnings
    assert {entry.kind for entry in settings.providers.values()} == {*providers.names()}
    assert {entry.auth for entry in settings.providers.values()} == {None}


EXAMPLES = sorted((ROOT / "config" / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_worked_examples_pass_the_strictest_check(path: Path, tmp_path: Path) -> None:
    """Given the variables that their first lines name, and no others."""
    text = path.read_text()
    introduction = text.partition("\n\n")[0]
    wanted = {*re.findall(r"\$\{(\w+)\}", text)}
    assert wanted == {*re.findall(r"\b[A-Z]+_[A-Z_]+\b", introduction)}
    files = Files(tmp_path)
    environ = dict.fromkeys(wanted, LONG_SECRET) | {"TLS_CERTIFICATE": files.tls.certificate, "TLS_KEY": files.tls.key}

    done = CliRunner(env=environ).invoke(cli.main, ["check", "--strict", str(path)])

    assert (0, "") == (done.exit_code, done.stderr)
    for name in wanted:
        with pytest.raises(ConfigError, match=f"{name} is not set"):
            config.load(path, environ={key: value for key, value in environ.items() if key != name})


def test_each_worked_example_is_explained_and_each_webhook_in_it_named() -> None:
    prose = README.read_text()
    assert len(EXAMPLES) == 3
    for path in EXAMPLES:
        (section,) = re.findall(rf"(?s)\n### [^\n]*\(examples/{path.name}\)\n(.*?)(?=\n##)", prose)
        settings = yaml.safe_load(path.read_text())
        for name in settings["providers"]:
            assert f"{settings['public_url']}/{name}/answer" in section


def test_every_file_that_the_readme_speaks_of_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", README.read_text()):
        if not target.startswith("http"):
            assert (README.parent / target).exists(), target


def test_the_example_names_every_variable_that_it_needs() -> None:
    introduction = (ROOT / "config" / "gateway.example.yaml").read_text().partition("\n\n")[0]

    for name in ENVIRON:
        assert name in introduction
        with pytest.raises(ConfigError, match=f"{name} is not set"):
            config.load(
                ROOT / "config" / "gateway.example.yaml", environ={key: value for key, value in ENVIRON.items() if key != name}
            )


def test_the_example_has_every_option() -> None:
    text = (ROOT / "config" / "gateway.example.yaml").read_text()
    tree = yaml.safe_load(re.sub(r"(?m)^# (?=(tls|admin_token): )", "", text))
    in_comments = {"auth", "signing_key"}

    assert {*tree} == {*keys_of(Settings)}
    for kind in providers.names():
        entries = [entry for entry in tree["providers"].values() if entry["kind"] == kind]
        wanted = {*keys_of(ProviderEntry), *keys_of(providers.load(kind).Config)}
        assert set().union(*entries) == wanted - in_comments
        for alternative in wanted & in_comments:
            block = text[text.index(f"kind: {kind}") :]
            assert f"# {alternative}: " in block[: block.index("kind:", 10)]
    for service in (WebsocketService, EchoService, RecorderService):
        entries = [entry for entry in tree["services"].values() if entry["kind"] == service.__struct_config__.tag]
        assert set().union(*entries) == {"kind", *keys_of(service)}
    assert set().union(*tree["routes"]) == {*keys_of(Route)}
    for struct in sections().values():
        for key in keys_of(struct):
            assert re.search(rf"(?m)(^ *|[{{,#-] ?){key}:", text), key
    for key in keys_of(MediaFormat):
        assert re.search(rf"[{{ ]{key}: ", text), key


if __name__ == "__main__":
    README.write_text(with_reference(README.read_text()))
    (ROOT / "config" / "gateway.schema.json").write_text(schema.text())
