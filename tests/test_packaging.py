"""What ships: the wheel, the image, the systemd unit, the Kubernetes manifests; checked as far as this machine's tools go."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from gateway import config, metrics
from gateway.settings import Settings
from gateway.supervisor import STOP_SECS
from tests.test_advice import LONG

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "config"

# --- the wheel ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    directory = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (path,) = directory.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_has_both_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    tracked = subprocess.run(["git", "ls-files", "gateway", "providers"], cwd=ROOT, check=True, capture_output=True, text=True)
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {"gateway/py.typed", "providers/py.typed"} < names
    assert any(name.startswith("gateway/speech/") and name.endswith(".wav") for name in names)
    strays = {
        name for name in names if not re.fullmatch(r"(gateway|providers)/[\w./-]+\.(py|typed|wav|md|yaml|json|html|css|js)", name)
    }
    assert not {name for name in strays if not name.endswith("py.typed")}
    assert {*tracked.stdout.split()} <= names | {name for name in tracked.stdout.split() if not (ROOT / name).exists()}
    assert not [name for name in names if "test" in name.lower().split("/")[0] or "__pycache__" in name]


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    inside = {name.partition(".dist-info/")[2]: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    assert {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"} == {*inside}
    assert "telephony-gateway = gateway.cli:main" in inside["entry_points.txt"]
    assert "Root-Is-Purelib: true" in inside["WHEEL"]
    wanted = re.findall(r"(?m)^Requires-Dist: ([\w-]+)", inside["METADATA"])
    assert {"aiohttp", "msgspec", "numpy", "PyYAML"} < {*wanted} or {"pyyaml"} < {name.lower() for name in wanted}
    assert not {"pytest", "twilio", "plivo", "jsonschema"} & {*wanted}


# --- the image ------------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """Instruction and argument, one per line of the Dockerfile as Docker sees it."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (CONFIG / "Dockerfile").read_text())
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(word, " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in lines)]


def test_the_image_is_built_in_two_stages_from_what_is_there() -> None:
    found = instructions()
    assert {word for word, _ in found} <= {
        *("ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD")
    }
    stages = [rest for word, rest in found if word == "FROM"]
    assert ["python:${PYTHON} AS build", "python:${PYTHON}"] == stages
    assert ("ARG", "PYTHON=3.11-slim") == found[0]
    admitted = (CONFIG / "Dockerfile.dockerignore").read_text().splitlines()
    for rest in [rest for word, rest in found if word == "COPY" and not rest.startswith("--from")]:
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in admitted
    # What the package is built from is all there.
    copied = " ".join(rest for word, rest in found if word == "COPY")
    for needed in ("pyproject.toml", "README.md", "LICENSE", "gateway gateway", "providers providers"):
        assert needed in copied


def test_the_image_runs_as_nobody_and_says_how_it_fares() -> None:
    last = {}
    for word, rest in instructions():
        if word == "FROM":
            last = {}
        last[word] = rest
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", last["USER"])
    assert "SIGTERM" == last["STOPSIGNAL"]
    assert '["telephony-gateway"]' == last["ENTRYPOINT"]
    assert '["serve", "--config", "/etc/telephony-gateway/gateway.yaml"]' == last["CMD"]
    assert "RUN" not in last, "the final stage only takes over what the first has built"


async def test_the_images_health_check_works(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = [rest for word, rest in instructions() if word == "HEALTHCHECK"]
    command = yaml.safe_load(check.partition("CMD ")[2])
    assert "python" == command[0]

    async def healthy(port: int) -> bool:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command[1:], env={"GATEWAY_PORT": str(port)}, stderr=asyncio.subprocess.DEVNULL
        )
        return await process.wait() == 0

    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        assert await healthy(port)
    assert not await healthy(port)


# --- the unit -------------------------------------------------------------------------------------------------------------

UNIT = CONFIG / "telephony-gateway.service"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_unit_and_little_to_attack(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/telephony-gateway/bin/telephony-gateway", "/bin/true"))
    verified = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False, timeout=30)
    assert (0, "") == (verified.returncode, verified.stderr)
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=20", unit], capture_output=True, text=True, check=False
    )
    assert 0 == rated.returncode, rated.stdout[-200:]


def test_the_unit_reloads_restarts_and_limits() -> None:
    parser = ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text())
    service = parser["Service"]
    assert service["ExecStart"].endswith("telephony-gateway serve --config /etc/telephony-gateway/gateway.yaml")
    assert "/bin/kill -HUP $MAINPID" == service["ExecReload"]
    assert "78" == service["RestartPreventExitStatus"]
    assert ("on-failure", "0") == (service["Restart"], service["LimitCORE"])
    assert int(service["LimitNOFILE"]) >= 65_536
    default = next(each.default for each in msgspec.structs.fields(Settings) if each.name == "drain_secs")
    assert int(service["TimeoutStopSec"]) > default + 2 * STOP_SECS
    assert "process" == service["KillMode"], "else systemd kills the workers with their supervisor"
    assert ("notify", "30") == (service["Type"], service["WatchdogSec"]), "gateway/systemd.py feeds it"
    reloads = re.findall(r"(?m)^ExecReload=(.*)$", UNIT.read_text())
    assert "/opt/telephony-gateway/bin/telephony-gateway check /etc/telephony-gateway/gateway.yaml" == reloads[0]


