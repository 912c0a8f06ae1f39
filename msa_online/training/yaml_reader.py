# SPDX-License-Identifier: Apache-2.0
"""Read YAML files and `key=value` changes into dataclasses, one typed value at a time."""

import difflib
import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

import yaml

T = TypeVar("T")
CHECKED = (bool, int, float, str, list, tuple, dict, Sequence)  # a plug-in may have other annotations
MERGE = "tag:yaml.org,2002:merge"
TRUTHS = re.compile("^(?:true|True|TRUE|false|False|FALSE)$")


class ConfigurationError(ValueError):
    """A configuration cannot work; the message names the file or change, the key, the value and the fix."""


class _Loader(yaml.SafeLoader):
    """YAML in which only true and false are booleans: no, off, yes and on are words, as in YAML 1.2.

    A key that occurs twice in a section is an error; PyYAML would take the last one.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """A section as it is written, before `<<` adds keys; raises `yaml.YAMLError` for a repeated key."""
        node = super().compose_mapping_node(anchor)
        keys = [(each.tag, each.value) for each, _ in node.value if isinstance(each, yaml.ScalarNode)]
        keys = [key for key in keys if key[0] != MERGE]
        if repeated := [key for number, key in enumerate(keys) if key in keys[:number]]:
            raise yaml.composer.ComposerError(
                None, None, f"the key {repeated[0][1]!r} occurs twice", node.start_mark
            )
        return node


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", TRUTHS, list("tTfF"))


def read_yaml(text: str) -> Any:
    """Plain data of a YAML document; raises `yaml.YAMLError`."""
    return yaml.load(text, _Loader)  # noqa: S506  a safe loader


def read_document(path: str | Path, kind: str = "configuration") -> dict[str, Any]:
    """The keys of a YAML file; `kind` says in messages what the file is.

    Raises:
        ConfigurationError: The file cannot be read, is not YAML, or has no keys.
    """
    try:
        document = read_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot read the {kind} ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    return dict(_section(document, str(path), ""))


def read_change(change: str) -> tuple[str, Any]:
    """Key and value of a change like `training.epochs=3`; the value is read as YAML.

    Raises:
        ConfigurationError: The change has no key or no value, or the value is not YAML.
    """
    key, equals, text = change.partition("=")
    if not (key and equals):
        raise ConfigurationError(f"{change!r} is no change: write key=value, for example training.epochs=3")
    if not text.strip():
        raise ConfigurationError(f"{change!r} has no value: write {key}=VALUE; {key}=null means none")
    try:
        return key, read_yaml(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(getattr(error, "problem", error)).split())
        raise ConfigurationError(f"{change!r}: the value is not YAML: {reason}") from error


def apply_change(document: dict[str, Any], change: str) -> None:
    """Set the key that a change like `training.epochs=3` names, in place.

    Raises:
        ConfigurationError: As in `read_change`; or a part of the key is not a section.
    """
    key, value = read_change(change)
    *sections, name = key.split(".")
    for section in sections:
        if document.get(section) is None:
            document[section] = {}
        document = document[section]
        if not isinstance(document, dict):
            raise ConfigurationError(f"{change!r}: {section!r} holds a value, not a section")
    document[name] = value


def structure(kind: type[T], values: Any, origin: str, section: str = "") -> T:
    """Convert plain data to dataclass `kind`.

    Args:
        kind: The dataclass. A field that is a dataclass is a section; so is each item of a list of them.
        values: Its keys; None means none.
        origin: Where the values come from, for messages.
        section: Key of the values within their file; empty for the file itself.

    Raises:
        ConfigurationError: A key is unknown or missing, or a value has the wrong type.
    """
    values = _section(values, origin, section)
    hints = {item.name: item.type for item in fields(kind)}
    inner = {
        item.name: f"{name}.{item.name}"
        for name, hint in hints.items()
        if is_dataclass(hint)
        for item in fields(hint)
    }
    refuse_unknown(values, hints, origin, section, inner)
    needed = [item.name for item in fields(kind) if item.default is item.default_factory is MISSING]
    if lacking := [name for name in needed if name not in values]:
        raise ConfigurationError(f"{origin}: {section or 'the file'} lacks {', '.join(lacking)}")
    return kind(**{name: typed(value, hints[name], origin, section, name) for name, value in values.items()})


def _section(values: Any, origin: str, section: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping | None):
        raise ConfigurationError(
            f"{origin}: {section or 'the file'} must be a section of keys, not {values!r}"
        )
    return values or {}


def refuse_unknown(
    names: Iterable[str],
    known: Iterable[str],
    origin: str,
    section: str = "",
    inner: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Refuse unknown names; the message names a similar one.

    Args:
        names: The names.
        known: The known names.
        origin: Where the names come from, for messages.
        section: Section of the names.
        inner: Full keys of the section below, by name, for the message.

    Raises:
        ConfigurationError: A name is unknown.
    """
    known = list(known)
    for name in names:
        if name not in known:
            near = inner.get(name) or next(iter(difflib.get_close_matches(str(name), known, n=1)), None)
            hint = f"known are {', '.join(known)}" if known else "nothing can be set here"
            hint = f"did you mean {near!r}?" if near else hint
            raise ConfigurationError(f"{origin}: unknown key {_join(section, name)!r}; {hint}")


