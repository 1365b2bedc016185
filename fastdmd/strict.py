"""Strict TOML to frozen dataclasses: every error of a file at once, each with its line, its key and a remedy.

A dataclass may have `problems()`, yielding (key, message) for values that have the right type and make no sense.
"""

import difflib
import re
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
Key = tuple[str, ...]


class ConfigError(ValueError):
    """All that is wrong with a configuration, one line each."""


@dataclass
class Source:
    """A parsed file with its overrides, the line of each key, and the errors found so far."""

    path: Path
    data: dict[str, Any]
    lines: dict[Key, int]
    overridden: set[Key] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)

    def error(self, key: Key, message: str) -> None:
        if any(key[: len(k)] == k for k in self.overridden):
            where = "command line"
        else:
            known = next((key[:n] for n in range(len(key), 0, -1) if key[:n] in self.lines), None)
            where = str(self.path) if known is None else f"{self.path}:{self.lines[known]}"
        self.errors.append(f"{where}: {'.'.join(key)}: {message}")

    def raise_errors(self) -> None:
        if self.errors:
            raise ConfigError("\n".join(self.errors))


def read(path: Path, overrides: Sequence[str] = ()) -> Source:
    """Parse a file and apply `key.path=value` overrides, values in TOML syntax."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; the repository's are in configs/") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; name the .toml file in it") from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: byte {e.start} is not UTF-8; save the file as UTF-8") from None
    try:
        source = Source(path, tomllib.loads(text), _key_lines(text))
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{path}: not TOML: {e}; mend that line") from None
    for override in overrides:
        _override(source, override)
    return source


def _key_lines(text: str) -> dict[Key, int]:
    """The line of each table and key, by reading lines: tomllib keeps no positions."""
    lines: dict[Key, int] = {}
    table: Key = ()
    for n, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[([\w.\- ]+)\]", line):
            table = tuple(part.strip() for part in header[1].split("."))
            lines[table] = n
        elif key := re.match(r"\s*([\w.\-]+)\s*=", line):
            lines[(*table, *key[1].split("."))] = n
    return lines


def _override(source: Source, text: str) -> None:
    name, equals, value = text.partition("=")
    key = tuple(part.strip() for part in name.split("."))
    if not equals or not all(key):
        source.errors.append(f"command line: '{text}' is not key=value; e.g. optim.student.lr=1e-5")
        return
    try:
        parsed = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        source.errors.append(
            f"command line: {name}: {value!r} is not a TOML value; text needs quotes: '{name}=\"{value}\"'"
        )
        return
    table = source.data
    for i, part in enumerate(key[:-1]):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            source.errors.append(
                f"command line: {name}: {'.'.join(key[: i + 1])} is a value, not a table; check the name"
            )
            return
    table[key[-1]] = parsed
    source.overridden.add(key)


def build(cls: type[T], table: Any, key: Key, source: Source) -> T | None:
    """A dataclass from a table; None when something in it is wrong, which `source` then holds."""
    if not isinstance(table, Mapping):
        source.error(key, f"{table!r} is a value; write it as a table [{'.'.join(key)}]")
        return None
    before = len(source.errors)
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for name in table:
        if name not in known:
            source.error((*key, name), unknown(name, known))
    values = {}
    for name, f in known.items():
        if name in table:
            values[name] = _convert(hints[name], table[name], (*key, name), source)
        elif f.default is MISSING and f.default_factory is MISSING:
            what = _describe(hints[name])
            remedy = f"add the table [{'.'.join((*key, name))}]" if what == "a table" else f"write {name} = <{what}>"
            source.error((*key, name), f"missing; {remedy}")
    if len(source.errors) > before:
        return None
    built = cls(**values)
    if hasattr(built, "problems"):
        for name, message in built.problems():  # type: ignore[attr-defined]
            source.error((*key, *name.split(".")), message)
    return built


def unknown(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return (
        f"unknown key; did you mean '{close[0]}'?" if close else f"unknown key; known are {', '.join(known) or 'none'}"
    )


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _convert(hint: Any, value: Any, key: Key, source: Source) -> Any:
    alternatives = [a for a in _alternatives(hint) if a is not types.NoneType]
    if tables := [a for a in alternatives if is_dataclass(a)]:
        table = tables[0] if len(tables) == 1 else _named(tables, value, key, source)
        return table and build(table, value, key, source)
    for alternative in alternatives:
        if get_origin(alternative) is dict:
            _, item = get_args(alternative)
            if not isinstance(value, Mapping):
                source.error(key, f"{value!r} is a value; write tables [{'.'.join(key)}.NAME]")
                return None
            return {name: _convert(item, v, (*key, name), source) for name, v in value.items()}
        matched, converted = _match(alternative, value)
        if matched:
            return converted
    literals = [v for a in alternatives if get_origin(a) is Literal for v in get_args(a)]
    if literals and isinstance(value, str):
        close = difflib.get_close_matches(value, [str(v) for v in literals], n=1)
        hint_text = f"; did you mean '{close[0]}'?" if close else "; use one of them"
        source.error(key, f"'{value}' is not one of {', '.join(str(v) for v in literals)}{hint_text}")
    else:
        source.error(key, f"{value!r} is not {_describe(hint)}; write {key[-1]} = <{_describe(hint)}>")
    return None


def _named(tables: list[Any], value: Any, key: Key, source: Source) -> Any:
    """The dataclass whose field `name: Literal[..]` is the table's name."""
    names = {get_args(get_type_hints(t)["name"])[0]: t for t in tables}
    given = value.get("name") if isinstance(value, Mapping) else None
    if given is None:
        source.error(key, f"no name; write [{'.'.join(key)}] with name = '{next(iter(names))}' (of {', '.join(names)})")
    elif given not in names:
        close = difflib.get_close_matches(str(given), list(names), n=1)
        remedy = f"did you mean '{close[0]}'?" if close else "use one of them"
        source.error((*key, "name"), f"'{given}' is not one of {', '.join(names)}; {remedy}")
    return names.get(given)


