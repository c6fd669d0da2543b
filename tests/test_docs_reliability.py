"""docs/reliability.md names tests that are there."""

import re

import pytest
from tiny_training import ROOT

TEXT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ") and "`test_" in line]


def named(row):
    """(file, test) of every test that a row of a table names; the test is "" where a whole file is meant."""
    found, file = [], ""
    for name in re.findall(r"`([\w.]+)`", row):
        if name.startswith("test_") and name.endswith(".py"):
            file = name
            found.append((file, ""))
        elif file and name.startswith(("test_", "Test")):
            found.append((file, name))
    return found


def test_the_table_is_found():
    assert len(ROWS) > 30
    assert ("test_storm.py", "TestPlan") in [each for row in ROWS for each in named(row)]


@pytest.mark.parametrize("file, test", sorted({each for row in ROWS for each in named(row)}))
def test_it_is_there(file, test):
    source = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert re.search(rf"^ *(def|class) {test}\b", source, re.MULTILINE) if test else "def test_" in source
