"""Prompt files: their lines, and what is refused with its place."""

import pytest

from fastdmd.data.prompts import read_prompts


def test_lines_end_at_line_feeds_alone(tmp_path):
    """Python's splitlines would end them at eight other characters, which a prompt may have."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa fox\r\n\r\n  a\u2028hound \n\n\ta\tcat\nlast".encode())
    other = tmp_path / "more.txt"
    other.write_bytes(b"one more\n")
    assert read_prompts([str(path), str(other)]) == ["a fox", "a\u2028hound", "a\tcat", "last", "one more"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a fox\na \x1b[31mred fox\n", r"line 2: control character '\\x1b'; remove it, or end lines"),
        (b"a fox\ra hound\r", r"line 1: control character '\\r'"),
        ("a\u0085b\n".encode(), r"line 1: control character '\\x85'"),
        (b"a\x00b", r"line 1: control character '\\x00'"),
        (b"a fox\n\xff", "is not UTF-8 at byte 6; save the file as UTF-8"),
        (b" \n\r\n", "hold no prompt; write one prompt per line"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(tmp_path, data, message):
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_prompts([str(path)])
