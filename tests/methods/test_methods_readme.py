"""fastdmd/methods/README.md says where each equation is: it has to be there."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from fastdmd.methods import METHODS

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "fastdmd" / "methods" / "README.md").read_text(encoding="utf-8")
REFERENCES = re.findall(r"\[([\w/]+\.py):(\d+)\]\(\.\./\.\./([\w/]+\.py)#L(\d+)\) `(.+?)` \|", README)


def test_every_reference_is_at_its_line():
    assert len(REFERENCES) > 15
    assert README.count("#L") == len(REFERENCES)
    wrong = []
    for path, line, link, anchor, code in REFERENCES:
        lines = [text.strip() for text in (REPOSITORY / path).read_text(encoding="utf-8").splitlines()]
        if (path, line) != (link, anchor) or lines[int(line) - 1] != code:
            wrong.append(f"{path}:{line} {code}, which is at {[i + 1 for i, text in enumerate(lines) if text == code]}")
    assert wrong == []


@pytest.mark.parametrize("name", METHODS)
def test_every_key_of_a_method_is_named(name):
    keys = {field.name for field in fields(METHODS[name].Config)} - {"name"}
    assert [key for key in keys if f"`{key}`" not in README] == []
    assert f"## {name}" in README