def typed(value: Any, hint: Any, origin: str, section: str, name: str) -> Any:
    """Convert `value` to the type of annotation `hint`; whole numbers and text like 1e-5 convert to float.

    Each member of a union is tried in turn.

    Raises:
        ConfigurationError: The value has another type, is not finite, or refers to another key.
    """
    key = _join(section, name)
    if "${" in str(value):
        raise ConfigurationError(f"{origin}: {key} is {value!r}: ${{...}} is not supported, write the value")
    for option in get_args(hint) if isinstance(hint, UnionType) else (hint,):
        item = next(iter(get_args(option)), None)
        if is_dataclass(option):
            return structure(option, value, origin, key)
        if is_dataclass(item) and isinstance(value, list):
            return [structure(item, each, origin, f"{key}[{number}]") for number, each in enumerate(value)]
        if isinstance(value, dict) and get_origin(option) is dict and get_args(option)[1] is not Any:
            if words := [part for part in value if not isinstance(part, str)]:
                raise ConfigurationError(f"{origin}: {key} has the name {words[0]!r}: write names in quotes")
            return {part: typed(each, get_args(option)[1], origin, key, part) for part, each in value.items()}
        if option is NoneType:
            if value is None:
                return None
            continue
        with suppress(TypeError, ValueError):
            return _convert(value, option)
    numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, float)]
    finite = "" if all(map(math.isfinite, numbers)) else " and finite"
    raise ConfigurationError(f"{origin}: {key} is {value!r}, but must be {_name_of(hint)}{finite}")


def _convert(value: Any, hint: Any) -> Any:
    """Convert `value` to the type of a plain annotation; raises `TypeError` or `ValueError`."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind not in CHECKED:
        return value
    if kind is tuple and isinstance(value, list) and len(value) == len(inner):
        return tuple(map(_convert, value, inner))
    if kind in (list, Sequence) and inner and isinstance(value, list):
        return [_convert(each, inner[0]) for each in value]
    if kind is float and not isinstance(value, bool) and math.isfinite(float(value)):
        return float(value)
    if type(value) is kind is not float:
        return value
    raise TypeError


def _name_of(hint: Any) -> str:
    """An annotation in words: "int or null"."""
    name = re.sub(r"\b(tuple|Sequence)\[", "list[", re.sub(r"\w+\.", "", inspect.formatannotation(hint)))
    return name.replace(" | ", " or ").replace("None", "null")


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else str(name)