# --- Kubernetes -----------------------------------------------------------------------------------------------------------


def manifests() -> dict[str, dict[str, Any]]:
    """By kind; there is one of each."""
    texts = [path.read_text() for path in sorted((CONFIG / "kubernetes").glob("*.yaml"))]
    found = [document for text in texts for document in yaml.safe_load_all(text)]
    assert len(found) == len({document["kind"] for document in found})
    return {document["kind"]: document for document in found}


MANIFESTS = manifests()
POD = MANIFESTS["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


def settings() -> Settings:
    environ = dict.fromkeys(["GATEWAY_SECRET", "GATEWAY_ADMIN_TOKEN", "TWILIO_AUTH_TOKEN", "AGENT_TOKEN"], LONG)
    made, warnings = config.examine_text(MANIFESTS["ConfigMap"]["data"]["gateway.yaml"], environ=environ)
    assert [] == warnings
    return made


def test_the_manifests_hang_together() -> None:
    assert {"ConfigMap", "Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget", "Service"} == {*MANIFESTS}
    labels = {"app.kubernetes.io/name": "telephony-gateway"}
    for manifest in MANIFESTS.values():
        assert ("telephony-gateway", labels) == (manifest["metadata"]["name"], manifest["metadata"]["labels"])
    spec = MANIFESTS["Deployment"]["spec"]
    assert labels == spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    assert (
        labels == MANIFESTS["Service"]["spec"]["selector"] == MANIFESTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]
    )
    assert "replicas" not in spec, "applying it would undo what the autoscaler did"
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    made = settings()
    assert f"0.0.0.0:{ports['calls']}" == made.listen
    assert f"0.0.0.0:{ports['admin']}" == made.admin
    (port,) = MANIFESTS["Service"]["spec"]["ports"]
    assert "calls" == port["targetPort"], "the operators' listener is nobody's business outside"
    mounted = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert {volume["name"] for volume in POD["volumes"]} == {*mounted}
    assert f"{mounted['configuration']}/{next(iter(MANIFESTS['ConfigMap']['data']))}" == CONTAINER["args"][-1]


@pytest.mark.parametrize("kind", [*MANIFESTS])
def test_the_api_servers_schemas_take_the_manifests(kind: str) -> None:
    """`pip install kubernetes-validate` brings the schemas, all of them, which is why it is not among the tools."""
    schemas = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for version in ("1.29", schemas.latest_version()):
        schemas.validate(MANIFESTS[kind], version, strict=True)


def test_the_pod_may_do_little() -> None:
    user = next(rest for word, rest in instructions() if word == "USER")
    about = POD["securityContext"]
    assert user == f"{about['runAsUser']}:{about['runAsGroup']}"
    assert about["runAsNonRoot"] is True
    inside = CONTAINER["securityContext"]
    assert (True, False, ["ALL"]) == (
        inside["readOnlyRootFilesystem"],
        inside["allowPrivilegeEscalation"],
        inside["capabilities"]["drop"],
    )
    assert POD["automountServiceAccountToken"] is False
    assert "cpu" not in CONTAINER["resources"]["limits"], "throttling is heard"


def test_probes_ask_what_needs_no_token() -> None:
    for probe, path in (("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
        assert {"path": path, "port": "admin"} == CONTAINER[probe]["httpGet"]
    alive = CONTAINER["livenessProbe"]
    assert alive["periodSeconds"] * alive["failureThreshold"] >= 60, "a restart ends every call"


def test_it_scales_by_a_metric_that_there_is() -> None:
    spec = MANIFESTS["HorizontalPodAutoscaler"]["spec"]
    assert "telephony-gateway" == spec["scaleTargetRef"]["name"]
    (metric,) = spec["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name in metrics.GAUGES
    assert int(metric["pods"]["target"]["averageValue"]) < 0.8 * settings().max_calls
    assert f"{name}{{<<.LabelMatchers>>}}" in (CONFIG / "kubernetes" / "autoscaler.yaml").read_text()


def test_a_pod_that_goes_has_time_to_let_its_calls_end() -> None:
    """The hook's pause, `drain_secs` and the end itself fit into the grace period."""
    command = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    (pause,) = map(float, re.findall(r"time\.sleep\((\d+)\)", command[-1]))
    assert 0 < pause + settings().drain_secs + STOP_SECS <= POD["terminationGracePeriodSeconds"]
    compile(command[-1], "preStop", "exec")
