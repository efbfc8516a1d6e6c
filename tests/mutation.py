"""Would the tests notice? `python -m tests.mutation gateway.tokens …` changes a module in one small place after the other, runs
the tests that are named for it below against each of these mutants, and tells which of them survived.

A mutant is the module with a comparison turned round, a number one more or less, a text with a letter more, a condition negated,
`and` for `or`, another sign, a statement left out, or nothing returned. Each is tested in a process that is forked from one which
has loaded everything but our own code: nothing is written anywhere, and one takes seconds. The first test that fails kills it,
and so does a run that takes ten times as long as it should. Survivors are missing tests, or harmless: see `mutation.toml`.

Not mutated: annotations, docstrings, imports, and texts in `raise …` and in names of `__slots__`.
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
SIGNATURES = ("tests/providers/test_twilio_signature.py", "tests/providers/test_plivo_signature.py")
TESTS: dict[str, tuple[str, ...]] = {
    "gateway.diary": ("tests/test_diary.py",),
    "gateway.ledger": ("tests/test_ledger.py",),
    "gateway.tokens": ("tests/test_tokens.py",),
    "providers._plivo_signature": SIGNATURES[1:],
    "providers._signature": SIGNATURES,
    "providers._twilio_signature": SIGNATURES[:1],
}
LOADED = ("aiohttp", "hypothesis", "msgspec", "numpy", "plivo", "pytest", "structlog", "twilio.request_validator", "yaml")
"""In the process that is forked: what tests load besides our own code, where it is installed."""

PATIENCE = 10

_COMPARED = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
}  # fmt: skip
_COMPUTED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult, ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip


class Mutant(NamedTuple):
    """`line` is its first changed line as it was, `change` what was made of what."""

    number: int
    line: str
    change: str
    code: str


class Outcome(NamedTuple):
    """`reason` is why a survivor is harmless, empty where nobody has said so."""

    mutant: Mutant
    end: str
    reason: str = ""


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
        case ast.If() | ast.IfExp() | ast.While():
            yield lambda it: setattr(it, "test", _negated(it.test))
        case ast.comprehension() if node.ifs:
            yield lambda it: setattr(it, "ifs", [_negated(each) for each in it.ifs])
        case ast.Return(value=value) if value is not None and not _is_none(value):
            yield lambda it: setattr(it, "value", ast.Constant(None))
    for name in ("body", "orelse", "finalbody"):
        statements = getattr(node, name, None)
        if isinstance(statements, list):
            for at, statement in enumerate(statements):
                if isinstance(statement, ast.Assign) and _is_alias(statement):
                    continue
                if isinstance(statement, (ast.Assign, ast.AugAssign, ast.If, ast.For, ast.While, ast.Raise, ast.With)) or (
                    isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Constant)
                ):
                    yield lambda it, name=name, at=at: _leave_out(getattr(it, name), at)  # type: ignore[misc]


def mutants(source: str) -> Iterator[Mutant]:
    """All of a module, in the order of its lines. Raises SyntaxError for what is no module."""
    found = []
    before = ast.unparse(ast.parse(source)).splitlines()
    skipped = _skipped(ast.parse(source))
    for at, node in enumerate(ast.walk(ast.parse(source))):
        if at in skipped:
            continue
        for nth, _ in enumerate(changes(node)):
            tree = ast.parse(source)
            target = next(each for number, each in enumerate(ast.walk(tree)) if number == at)
            [*changes(target)][nth](target)
            code = ast.unparse(ast.fix_missing_locations(tree))
            after = code.splitlines()
            first = next((number for number, (old, new) in enumerate(zip(before, after, strict=False)) if old != new), 0)
            was, made = before[first].strip(), after[first].strip()
            found.append((getattr(node, "lineno", 0), was, f"{was} → {made}" if was != made else "left out", code))
    for number, (_, line, change, code) in enumerate(sorted(found, key=lambda each: each[0])):
        yield Mutant(number, line, change, code)


def _negated(test: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), test)


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


def _leave_out(statements: list[ast.stmt], at: int) -> None:
    statements[at] = ast.Pass()


def _skipped(tree: ast.Module) -> set[int]:
    """Numbers, by ast.walk, of what is not to be mutated, with all that is below."""
    roots: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            roots.append(node)
        elif isinstance(node, ast.AnnAssign) or (isinstance(node, ast.arg) and node.annotation is not None):
            roots.append(node.annotation)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.returns is not None:
            roots.append(node.returns)
        elif isinstance(node, ast.Raise):
            roots += [each for each in ast.walk(node) if isinstance(each, (ast.JoinedStr, ast.Constant))]
        elif _is_docstring(node) or (isinstance(node, ast.Assign) and (_is_alias(node) or _is_slots(node))):
            roots.append(node)
    below = {id(each) for root in roots for each in ast.walk(root)}
    return {at for at, node in enumerate(ast.walk(tree)) if id(node) in below}


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


def run(name: str, code: str, tests: Sequence[str], timeout: float) -> str:
    """`survived`, `killed` or `timeout`: what becomes of `code` in the place of the module when its tests run."""
    child = os.fork()
    if not child:
        try:
            os.setsid()
            with open(os.devnull, "r+b") as null:  # noqa: PTH123
                for descriptor in range(3):
                    os.dup2(null.fileno(), descriptor)
            sys.meta_path.insert(0, _Loader(name, code))
            import hypothesis
            import pytest

            hypothesis.settings.register_profile("mutation", database=None, derandomize=True, deadline=None)
            hypothesis.settings.load_profile("mutation")
            quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins are loaded already
            done = pytest.main(["-q", "-x", *quiet, "-p", "no:cacheprovider", *tests])
            os._exit(0 if done == 0 else 1)
        finally:
            os._exit(1)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return "killed" if status else "survived"
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


def judge(name: str, reasons: Sequence[dict[str, str]], told: Callable[[Outcome], None]) -> list[Outcome]:
    """What becomes of every mutant of a module. Raises SystemExit where its tests fail without any mutation."""
    source, tests = source_of(name).read_text(), TESTS[name]
    began = time.monotonic()
    if run(name, ast.unparse(ast.parse(source)), tests, 600) != "survived":
        raise SystemExit(f"{name}: its tests fail as it is: pytest {' '.join(tests)}")
    timeout = PATIENCE * (time.monotonic() - began) + PATIENCE
    outcomes = []
    for mutant in mutants(source):
        end = run(name, mutant.code, tests, timeout)
        known = (each["reason"] for each in reasons if (each["module"], each["change"]) == (name, mutant.change))
        outcomes.append(Outcome(mutant, end, next(known, "") if end == "survived" else ""))
        told(outcomes[-1])
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", default=[*TESTS], help=f"some of {', '.join(TESTS)}; else all")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--list", action="store_true", help="tell the mutants, and run nothing")
    options = parser.parse_args()
    if unknown := [name for name in options.modules if name not in TESTS]:
        parser.error(f"no tests are named for {', '.join(unknown)}")
    os.chdir(ROOT)
    reasons: list[dict[str, str]] = tomllib.loads(ROOT.joinpath("tests", "mutation.toml").read_text())["harmless"]
    if options.list:
        for name in options.modules:
            for mutant in mutants(source_of(name).read_text()):
                print(f"{name}: {mutant.change}")
        return
    for name in LOADED:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    found, missing = {}, 0

    def tell(name: str, outcome: Outcome) -> None:
        if outcome.end == "survived" and not outcome.reason:
            print(f"{name}: survived: {outcome.mutant.change}", file=sys.stderr, flush=True)

    for name in options.modules:
        outcomes = judge(name, reasons, lambda outcome, name=name: tell(name, outcome))  # type: ignore[misc]
        survivors = [each for each in outcomes if each.end == "survived"]
        found[name] = {
            "mutants": len(outcomes),
            "killed": len(outcomes) - len(survivors),
            "harmless": [{"change": each.mutant.change, "reason": each.reason} for each in survivors if each.reason],
            "survived": [each.mutant.change for each in survivors if not each.reason],
        }
        missing += len(found[name]["survived"])  # type: ignore[arg-type]
        if not options.json:
            killed, harmless = found[name]["killed"], len(found[name]["harmless"])  # type: ignore[arg-type]
            print(
                f"{name}: {killed} of {len(outcomes)} killed, {harmless} harmless, {len(outcomes) - killed - harmless} survived"
            )
    if options.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    raise SystemExit(1 if missing else 0)


if __name__ == "__main__":
    main()
