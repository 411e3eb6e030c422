"""Configuration: frozen dataclasses filled from a TOML file and `KVFS_<SECTION>__<FIELD>` environment variables (which win).

A key that no field answers to, a value of the wrong type and a value out of its range are each a ConfigError that names file and line and says what
is expected. A file holds the fields of one section at its top level, or several sections as tables ([storage], [meta], ...); other sections' tables
are left alone. Ranges: `setting(5, minimum=1, maximum=10)` as the field's default, or a `__post_init__` that raises ConfigError("field: why").
Must never guess: nothing is coerced except whole numbers where a float is expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from kvfs.common.errors import ConfigError

T = TypeVar("T")

SECTIONS: Final = frozenset({"cluster", "manager", "meta", "storage", "client", "mount", "log", "metrics", "security"})


def setting(default: Any = dataclasses.MISSING, *, minimum: float | None = None, maximum: float | None = None) -> Any:
    """A dataclass field with a range."""
    return dataclasses.field(default=default, metadata={"minimum": minimum, "maximum": maximum})


def load(cls: type[T], path: str | Path | None, environ: Mapping[str, str], section: str) -> T:
    """An instance of the frozen dataclass `cls`."""
    text = ""
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"configuration {path} is not UTF-8 text") from None
    return loads(cls, text, environ, section, name=str(path))


def loads(cls: type[T], text: str, environ: Mapping[str, str], section: str, *, name: str = "configuration") -> T:
    """As `load`, from text."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        where = re.search(r"line (\d+)", str(error))
        raise ConfigError(f"{name}:{where[1] if where else 1}: {error}") from None
    source = _Source(name, _lines_of_keys(text))
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in document.items():
        if key == section and isinstance(value, dict):
            for inner, entry in value.items():
                if inner in values:
                    raise ConfigError(f"{source.where((inner,))}: {inner!r} is set at the top level and in [{section}]")
                values[inner] = entry
                source.put((inner,), (section, inner))
        elif key in SECTIONS and isinstance(value, dict) and key not in fields:
            continue
        elif key in values:
            raise ConfigError(f"{source.where((key,))}: {key!r} is set at the top level and in [{section}]")
        else:
            values[key] = value
    prefix = f"KVFS_{section.upper()}__"
    overrides = {tuple(name[len(prefix) :].lower().split("__")): (name, value) for name, value in environ.items() if name.startswith(prefix)}
    made = _build(cls, values, overrides, source, ())
    return typing.cast(T, made)


def dump(value: object, section: str = "", *, changed: bool = False) -> str:
    """TOML text that `load` reads back as an equal object. `changed`: without what is as by default."""
    lines = [f"[{section}]"] if section else []
    tables: list[tuple[str, object]] = []
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        entry = getattr(value, field.name)
        if entry is None or (changed and entry == field.default):
            continue  # TOML has no null: an absent key is the default
        if dataclasses.is_dataclass(entry):
            tables.append((field.name, entry))
        else:
            lines.append(f"{field.name} = {_literal(entry)}")
    text = "\n".join(lines) + "\n" if lines else ""
    for name, entry in tables:
        text += "\n" + dump(entry, f"{section}.{name}" if section else name, changed=changed)
    return text


class _Source:
    """Where each key of the file stands."""

    def __init__(self, name: str, lines: dict[tuple[str, ...], int]) -> None:
        self._name = name
        self._lines = lines
        self._renamed: dict[tuple[str, ...], tuple[str, ...]] = {}

    def put(self, short: tuple[str, ...], full: tuple[str, ...]) -> None:
        self._renamed[short] = full

    def where(self, key: tuple[str, ...]) -> str:
        full = self._renamed.get(key[:1], key[:1]) + key[1:]
        while full:
            if full in self._lines:
                return f"{self._name}:{self._lines[full]}"
            full = full[:-1]
        return self._name


_Overrides = dict[tuple[str, ...], tuple[str, str]]


