"""Would the tests notice? `python -m tests.mutation gateway.tokens …` changes a module in one small place after the other, runs
the tests that are named for it below against each of these mutants, and tells which of them survived.

A mutant is the module with a comparison turned round, a number one more or less, a text with a letter more, a condition negated,
`and` for `or`, another sign, a statement left out, or nothing returned. Each is tested in a process that is forked from one which
has loaded everything but what depends on the module: nothing is written, and one takes a third of a second. The first test that
fails kills it, and so does a run that computes ten times as long as it should: it loops, and is told as such. Whatever waits for
ever without computing is a survivor. Survivors are missing tests, or harmless: see `mutation.toml`.

Not mutated: annotations, docstrings, imports, texts in `raise …` and in names of `__slots__`; nor what the type check or the
benchmarks look after: that structs are frozen and unseen by the garbage collector, and `assert_never`.

A module is judged in pieces, each in a process of its own: `--jobs 2` at a time, each behind the command of `--wrap`. After tests
were added, `--again` judges those that survived the run that is stored, as long as the module itself is the same.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from types import ModuleType
from typing import Any, NamedTuple

from tests.results import load, store

ROOT = Path(__file__).parent.parent
SIGNATURES = (
    "tests/providers/test_signature.py",
    "tests/providers/test_twilio_signature.py",
    "tests/providers/test_plivo_signature.py",
)


def _codec(kind: str, *own: str) -> tuple[str, ...]:
    accounts = ("tests/providers/test_xml.py", "tests/providers/test_api.py")
    return f"tests/providers/test_wire.py -k {kind}", *own, *accounts, f"tests/test_conformance.py -k '{kind} and not worst'"


TESTS: dict[str, tuple[str, ...]] = {
    "gateway.diary": ("tests/test_diary.py",),
    "gateway.ledger": ("tests/test_ledger.py",),
    "gateway.playout": (
        "tests/test_session.py",
        "tests/test_playout_machine.py",
        "tests/test_recording.py -k 'not quarter'",
        "tests/test_playout.py",
    ),
    "gateway.recital": ("tests/test_recital.py", "tests/test_playout_machine.py"),
    "gateway.session": (
        "tests/test_session.py",
        "tests/test_text_session.py",
        "tests/test_recording.py -k 'not quarter'",
        "tests/test_reorder.py",
        "tests/test_recital.py",
        "tests/test_playout_machine.py",
    ),
    "gateway.tokens": ("tests/test_tokens.py",),
    "providers._json": ("tests/providers/test_json.py", "tests/providers/test_wire.py", "tests/providers/test_plivo.py"),
    "providers._plivo_signature": SIGNATURES[2:],
    "providers._signature": SIGNATURES,
    "providers._twilio_signature": SIGNATURES[1:2],
    "providers.plivo_audio_streaming": _codec("plivo_audio_streaming", "tests/providers/test_plivo.py"),
    "providers.twilio_conversation_relay": _codec(
        "twilio_conversation_relay", "tests/providers/test_twilio_conversation_relay.py"
    ),
    "providers.twilio_media_streams": _codec("twilio_media_streams", "tests/providers/test_twilio_media_streams.py"),
}
"""Quick ones that belong to a module, in the order in which they kill; each run of pytest's own words."""

LOADED = (
    "aiohttp", "hypothesis.stateful", "msgspec", "numpy", "plivo", "pytest", "pytest_aiohttp", "pytest_asyncio", "pytest_timeout",
    "structlog", "twilio.request_validator", "xdist.plugin", "yaml",
)  # fmt: skip
"""In the process that is forked: what tests load besides our own code, where it is installed."""

PIECE = 100
"""Mutants that are judged by one process, in less than a minute."""

PATIENCE = 10
"""A mutant loops when it computes that many times as long as the module does, and as many seconds more."""

MOST_SECS = 100
MOST_BYTES = 2 << 30
"""Of a run that waits, and of one that collects."""

LEAST_KILLED = 0.85
"""Of a module's mutants, harmless ones counted among those that are not."""

_COMPARED = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
}  # fmt: skip
_COMPUTED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult, ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip


class Mutant(NamedTuple):
    """`change` says where in the module, and what was made of what: `Class.method: a < b → a <= b`."""

    number: int
    change: str
    code: str


class Site(NamedTuple):
    """Where a mutant differs: in the change `nth` of the node `at` in the order of ast.walk."""

    line: int
    at: int
    nth: int
    place: str


Change = Callable[[Any], None]


