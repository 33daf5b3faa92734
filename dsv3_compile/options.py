"""What a compile can be told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from codegen.targets import Target, target

ORIGINS = ("definition", "transformers")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class OptionError(ValueError):
    """An option that does not exist, or a value it does not take."""


def strings(name: str, value: Iterable[str]) -> tuple[str, ...]:
    """The value of an option that takes several strings; OptionError for a single one, and for anything else."""
    several = None if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    if several is None or not all(isinstance(one, str) for one in several):
        raise OptionError(f"{name} is {value!r}; accepted: a list of strings")
    return several


@dataclass(frozen=True)
class Options:
    """Settings of one compile; evaluating the repr rebuilds them.

    Raises OptionError (or codegen.targets' ValueError for the target) naming what would be accepted.
    """

    target: str = "cpu"
    origin: str = "definition"  # whose layers are compiled: ours, or transformers' own code
    dtype: str | None = None  # None: float32 on the CPU, else the checkpoint's
    max_batch: int = 8  # rows of a decode step; batch at which costs are compared
    max_length: int | None = None  # positions of a cache; None: the model's, at most DEFAULT_LENGTH
    set: tuple[str, ...] = ()  # pass.field=value
    disable: tuple[str, ...] = ()  # passes left out
    require: tuple[str, ...] = ()  # passes that must fire somewhere in the model
    until: str | None = None  # the last pass to run
    repeat: tuple[str, ...] = ()  # passes to run twice in a row
    verify: bool = True  # certify every pass
    no_weights: bool = False  # compile from the config alone
    aot: bool = False  # CPU: store graphs compiled for this machine

    def __post_init__(self) -> None:
        target(self.target)
        if self.dtype not in (None, *DTYPES):
            raise OptionError(f"dtype {self.dtype!r}; accepted: {', '.join(DTYPES)}")
        if self.origin not in ORIGINS:
            raise OptionError(f"origin {self.origin!r}; accepted: {', '.join(ORIGINS)}")
        for name in ("max_batch", "max_length"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise OptionError(f"{name} is {value!r}; accepted: a whole number from 1")
        for name in ("set", "disable", "require", "repeat"):
            object.__setattr__(self, name, strings(name, getattr(self, name)))
        if self.aot and self.target != "cpu":
            raise OptionError(f"aot is for target cpu; the target is {self.target}")

    @property
    def machine(self) -> Target:
        return target(self.target)

    def dtype_for(self, stored: torch.dtype) -> torch.dtype:
        """The dtype to compile for, given the dtype the model is stored in."""
        if self.dtype is not None:
            return DTYPES[self.dtype]
        return torch.float32 if self.target == "cpu" else stored

    def length_for(self, longest: int) -> int:
        """Positions of a cache, given how many the model can tell apart."""
        length = min(DEFAULT_LENGTH, longest) if self.max_length is None else self.max_length
        if length > longest:
            raise OptionError(f"max_length is {length}; the model has {longest} positions")
        return length


DEFAULT_LENGTH = 4096


def options_from(settings: dict[str, Any]) -> Options:
    """Options from keyword arguments; OptionError names an unknown one and the accepted ones."""
    accepted = list(Options.__dataclass_fields__)
    for name in settings:
        if name not in accepted:
            raise OptionError(f"unknown option {name!r}; accepted: {', '.join(accepted)}")
    return Options(**settings)
