"""Options of passes as text: 'pass.field=value'."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from passes.base import Pass


class PassError(ValueError):
    """A pass, an option or a value that does not exist."""


def split_setting(setting: str) -> tuple[str, str, str]:
    """'pass.field=value' → (pass, field, value)."""
    target, equals, text = setting.partition("=")
    name, dot, option = target.partition(".")
    if not (equals and dot and name and option):
        raise PassError(f"setting {setting!r} is not of the form pass.field=value")
    return name, option, text


def set_option(one: Pass, option: str, text: str) -> Pass:
    """The pass with one field set from text, read as the field's declared type."""
    hints = get_type_hints(type(one))
    names = [field.name for field in dataclasses.fields(one)]
    if option not in names:
        accepted = ", ".join(names) or "no options"
        raise PassError(f"{one.name()} has no option {option!r}; accepted: {accepted}")
    try:
        value = _read(hints[option], text)
        return dataclasses.replace(one, **{option: value})
    except ValueError as error:
        raise PassError(f"{one.name()}.{option}={text}: {error}") from error


def _read(kind: Any, text: str) -> Any:
    if get_origin(kind) is Literal:
        values = {str(value): value for value in get_args(kind)}
        if text not in values:
            raise ValueError(f"accepted: {', '.join(values)}")
        return values[text]
    if get_origin(kind) in (Union, UnionType):
        others = [part for part in get_args(kind) if part is not NoneType]
        if text.lower() == "none" and len(others) < len(get_args(kind)):
            return None
        return _first_that_reads(others, text)
    if get_origin(kind) is tuple:
        return tuple(_read(get_args(kind)[0], part.strip()) for part in text.split(",") if part.strip())
    if kind is bool:
        words = {"true": True, "false": False}
        if text.lower() not in words:
            raise ValueError("accepted: true, false")
        return words[text.lower()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"accepted: {'a whole number' if kind is int else 'a number'}") from None
    if kind is str:
        return text
    raise ValueError(f"cannot be set from text; its type is {kind}")


def _first_that_reads(kinds: Sequence[Any], text: str) -> Any:
    problems = []
    for kind in kinds:
        try:
            return _read(kind, text)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError("; or ".join(problems))
