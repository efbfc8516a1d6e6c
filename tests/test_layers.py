"""Who may import whom, read from the source. A module in no table gets its layer from what it imports, so that a new file
is judged at once and needs no line here."""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

LAYERS = {
    0: ("gateway.errors", "gateway.media", "gateway.events", "gateway.provider"),
    1: (
        "providers",
        "gateway.audio",
        "gateway.playout",
        "gateway.session",
        "gateway.tokens",
        "gateway.routing",
        "gateway.services.native",
    ),
    2: ("gateway.bus", "gateway.direct", "gateway.metrics", "gateway.logs", "gateway.services"),
    3: ("gateway.server", "gateway.admin", "gateway.simulator"),
    4: (
        *("gateway.config", "gateway.yaml_nodes", "gateway.schema"),
        *("gateway.cli", "gateway.reload", "gateway.demo", "gateway.__main__"),  # demo: a command that needs every provider
        *(
            "gateway.worker",
            "gateway.supervisor",
            "gateway.front",
        ),  # a worker loads providers, a supervisor and its listener rule it
        *("gateway.report", "gateway.replay"),  # commands too; report needs a foreign package of its own
        "gateway.bench",  # starts processes, plays every carrier
    ),
}
VOCABULARY_ORDER = LAYERS[0]  # "each other downward"
HARMLESS = {("gateway.audio.resample", "threading")}
"""It starts no thread: it keeps what threads must not share."""
IMPURE = frozenset({"asyncio", "aiohttp", "structlog", "time", "os", "socket", "selectors", "threading", "uvloop", "logging"})
NUMERIC = {"numpy", "soxr"}  # gateway.audio only


class Import(NamedTuple):
    module: str
    line: int


