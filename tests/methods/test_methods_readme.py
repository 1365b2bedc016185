"""Test that fastdmd/methods/README.md quotes code that is there, and names every key."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from fastdmd.methods import METHODS

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "fastdmd" / "methods" / "README.md").read_text(encoding="utf-8")
# [path](../../path) `code` |
REFERENCES = re.findall(r"\[([\w/]+\.py)\]\(\.\./\.\./([\w/]+\.py)\) `(.+?)` \|", README)


def is_quoted(path: str, code: str) -> bool:
    """Return whether some line of a file is this code, whatever its number and indentation."""
    lines = (REPOSITORY / path).read_text(encoding="utf-8").splitlines()
    return code in [line.strip() for line in lines]


def test_every_reference_quotes_its_file():
    assert len(REFERENCES) > 15
    assert README.count("](../../") - README.count("![") == len(REFERENCES)
    assert [link for path, link, _ in REFERENCES if path != link] == []
    assert [(path, code) for path, _, code in REFERENCES if not is_quoted(path, code)] == []


def test_no_reference_has_a_line_number():
    """It would be wrong after the next change above that line."""
    assert re.findall(r"#L\d+|\.py:\d+", README) == []


@pytest.mark.parametrize("name", METHODS)
def test_every_key_of_a_method_is_named(name):
    keys = {field.name for field in fields(METHODS[name].Config)} - {"name"}
    assert [key for key in keys if f"`{key}`" not in README] == []
    assert f"## {name}" in README