def _build(cls: Any, values: Mapping[str, Any], overrides: _Overrides, source: _Source, at: tuple[str, ...]) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{source.where((*at, key))}: unknown key {key!r}{_suggest(key, fields)}")
    arguments: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for variable, (name, text) in overrides.items():
        if variable[0] not in fields or (len(variable) > 1 and not _is_table(hints[variable[0]])):
            raise ConfigError(f"environment variable {name}: unknown key {'.'.join(variable)!r}{_suggest(variable[0], fields)}")
        if len(variable) == 1:
            if _is_table(hints[variable[0]]):
                raise ConfigError(f"environment variable {name}: {variable[0]!r} is a table: set one of its fields, as {name}__FIELD")
            where = f"environment variable {name}"
            arguments[variable[0]] = _from_text(text, hints[variable[0]], where, variable[0])
            origin[variable[0]] = where
    for name in fields:
        if name in arguments:
            continue
        where = source.where((*at, name))
        hint = hints[name]
        if _is_table(hint):
            inner = {variable[1:]: entry for variable, entry in overrides.items() if variable[0] == name and len(variable) > 1}
            if name not in values and not inner:
                continue
            entry = values.get(name, {})
            if not isinstance(entry, dict):
                raise ConfigError(f"{where}: {name!r} must be a table")
            arguments[name] = _build(_table_class(hint), entry, inner, source, (*at, name))
        elif name in values:
            arguments[name] = _checked(values[name], hint, where, name)
            origin[name] = where
    for name, value in arguments.items():
        _check_range(fields[name], value, origin.get(name, ""), name)
    missing = [name for name, field in fields.items() if name not in arguments and field.default is field.default_factory is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"{source.where(at)}: {', '.join(map(repr, missing))} must be set")
    try:
        return cls(**arguments)
    except (ConfigError, ValueError) as error:
        named = re.match(r"\w+", str(error))
        where = origin.get(named[0], "") if named else ""
        raise ConfigError(f"{where or source.where(at)}: {error}") from None


def _suggest(key: str, fields: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, fields, 1)
    return f" (did you mean {near[0]!r}?)" if near else f" (there are: {', '.join(sorted(fields))})"


def _is_table(hint: Any) -> bool:
    return dataclasses.is_dataclass(_table_class(hint))


def _table_class(hint: Any) -> Any:
    """The class behind `X` and `X | None`."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = [part for part in typing.get_args(hint) if part is not types.NoneType]
        return inner[0] if len(inner) == 1 else hint
    return hint


def _checked(value: Any, hint: Any, where: str, name: str) -> Any:
    hint = _table_class(hint)
    origin = typing.get_origin(hint)
    if origin is tuple:
        item = typing.get_args(hint)[0]
        if not isinstance(value, list):
            raise ConfigError(f"{where}: {name!r} must be a list of {name_of(item)}, not {value!r}")
        return tuple(_checked(entry, item, where, name) for entry in value)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"{where}: {name!r} must be one of {', '.join(map(repr, typing.get_args(hint)))}, not {value!r}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and type(value) is str:
        return Path(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise ConfigError(f"{where}: {name!r} must be {name_of(hint)}, not {value!r}")
    return value


def _from_text(text: str, hint: Any, where: str, name: str) -> Any:
    hint = _table_class(hint)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return tuple(_from_text(part.strip(), item, where, name) for part in text.split(",") if part.strip())
    value: Any = text
    if hint is bool:
        value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.strip().lower(), text)
    elif hint in (int, float):
        try:
            value = hint(text)
        except ValueError:
            pass  # left as it is: the type check below says what is wrong
    return _checked(value, hint, where, name)


def _check_range(field: Any, value: Any, where: str, name: str) -> None:
    minimum, maximum = field.metadata.get("minimum"), field.metadata.get("maximum")
    for entry in value if isinstance(value, tuple) else (value,):
        if isinstance(entry, (int, float)) and ((minimum is not None and entry < minimum) or (maximum is not None and entry > maximum)):
            bounds = [f"at least {minimum}"] if minimum is not None else []
            bounds += [f"at most {maximum}"] if maximum is not None else []
            raise ConfigError(f"{where}: {name!r} must be {' and '.join(bounds)}, not {entry!r}")


def name_of(hint: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text in quotes", Path: "a path in quotes"}.get(hint, str(hint))


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_literal, value))}]"
    text = str(value)
    escaped = "".join(_ESCAPES.get(char, char if char >= " " and char != "\x7f" else f"\\u{ord(char):04x}") for char in text)
    return f'"{escaped}"'


_ESCAPES: Final = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
_HEADER: Final = re.compile(r"^\s*\[\s*([^\[\]]+?)\s*\]\s*(#.*)?$")
_ASSIGNMENT: Final = re.compile(r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")


def _lines_of_keys(text: str) -> dict[tuple[str, ...], int]:
    """Line of every key of a valid TOML text; keys inside multi-line strings are left out."""
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    inside = ""
    for number, line in enumerate(text.splitlines(), 1):
        if inside:
            if inside in line:
                inside = ""
            continue
        if found := _HEADER.match(line):
            table = _split(found[1])
            lines.setdefault(table, number)
        elif found := _ASSIGNMENT.match(line):
            lines.setdefault(table + _split(found[1]), number)
        for quote in ('"""', "'''"):
            if line.count(quote) % 2:
                inside = quote
    return lines


def _split(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))