def source(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def modules() -> list[str]:
    paths = (path for package in ("gateway", "providers") for path in sorted((ROOT / package).rglob("*.py")))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


MODULES = modules()
PROVIDERS = [name for name in MODULES if name.startswith("providers.") and not name.startswith("providers._")]


@cache
def imports(module: str) -> tuple[Import, ...]:
    """Every module imported anywhere in the file, in full; `from package import name` names the submodule if there is one."""
    tree = ast.parse(source(module).read_text(), str(source(module)))
    package = module if source(module).name == "__init__.py" else module.rpartition(".")[0]
    found: list[Import] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.append(Import(full if full in MODULES else base, node.lineno))
    return tuple(found)


def ours(module: str) -> bool:
    return module.partition(".")[0] in ("gateway", "providers")


def declared_layer(module: str) -> int | None:
    """The layer of the longest name in the table that the module is, or is inside of."""
    best = max(
        ((name, layer) for layer, names in LAYERS.items() for name in names if module == name or module.startswith(f"{name}.")),
        key=lambda entry: len(entry[0]),
        default=None,
    )
    return best[1] if best else None


@cache
def layer(module: str) -> int:
    """Declared, or the lowest that fits what the module imports; the package `gateway` itself holds nothing but a version."""
    declared = declared_layer(module)
    if declared is not None:
        return declared
    roots = {each.module.split(".")[0] for each in imports(module)} - {root for name, root in HARMLESS if name == module}
    own = 3 if "aiohttp" in roots else 2 if roots & IMPURE else 1 if module != "gateway" else 0
    return max([own, *(layer(each.module) for each in imports(module) if ours(each.module) and each.module != module)])


def complaint(module: str, found: Import, what: str) -> str:
    return f"{source(module).relative_to(ROOT)}:{found.line} imports {found.module}: {what}"


@pytest.mark.parametrize("module", MODULES)
def test_nobody_imports_upwards(module: str) -> None:
    assert [
        complaint(module, found, f"layer {layer(found.module)} from layer {layer(module)}")
        for found in imports(module)
        if ours(found.module) and layer(found.module) > layer(module)
    ] == []


@pytest.mark.parametrize("module", [name for name in MODULES if layer(name) <= 1])
def test_pure_modules_stay_pure(module: str) -> None:
    """No loop, socket, clock, logger or environment below the plumbing; of foreign packages msgspec, and numbers in audio."""
    allowed = {"msgspec"} | (NUMERIC if declared_layer(module) is None or module.startswith("gateway.audio") else set())
    problems = []
    for found in imports(module):
        root = found.module.split(".")[0]
        if root in IMPURE and (module, root) not in HARMLESS:
            problems.append(complaint(module, found, "not in a pure module"))
        elif not ours(root) and root not in sys.stdlib_module_names and root not in allowed:
            problems.append(complaint(module, found, f"foreign packages here are {sorted(allowed)}"))
    assert problems == []


@pytest.mark.parametrize("module", VOCABULARY_ORDER)
def test_vocabulary_imports_downwards_only(module: str) -> None:
    below = VOCABULARY_ORDER[: VOCABULARY_ORDER.index(module)]
    assert [
        complaint(module, found, "not below") for found in imports(module) if ours(found.module) and found.module not in below
    ] == []


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("providers.")])
def test_providers_know_the_vocabulary_and_their_shared_parts_only(module: str) -> None:
    """No provider imports another; nobody in the package knows the rest of the gateway."""
    assert [
        complaint(module, found, "a provider knows layer 0 and underscored modules")
        for found in imports(module)
        if ours(found.module)
        and found.module not in LAYERS[0]
        and not (found.module.startswith("providers._") or found.module == "providers")
    ] == []
    assert not {found.module for found in imports(module)} & set(PROVIDERS)


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("gateway")])
def test_only_entry_points_name_providers(module: str) -> None:
    """Entry points import the registry, never a provider; nobody else imports either, or spells a kind."""
    kinds = {name.removeprefix("providers.") for name in PROVIDERS}
    for found in imports(module):
        if found.module.split(".")[0] == "providers":
            assert declared_layer(module) == 4, complaint(module, found, "only entry points know the registry")
            assert found.module == "providers", complaint(module, found, "providers are loaded by name")
    strings = {node.value for node in ast.walk(ast.parse(source(module).read_text())) if is_text(node)}
    assert strings & kinds == set()


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize("module", MODULES)
def test_tasks_live_in_a_task_group(module: str) -> None:
    """A bare task is nobody's: its exception is lost and nobody ends it."""
    bare = []
    for node in ast.walk(ast.parse(source(module).read_text())):
        if isinstance(node, ast.Attribute) and node.attr in ("create_task", "ensure_future"):
            owner = node.value
            is_loop = isinstance(owner, ast.Call) and ast.unparse(owner.func).endswith(("get_running_loop", "get_event_loop"))
            if is_loop or (isinstance(owner, ast.Name) and owner.id in ("asyncio", "loop")):
                bare.append(f"{source(module).relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
        elif isinstance(node, ast.ImportFrom) and node.module == "asyncio":
            bare += [f"line {node.lineno}" for alias in node.names if alias.name in ("create_task", "ensure_future")]
    assert bare == []


def test_the_rules_bite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A provider that imports another one, and a clock, even inside a function, is found."""
    package = tmp_path / "providers"
    package.mkdir()
    (package / "_shared.py").write_text("")
    (package / "good.py").write_text("from . import _shared\nfrom gateway.events import Audio\n")
    (package / "bad.py").write_text("def f():\n    from time import monotonic\n    from .good import Codec\n")
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    monkeypatch.setattr(f"{__name__}.MODULES", ["providers.good", "providers.bad", "providers._shared"])
    assert [found.module for found in imports("providers.good")] == ["providers._shared", "gateway.events"]
    assert [found.module for found in imports("providers.bad")] == ["time", "providers.good"]
    for rule in (test_pure_modules_stay_pure, test_providers_know_the_vocabulary_and_their_shared_parts_only):
        rule("providers.good")
        with pytest.raises(AssertionError):
            rule("providers.bad")