def _match(hint: Any, value: Any) -> tuple[bool, Any]:
    """Whether a plain value has the type, and the value in it: whole numbers pass as floats, nothing else changes."""
    origin = get_origin(hint)
    if origin is Literal:
        return any(type(value) is type(v) and value == v for v in get_args(hint)), value
    if origin is tuple:
        items = get_args(hint)
        if not isinstance(value, list):
            return False, None
        if len(items) == 2 and items[1] is Ellipsis:
            items = (items[0],) * len(value)
        if len(items) != len(value):
            return False, None
        pairs = [_match(item, v) for item, v in zip(items, value, strict=True)]
        return all(ok for ok, _ in pairs), tuple(v for _, v in pairs)
    if hint is float and type(value) in (int, float):
        return value == value and abs(value) != float("inf"), float(value)
    return type(value) is hint, value


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    words = []
    for a in _alternatives(hint):
        if a in names:
            words.append(names[a])
        elif get_origin(a) is Literal:
            words += [str(v).lower() if isinstance(v, bool) else f"'{v}'" for v in get_args(a)]
        elif get_origin(a) is tuple:
            items = get_args(a)
            many = len(items) == 2 and items[1] is Ellipsis
            words.append(f"a list of {'' if many else f'{len(items)} '}{names[items[0]].split()[-1]}s")
        elif a is not types.NoneType:
            words.append("a table")
    return " or ".join(words)


def dump(config: Any) -> str:
    """A dataclass of dataclasses as TOML that `read` and `build` give back. Absent (None) values are left out."""
    return "\n".join(_dump_tables(config, ())) + "\n"


def _dump_tables(config: Any, key: Key) -> Iterator[str]:
    items = config.items() if isinstance(config, dict) else [(f.name, getattr(config, f.name)) for f in fields(config)]
    plain = [(k, v) for k, v in items if not (is_dataclass(v) or isinstance(v, dict)) and v is not None]
    tables = [(k, v) for k, v in items if is_dataclass(v) or isinstance(v, dict)]
    if key and (plain or not tables):
        yield f"[{'.'.join(key)}]"
    for k, v in plain:
        yield f"{k} = {_toml(v)}"
    if plain:
        yield ""
    for k, v in tables:
        yield from _dump_tables(v, (*key, k))


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(v) for v in value)}]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
        return f'"{escaped}"'
    return repr(value)
