"""gateway/PROTOCOL.md says what the code does: each table against the structs, each promise against its test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gateway.services import native, retry, ring, websocket
from gateway.services.dialler import LARGEST_MESSAGE

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "gateway" / "PROTOCOL.md").read_text()


def section(number: int) -> str:
    return PAGE.split(f"\n## {number} ")[1].split("\n## ")[0]


@pytest.mark.parametrize(("number", "root"), [(2, native.Up), (3, native.Down)])
def test_every_message_and_field_is_documented(number: int, root: type) -> None:
    rows = {line.split("`")[1]: line for line in section(number).splitlines() if line.startswith("| `") and "`type`" not in line}
    structs = {each.__struct_config__.tag: each for each in root.__subclasses__()}
    assert structs.keys() == {name for name in rows if name in structs}
    assert {name for name in rows if " " not in name} == structs.keys()
    for name, struct in structs.items():
        for field in struct.__struct_encode_fields__:
            assert field in ("id",) or f"`{field}`" in rows[name], f"{name}.{field}"


def test_close_codes_are_the_codes_of_the_table() -> None:
    table: dict[int, str] = {}
    for row in section(5).splitlines():
        cells = [cell.strip() for cell in row.split("|")]
        if len(cells) == 5 and re.match(r"\d{4}", cells[1]):
            table |= {int(code): cells[3] for code in re.findall(r"\d{4}", cells[1])}
    words = {retry.Verdict.RETRY: "yes", retry.Verdict.NEXT: "the next of the list first"}
    assert {code: words.get(retry.verdict(code), "no") for code in table} == table
    assert {code for code in retry._CLOSE_CODES if code != 1005} <= table.keys()
    assert all(str(code) in PAGE for code in retry.REFUSALS | retry.FINAL_STATUSES)


def test_every_promise_names_a_test_that_exists() -> None:
    names = set(re.findall(r"`(test_\w+)`", section(7)))
    written = "\n".join(path.read_text() for path in (ROOT / "tests").glob("**/test_*.py"))
    assert names
    assert [] == [name for name in names if f"def {name}(" not in written]


def test_figures_are_the_constants() -> None:
    assert (64 * 1024, 4 * 2**20, 16 * 2**20) == (
        websocket.LARGEST_TEXT_BYTES, websocket.LARGEST_AUDIO_BYTES, LARGEST_MESSAGE,
    )  # fmt: skip
    assert (5.0, 5.0, 20) == (websocket.READY_SECS, retry.STABLE_SECS, websocket.FAULTS_PER_SEC)
    assert (3, 1.25) == (retry.FLAPS, retry.REST_SECS)
    assert ring.MOST_WORD_BYTES >= 2 * websocket.LARGEST_TEXT_BYTES
