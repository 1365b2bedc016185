"""Read, check and write the configuration of a run."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from fastdmd.config import strict, toml
from fastdmd.config.checks import CHECKS, OF_THIS_MACHINE
from fastdmd.config.schema import OPTIONAL_TABLES, Config

PATHS = (  # the keys that name files or folders, and what they may have beside them
    *("run.output_dir", "model.path", "student.path", "teacher.path", "critic.path"),
    *("lora.path", "data.sources", "checkpoint.resume"),
)
WORDS = ("", "shapes", "latest")


def load(path: str | Path, overrides: Sequence[str] = (), *, elsewhere: bool = False) -> Config:
    """Read and check a whole configuration; ConfigError with all that is wrong. No weight is touched.

    `~` is the user's home. The paths of what is returned are absolute, so that it opens from anywhere.
    elsewhere: the run will be on another machine: its data, the parts that encode it and its device are not
    looked for.
    """
    source = toml.read(Path(path), overrides)
    for table, name in (key.split(".") for key in PATHS):
        values = source.data.get(table)
        if isinstance(values, dict) and name in values:
            values[name] = _each(os.path.expanduser, values[name])
    config, tables = _convert(source)
    for check, needs in CHECKS.items():
        if needs <= set(tables) and not (elsewhere and check in OF_THIS_MACHINE):
            for key, message in check(config):
                source.error(tuple(key.split(".")), message)
    if elsewhere:
        source.forget(("data", "sources"), ("lora", "path"), ("run", "device"))
    source.raise_errors()
    return _absolute(config)


def read_saved(path: Path) -> Config:
    """Read a run's configuration without checking it: what it names may have moved, and devices differ."""
    return _absolute(_convert(toml.read(path))[0])


def _convert(source: toml.Source) -> tuple[Config, Collection[str]]:
    """Return the configuration, with None for each wrong table, and the names of the right ones."""
    tables = strict.convert(Config, source.data, (), source)
    if "method" in tables:
        used = tables["method"].uses
        tables |= {table: OPTIONAL_TABLES[table]() for table in used if tables.get(table, "wrong") is None}
    return Config(**{f.name: None for f in fields(Config)} | tables), tables.keys()  # type: ignore[arg-type]


def _absolute(config: Config) -> Config:
    changed: dict[str, Any] = {}
    for table, name in (key.split(".") for key in PATHS):
        values: Any = changed.get(table) or getattr(config, table)
        if values is not None:
            changed[table] = replace(values, **{name: _each(_from_here, getattr(values, name))})
    return replace(config, **changed)


def paths_of(config: Config) -> Iterator[tuple[str, str]]:
    """Yield every path in a configuration with the key that names it."""
    for key in PATHS:
        table, name = key.split(".")
        settings = getattr(config, table)
        value = None if settings is None else getattr(settings, name)
        values: tuple[Any, ...] = cast("tuple[Any, ...]", value) if isinstance(value, tuple) else (value,)
        yield from ((key, each) for each in values if isinstance(each, str) and each not in WORDS)


def _from_here(path: str) -> str:
    return str(Path(path).absolute())  # links and `..` stay as they are


def _each(change: Callable[[str], str], value: Any) -> Any:
    """Change a path, or each of a list of paths; what is neither stays as it is."""
    if isinstance(value, list | tuple):
        paths = [_each(change, path) for path in cast("Sequence[Any]", value)]
        return paths if isinstance(value, list) else tuple(paths)
    return change(value) if isinstance(value, str) and value not in WORDS else value


def dump(config: Config) -> str:
    """Return the resolved configuration as TOML that `load` reads back to the same Config."""
    return strict.dump(config)