def changes(node: ast.AST) -> Iterator[Change]:
    """Each a small change of the node, in place."""
    match node:
        case ast.Compare():
            for at, op in enumerate(node.ops):
                yield lambda it, at=at, op=op: it.ops.__setitem__(at, _COMPARED[type(op)]())  # type: ignore[misc]
        case ast.Constant(value=bool()):
            yield lambda it: setattr(it, "value", not it.value)
        case ast.Constant(value=int() | float()):
            yield lambda it: setattr(it, "value", it.value + 1)
            yield lambda it: setattr(it, "value", it.value - 1)
        case ast.Constant(value=str()):
            yield lambda it: setattr(it, "value", f"{it.value}x")
        case ast.Constant(value=bytes()):
            yield lambda it: setattr(it, "value", it.value + b"x")
        case ast.BoolOp():
            yield lambda it: setattr(it, "op", ast.Or() if isinstance(it.op, ast.And) else ast.And())
        case ast.BinOp() | ast.AugAssign() if type(node.op) in _COMPUTED:
            yield lambda it: setattr(it, "op", _COMPUTED[type(it.op)]())
        case ast.UnaryOp(op=ast.Not()):
            yield lambda it: setattr(it, "operand", _negated(it.operand))
        case ast.UnaryOp(op=ast.USub()):
            yield lambda it: setattr(it, "op", ast.UAdd())
        case ast.If() | ast.IfExp() | ast.While() if not _is_turned(node.test):
            yield lambda it: setattr(it, "test", _negated(it.test))
        case ast.comprehension():
            for at, test in enumerate(node.ifs):
                if not _is_turned(test):
                    yield lambda it, at=at: it.ifs.__setitem__(at, _negated(it.ifs[at]))  # type: ignore[misc]
        case ast.Return(value=value) if value is not None and not _is_none(value):
            yield lambda it: setattr(it, "value", ast.Constant(None))
    for name in ("body", "orelse", "finalbody"):
        statements = getattr(node, name, None)
        if isinstance(statements, list):
            for at, statement in enumerate(statements):
                if (isinstance(statement, ast.Assign) and _is_alias(statement)) or ast.unparse(statement).startswith(
                    "assert_never"
                ):
                    continue
                if isinstance(statement, (ast.Assign, ast.AugAssign, ast.If, ast.For, ast.While, ast.Raise, ast.With)) or (
                    isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Constant)
                ):
                    yield lambda it, name=name, at=at: _leave_out(getattr(it, name), at)  # type: ignore[misc]


def sites(source: str) -> list[Site]:
    """All of a module, in the order of its lines. Raises SyntaxError for what is no module."""
    tree = ast.parse(source)
    skipped, places = _skipped(tree), _places(tree)
    found = [
        Site(getattr(node, "lineno", 0), at, nth, places[id(node)])
        for at, node in enumerate(ast.walk(tree))
        if id(node) not in skipped
        for nth, _ in enumerate(changes(node))
    ]
    return sorted(found, key=lambda site: site.line)


def mutants(source: str, part: slice = slice(None)) -> Iterator[Mutant]:
    """Those of `part` of all the sites of a module."""
    before = ast.unparse(ast.parse(source)).splitlines()
    numbered = [*enumerate(sites(source))]
    for number, site in numbered[part]:
        tree = ast.parse(source)
        node = next(each for at, each in enumerate(ast.walk(tree)) if at == site.at)
        [*changes(node)][site.nth](node)
        code = ast.unparse(ast.fix_missing_locations(tree))
        was, made = next((old, new) for old, new in zip(before, code.splitlines(), strict=False) if old != new)
        yield Mutant(number, f"{site.place or 'module'}: {was.strip()} → {made.strip()}", code)


def _negated(test: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), test)


def _is_turned(test: ast.expr) -> bool:
    """Whether its own mutant is its negation."""
    match test:
        case ast.Compare(ops=[ast.Eq() | ast.NotEq() | ast.Is() | ast.IsNot() | ast.In() | ast.NotIn()]):
            return True
        case ast.UnaryOp(op=ast.Not()) | ast.Constant(value=bool()):
            return True
    return False


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


def _leave_out(statements: list[ast.stmt], at: int) -> None:
    statements[at] = ast.Pass()


def _places(tree: ast.Module) -> dict[int, str]:
    """The qualified name of what each node stands in, by its id."""
    places = {id(tree): ""}
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            name = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) else ""
            places[id(child)] = ".".join(filter(None, (places[id(node)], name)))
    return places


def _skipped(tree: ast.Module) -> set[int]:
    """Ids of what is not to be mutated, with all that is below."""
    roots: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            roots.append(node)
        elif isinstance(node, ast.AnnAssign) or (isinstance(node, ast.arg) and node.annotation is not None):
            roots.append(node.annotation)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.returns is not None:
            roots.append(node.returns)
        elif isinstance(node, ast.ClassDef):
            roots += [each for each in node.keywords if each.arg in ("frozen", "gc")]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "assert_never":
            roots.append(node)
        elif isinstance(node, ast.Raise):
            roots += [each for each in ast.walk(node) if isinstance(each, (ast.JoinedStr, ast.Constant))]
        elif _is_docstring(node) or (isinstance(node, ast.Assign) and (_is_alias(node) or _is_slots(node))):
            roots.append(node)
    return {id(each) for root in roots for each in ast.walk(root)}


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_slots(node: ast.Assign) -> bool:
    return ast.unparse(node.targets[0]) == "__slots__"


