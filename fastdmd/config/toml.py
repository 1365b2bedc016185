"""A TOML file with its overrides, where every key knows its line, and the list of what is wrong with it."""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

Key = tuple[str, ...]


class ConfigError(ValueError):
    """All that is wrong with a configuration, one line each."""


@dataclass
class Source:
    """A parsed file with its overrides, the line of each key, and what is wrong so far."""

    path: Path
    data: dict[str, Any]
    lines: dict[Key, int]
    overridden: set[Key] = field(default_factory=set[Key])
    errors: dict[Key, tuple[int, str]] = field(  # (line, message); 0 is the command line
        default_factory=dict[Key, tuple[int, str]]
    )

    def error(self, key: Key, message: str) -> None:
        """Note what is wrong with a key. Only the first is kept: the others tend to follow from it."""
        line, where = 0, "command line"
        if not any(key[: len(k)] == k for k in self.overridden):
            known = next((key[:n] for n in range(len(key), 0, -1) if key[:n] in self.lines), None)
            line = self.lines[known] if known else 1
            where = f"{self.path}:{line}" if known else str(self.path)
        self.errors.setdefault(key, (line, f"{where}: {dotted(key)}: {message}"))

    def forget(self, *keys: Key) -> None:
        """Take back what is wrong with keys."""
        for key in keys:
            self.errors.pop(key, None)

    def raise_errors(self) -> None:
        if self.errors:
            raise ConfigError("\n".join(message for _, message in sorted(self.errors.values())))


def dotted(key: Key) -> str:
    return ".".join(part if re.fullmatch(r"[\w-]+", part) else to_toml(part) for part in key)


def read(path: Path, overrides: Sequence[str] = ()) -> Source:
    """Parse a file and apply `key.path=value` overrides, values in TOML syntax."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name a .toml file, such as those in configs/") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; name the .toml file in it") from None
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror}); name a .toml file that can") from None
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise ConfigError(
            f"{path}:{line}: byte 0x{e.object[e.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{path}:{_syntax_error(text, e)}") from None
    lines: dict[Key, int] = {}
    for line, _, keys in _statements(text):
        for key in keys:
            lines.setdefault(key, line)
    source = Source(path, data, lines)
    for override in overrides:
        _override(source, override)
    return source


def _statements(text: str) -> Iterator[tuple[int, str, list[Key]]]:
    """Yield each statement's first line, its text and the keys it writes.

    A last statement that is not TOML has no keys. tomllib keeps no positions, so every statement is parsed by
    itself: it ends at the first line where it is TOML.
    """
    table: Key = ()
    first, statement = 1, ""
    for n, line in enumerate(text.split("\n"), 1):
        statement += line + "\n"
        try:
            parsed = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue  # goes on in the next line
        if statement.lstrip().startswith("["):
            table = list(_paths(parsed, ()))[-1]
            yield first, statement, [table[: i + 1] for i in range(len(table))]
        else:
            yield first, statement, list(_paths(parsed, table))
        first, statement = n + 1, ""
    if statement:
        yield first, statement, []


def _paths(table: Any, prefix: Key) -> Iterator[Key]:
    for name, value in table.items():
        yield (*prefix, name)
        if isinstance(value, dict):
            yield from _paths(value, (*prefix, name))


def _syntax_error(text: str, e: tomllib.TOMLDecodeError) -> str:
    """Return `line: what is wrong` for a text that tomllib refused."""
    at = re.search(r" \(at line (\d+).*\)", str(e))
    last = int(at[1]) if at else len(text)
    *before, (line, statement, keys) = [s for s in _statements(text) if s[0] <= last and s[1].strip()]
    for key in reversed(keys):
        twice = [n for n, _, others in before if key in others]
        if twice:
            return f"{line}: {dotted(key)}: is written in line {twice[0]} already; keep one of the two"
    reason = re.sub(r" \(at .*\)", "", str(e))
    shown = statement.split("\n")[0].strip()
    remedy = "write key = value, with quotes around text"
    if shown.count("[") > shown.count("]"):
        remedy = "close the bracket"
    return f"{line}: {shown}: not TOML ({reason}); {remedy}"


def _override(source: Source, text: str) -> None:
    name, equals, value = text.partition("=")
    key = tuple(part.strip() for part in name.split("."))

    def error(message: str) -> None:
        source.errors[(text,)] = (0, f"command line: {message}")

    if not equals or not all(key):
        error(f"{text!r} is not key=value; e.g. optim.student.lr=1e-5")
        return
    try:
        parsed = tomllib.loads(f"x = {value}")
    except tomllib.TOMLDecodeError:
        quoted = f'{dotted(key)}="{value}"'
        error(f"{dotted(key)}: {value!r} is not a TOML value; text needs quotes: {quoted!r}")
        return
    table: Any = source.data
    for i, part in enumerate(key[:-1]):
        table = table.setdefault(part, {})
        is_table: bool = isinstance(table, dict)
        if not is_table:
            inner, outer = dotted(key), dotted(key[: i + 1])
            error(f"{inner}: {outer} is a value, not a table; write {outer}=.. or another key")
            return
    table[key[-1]] = parsed["x"]
    source.overridden.add(key)


def to_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(to_toml, cast('Sequence[Any]', value)))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value)


def show(value: Any) -> str:
    """Return a value for a message, on one line."""
    if isinstance(value, Mapping):
        return "a table"
    return repr(value) if isinstance(value, str) else to_toml(value)
