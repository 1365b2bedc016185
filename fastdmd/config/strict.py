"""Strict TOML to frozen dataclasses: every error of a file at once, each with its line, its key and a remedy.

A dataclass may have `problems()`, yielding (key, message) for values that have the right type and make no
sense.
"""

import contextlib
import difflib
import math
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import (
    Any,
    Literal,
    Protocol,
    TypeGuard,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

from fastdmd.config.toml import Key, Source, dotted, show, to_toml

T = TypeVar("T")
ONE = {int: "a whole number", float: "a number", str: "quoted text", bool: "true or false"}
MANY = {int: "whole numbers", float: "numbers", str: "quoted texts", bool: "true or false"}


def closest(name: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


@runtime_checkable
class Checked(Protocol):
    def problems(self) -> Iterator[tuple[str, str]]: ...


def is_table(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def build(cls: type[T], table: Any, key: Key, source: Source) -> T | None:
    """Make a dataclass from a table; None when a field cannot be made. `source` holds what is wrong."""
    if not is_table(table):
        source.error(key, f"{show(table)} is a value; write it as a table [{dotted(key)}]")
        return None
    values = convert(cls, table, key, source)
    if len(values) < len(fields(cls)):  # type: ignore[arg-type]
        return None
    built = cls(**values)
    if isinstance(built, Checked):
        for name, message in built.problems():
            source.error((*key, *name.split(".")), message)
    return built


def convert(cls: type, table: Mapping[str, Any], key: Key, source: Source) -> dict[str, Any]:
    """Return the fields of a dataclass from a table, and their defaults.

    Those that are wrong are left out; `source` holds why.
    """
    hints, known = get_type_hints(cls), {f.name: f for f in fields(cls)}
    meant: dict[str | None, Any] = {}  # by misspelled keys
    for name in table:
        if name not in known:
            source.error((*key, name), unknown(name, known))
            meant[closest(name, known)] = table[name]
    values: dict[str, Any] = {}
    for name, f in known.items():
        default = f.default if f.default_factory is MISSING else f.default_factory()
        value = default
        if name in table:
            value = _convert(hints[name], table[name], (*key, name), source, default)
        elif default is MISSING and name not in meant:
            source.error((*key, name), f"missing; {_add(hints[name], (*key, name))}")
        # a misspelled table has what this one seems to lack
        if value is not MISSING and not isinstance(meant.get(name), Mapping):
            values[name] = value
    return values


def unknown(name: str, known: Iterable[str]) -> str:
    close = closest(name, known)
    if close:
        return f"unknown key; did you mean '{close}'?"
    return f"unknown key; known are {', '.join(known) or 'none'}"


def one_of(given: Any, known: Sequence[Any]) -> str:
    close = closest(str(given), map(str, known))
    names = ", ".join(map(str, known))
    remedy = f"did you mean '{close}'?" if close else "use one of them"
    return f"{show(given)} is not one of {names}; {remedy}"


def _add(hint: Any, key: Key) -> str:
    """Say how to write what is missing."""
    tables = [a for a in _alternatives(hint) if is_dataclass(a)]
    if not tables:
        return f"write {key[-1]} = <{_describe(_alternatives(hint))}>"
    if len(tables) == 1:
        return f"add the table [{dotted(key)}]"
    field, known = _names(tables)
    return f"add the table [{dotted(key)}] with {field} = {' or '.join(map(repr, known))}"


def _alternatives(hint: Any) -> list[Any]:
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [a for a in members if a is not types.NoneType]


def _convert(hint: Any, value: Any, key: Key, source: Source, default: Any) -> Any:
    """Return the value as the hint has it.

    For a wrong one return the default, with which the rest can be checked, or MISSING.
    """
    alternatives = _alternatives(hint)
    if get_origin(hint) is dict:
        return _tables(hint, value, key, source)
    if tables := [a for a in alternatives if isinstance(a, type) and is_dataclass(a)]:
        table = tables[0] if len(tables) == 1 else _named(tables, value, key, source)
        built = table and build(table, value, key, source)
        return MISSING if built is None else built
    for alternative in alternatives:
        matched, converted = _match(alternative, value)
        if matched:
            return converted
    source.error(key, _mismatch(alternatives, value, key[-1], default))
    return MISSING if default is None else default  # an absent value means something else


def _tables(hint: Any, value: Any, key: Key, source: Source) -> Any:
    """Return tables by name, None for those that are wrong; MISSING when a name is wrong."""
    names, item = get_args(hint)
    known = get_args(names)
    by_name: Mapping[str, Any] = value if is_table(value) else {show(value): value}
    if plain := [n for n, v in by_name.items() if not is_table(v)]:
        place = dotted((*key, known[0]))
        source.error(key, f"{', '.join(plain)} outside of [{dotted(key)}.NAME]; write it under [{place}]")
        return MISSING
    strange = [name for name in by_name if name not in known]
    for name in strange:
        source.error((*key, name), unknown(name, known))
    tables = {name: build(item, by_name[name], (*key, name), source) for name in known if name in by_name}
    return MISSING if strange else tables


def _names(tables: list[Any]) -> tuple[str, dict[str, Any]]:
    """Return the field, each a Literal of one value, that says which dataclass a table is, and they by it."""
    hints = [get_type_hints(table) for table in tables]
    field = next(name for name in hints[0] if all(len(_only(each.get(name))) == 1 for each in hints))
    return field, {_only(each[field])[0]: table for each, table in zip(hints, tables, strict=True)}


def _only(hint: Any) -> tuple[Any, ...]:
    """Return the values of a Literal; () of anything else."""
    return get_args(hint) if get_origin(hint) is Literal else ()


def _named(tables: list[Any], value: Any, key: Key, source: Source) -> Any:
    """Return the dataclass that the table names."""
    field, names = _names(tables)
    if not isinstance(value, Mapping):
        source.error(key, f"{show(value)} is a value; {_add(Union[tuple(tables)], key)}")  # noqa: UP007
    elif field not in value:
        source.error((*key, field), f"missing; write {field} = {' or '.join(map(repr, names))}")
    elif value[field] in list(names):
        return names[value[field]]
    else:
        source.error((*key, field), one_of(value[field], list(names)))
    return None


def _match(hint: Any, value: Any) -> tuple[bool, Any]:
    """Return whether a plain value has the type, and the value in it.

    Whole numbers pass as floats; nothing else changes.
    """
    origin = get_origin(hint)
    if origin is Literal:
        return any(type(value) is type(v) and value == v for v in get_args(hint)), value
    if origin is tuple:
        items = _items(hint, value)
        matches = [_match(item, v) for item, v in items or ()]
        return items is not None and all(ok for ok, _ in matches), tuple(v for _, v in matches)
    if hint is float and type(value) in (int, float):
        return math.isfinite(value), float(value)
    return type(value) is hint, value


def _items(hint: Any, value: Any) -> list[tuple[Any, Any]] | None:
    """Return a list's elements with their types, None when it is no list or has another length."""
    types = get_args(hint)
    if not isinstance(value, list):
        return None
    items = cast("list[Any]", value)
    if types[1:] == (Ellipsis,):
        types = types[:1] * len(items)
    return list(zip(types, items, strict=True)) if len(types) == len(items) else None


def _mismatch(alternatives: list[Any], value: Any, name: str, default: Any) -> str:
    """Say why a value has none of the types, and what to write."""
    what = f"{show(value)} is not {_describe(alternatives, value)}"
    for a in alternatives:
        if get_origin(a) is tuple and (items := _items(a, value)):
            item, bad = next((item, v) for item, v in items if not _match(item, v)[0])
            if get_origin(item) is Literal:
                return one_of(bad, get_args(item))
            what = f"{show(bad)} in {show(value)} is not {_describe([item], bad)}"
    literals = [v for a in alternatives if get_origin(a) is Literal for v in get_args(a)]
    if literals and isinstance(value, str):
        return one_of(value, literals)
    for meant in _meant(value):
        if any(_match(a, meant)[0] for a in alternatives):
            return f"{what}; write {name} = {to_toml(meant)}"
    if default in (MISSING, None, "", ()):
        return f"{what}; write {name} = <{_describe(alternatives)}>"
    return f"{what}; e.g. {name} = {to_toml(default)}"


def _meant(value: Any) -> Iterator[Any]:
    """Yield what a value of the wrong type may stand for: "1" for 1, 1.0 for 1, "a" for ["a"]."""
    if isinstance(value, str):
        with contextlib.suppress(tomllib.TOMLDecodeError):
            yield from tomllib.loads(f"x = {value}").values()
    if isinstance(value, float) and value.is_integer():
        yield int(value)
    yield [value]


def _describe(alternatives: list[Any], value: Any = None) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "finite"
    words: list[str] = []
    for a in alternatives:
        if get_origin(a) is Literal:
            words += [show(v) for v in get_args(a)]
        elif get_origin(a) is tuple:
            item, *more = get_args(a)
            count = "" if more == [Ellipsis] else f"{1 + len(more)} "
            words.append(f"a list of {count}{MANY.get(item) or _describe([item])}")
        else:
            words.append(ONE[a])
    return " or ".join(words)


def dump(config: Any) -> str:
    """Return a dataclass of dataclasses as TOML that `read` and `build` give back.

    Absent (None) values are left out.
    """
    return "\n".join(_dump_tables(config, ())) + "\n"


def _dump_tables(config: Any, key: Key) -> Iterator[str]:
    items: list[tuple[str, Any]] = (
        list(config.items())
        if is_table(config)
        else [(f.name, getattr(config, f.name)) for f in fields(config)]
    )
    plain = [(k, v) for k, v in items if not (is_dataclass(v) or is_table(v)) and v is not None]
    tables = [(k, v) for k, v in items if is_dataclass(v) or is_table(v)]
    if key and (plain or not tables):
        yield f"[{'.'.join(key)}]"
    for k, v in plain:
        yield f"{k} = {to_toml(v)}"
    if plain:
        yield ""
    for k, v in tables:
        yield from _dump_tables(v, (*key, k))