def _is_alias(node: ast.Assign) -> bool:
    return isinstance(node.value, ast.Subscript) and ast.unparse(node.value.value) in ("Literal", "dict", "list", "tuple")


class _Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module another code."""

    def __init__(self, name: str, code: str) -> None:
        self.name = name
        self.code = code

    def find_spec(self, fullname: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = str(source_of(self.name))
        exec(compile(self.code, module.__file__, "exec"), module.__dict__)  # noqa: S102


def source_of(name: str) -> Path:
    return ROOT.joinpath(*name.split(".")).with_suffix(".py")


class _Away(importlib.abc.MetaPathFinder):
    """As if one module were not there."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == self.name:
            raise ImportError(fullname, name=fullname)


def load_all_but(name: str) -> None:
    """Import what tests need and does not depend on the module, for processes that are forked."""
    for each in LOADED:
        if importlib.util.find_spec(each.partition(".")[0]) is not None:
            importlib.import_module(each)
    away = _Away(name)
    sys.meta_path.insert(0, away)
    for path in sorted([*ROOT.glob("gateway/**/*.py"), *ROOT.glob("providers/**/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__main__":
            try:
                importlib.import_module(".".join(parts).removesuffix(".__init__"))
            except ImportError as error:
                if error.name != name:
                    raise
    sys.meta_path.remove(away)


class Run(NamedTuple):
    """`end` is `survived`, `killed`, `looped` when it computed too long, or `stuck` when it waited too long."""

    end: str
    cpu_secs: float


def run(name: str, code: str, tests: Sequence[str], cpu_secs: float) -> Run:
    """What becomes of `code` in the place of the module when its tests run."""
    directory = mkdtemp(prefix="mutant-")  # pytest's own numbered ones are swept by runs beside this one
    child = os.fork()
    if not child:
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (ceil(cpu_secs), ceil(cpu_secs) + 5))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
            with open(os.devnull, "r+b") as null:  # noqa: PTH123
                for descriptor in range(3):
                    os.dup2(null.fileno(), descriptor)
            sys.meta_path.insert(0, _Loader(name, code))
            import hypothesis
            import pytest

            hypothesis.settings.register_profile("mutation", database=None, derandomize=True, deadline=None)
            quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins are loaded already
            options = ["-q", "-x", *quiet, "-p", "no:cacheprovider", "--hypothesis-profile", "mutation"]
            options += ["--basetemp", f"{directory}/of-pytest"]
            for each in tests:
                if pytest.main([*options, *shlex.split(each)]):
                    os._exit(1)
            os._exit(0)
        finally:
            os._exit(1)
    try:
        deadline = time.monotonic() + MOST_SECS
        while time.monotonic() < deadline:
            ended, status, used = os.wait4(child, os.WNOHANG)
            if ended:
                looped = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
                return Run("looped" if looped else "killed" if status else "survived", used.ru_utime + used.ru_stime)
            time.sleep(0.005)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return Run("stuck", 0)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def judge(name: str, tests: Sequence[str], part: slice, only: Sequence[str] | None = None) -> list[tuple[int, str, str]]:
    """Number, change and end of the mutants of `part`, or of `only` these changes.

    Raises SystemExit where the tests fail without any mutation.
    """
    source = source_of(name).read_text()
    load_all_but(name)
    asis = run(name, ast.unparse(ast.parse(source)), tests, cpu_secs=MOST_SECS)
    if asis.end != "survived":
        raise SystemExit(f"{name}: its tests fail as it is: pytest {' '.join(tests)}")
    most = PATIENCE * (asis.cpu_secs + 1)
    chosen = mutants(source, part) if only is None else [each for each in mutants(source) if each.change in only][part]
    return [(each.number, each.change, run(name, each.code, tests, most).end) for each in chosen]


def digest(name: str) -> str:
    """Of a module's source."""
    return hashlib.sha256(source_of(name).read_bytes()).hexdigest()[:16]


def summed(name: str, ends: Sequence[tuple[str, str]], reasons: Sequence[dict[str, str]]) -> dict[str, Any]:
    """What is stored of a module, by the end of each change."""
    known = {each["change"]: each["reason"] for each in reasons if each["module"] == name}
    survivors = [change for change, end in ends if end in ("survived", "stuck")]
    excused = [change for change in survivors if change in known]
    return {
        "source": digest(name),
        "mutants": len(ends),
        "killed": len(ends) - len(survivors),
        "harmless": len(excused),
        "excused": excused,
        "looped": [change for change, end in ends if end == "looped"],
        "survived": [change for change in survivors if change not in known],
    }


def merged(stored: dict[str, Any], again: dict[str, Any]) -> dict[str, Any]:
    """What is stored, with what became of its survivors in another run."""
    excused = [*stored["excused"], *again["excused"]]
    left = len(excused) + len(again["survived"])
    figures = {"killed": stored["mutants"] - left, "harmless": len(excused), "excused": excused}
    return stored | figures | {"looped": [*stored["looped"], *again["looped"]], "survived": again["survived"]}


def stale(name: str, source: str, reasons: Sequence[dict[str, str]]) -> list[str]:
    """Changes that have a reason, of lines that are not there any more."""
    lines = {line.strip() for line in ast.unparse(ast.parse(source)).splitlines()}
    changes = [each["change"] for each in reasons if each["module"] == name]
    return [change for change in changes if change.partition(": ")[2].partition(" → ")[0] not in lines]


def excuses() -> list[dict[str, str]]:
    """The harmless ones: `module`, `change` and `reason`."""
    found: list[dict[str, str]] = tomllib.loads(ROOT.joinpath("tests", "mutation.toml").read_text())["harmless"]
    return found


def in_pieces(name: str, jobs: int, wrap: Sequence[str], only: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """Change and end of all mutants of a module, judged by other processes. Raises SystemExit where one of them fails."""
    count = len(sites(source_of(name).read_text())) if only is None else len(only)
    pieces = ceil(count / PIECE)

    def piece(number: int) -> list[tuple[int, str, str]]:
        again = [] if only is None else ["--again"]
        command = [*wrap, sys.executable, "-m", "tests.mutation", name, "--part", f"{number}/{pieces}", *again]
        done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"{name}: piece {number} of {pieces} failed")
        found: list[tuple[int, str, str]] = json.loads(done.stdout)
        return found

    with TemporaryDirectory() as compiled, ThreadPoolExecutor(jobs) as pool:
        environment = os.environ | {"PYTHONPYCACHEPREFIX": compiled, "PYTHONDONTWRITEBYTECODE": ""}
        judged = [each for found in pool.map(piece, range(1, pieces + 1)) for each in found]
    return [(change, end) for _, change, end in sorted(judged)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"some of {', '.join(TESTS)}; else all")
    parser.add_argument("--list", action="store_true", help="tell the mutants, and run nothing")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--wrap", type=shlex.split, default=[], metavar="COMMAND", help="run every piece with this before it")
    parser.add_argument("--again", action="store_true", help="only what survived the last time")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--store", action="store_true")
    options = parser.parse_args()
    if unknown := [name for name in options.modules if name not in TESTS]:
        parser.error(f"no tests are named for {', '.join(unknown)}")
    os.chdir(ROOT)
    modules = options.modules or [*TESTS]
    if options.list:
        for name in modules:
            for mutant in mutants(source_of(name).read_text()):
                print(f"{name}: {mutant.change}")
        return 0
    stored = kept()
    if options.part:
        number, pieces = map(int, options.part.split("/"))
        only = stored[modules[0]]["survived"] if options.again else None
        print(json.dumps(judge(modules[0], TESTS[modules[0]], slice(number - 1, None, pieces), only)))
        return 0
    reasons, found = excuses(), {}
    for name in modules:
        only = stored[name]["survived"] if options.again else None
        if only is not None and stored[name]["source"] != digest(name):
            raise SystemExit(f"{name}: has changed since")
        found[name] = summed(name, in_pieces(name, options.jobs, options.wrap, only), reasons)
        if only is not None:
            found[name] = merged(stored[name], found[name])
        for kind in ("looped", "survived"):
            for change in found[name][kind]:
                print(f"{name}: {kind}: {change}")
        for change in stale(name, source_of(name).read_text(), reasons):
            print(f"{name}: has a reason, and is made no more: {change}")
        if options.store:
            put(found[name], name)
        print("{}: {mutants} mutants, {killed} killed, {harmless} harmless".format(name, **found[name]), flush=True)
    return 0 if all(passes(each) for each in found.values()) else 1


def kept() -> dict[str, Any]:
    """What is stored, by module."""
    earlier = load().get("mutation")
    return {name: each for name, each in (earlier.figures if earlier else {}).items() if name in TESTS}


def put(figures: dict[str, Any], name: str) -> None:
    """Store what was found of a module beside the others."""
    every = dict(sorted((kept() | {name: figures}).items()))
    store("mutation", every, passed=all(map(passes, every.values())), module="tests.mutation")


def passes(figures: dict[str, Any]) -> bool:
    """Whether enough of a module's mutants are killed, and each of the others is known to be harmless."""
    return figures["killed"] >= LEAST_KILLED * figures["mutants"] and not figures["survived"]


if __name__ == "__main__":
    sys.exit(main())
