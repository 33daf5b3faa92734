"""Cuts in Python source text at positions that `ast` gives, and where launches and parameters stand in it."""

from __future__ import annotations

import ast
from collections.abc import Container, Iterator
from dataclasses import dataclass, field


@dataclass
class Edits:
    """Replacements in a text, given by positions of syntax nodes, applied together."""

    text: str
    changes: list[tuple[int, int, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.starts = [0]
        for line in self.text.encode().splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def span(self, node: ast.expr | ast.stmt | ast.arg | ast.keyword) -> tuple[int, int]:
        """Byte offsets of a node, as ast counts columns in bytes."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def segment(self, node: ast.expr | ast.stmt) -> str:
        begin, end = self.span(node)
        return self.text.encode()[begin:end].decode()

    def replace(self, begin: int, end: int, new: str) -> None:
        self.changes.append((begin, end, new))

    def replace_lines(self, first: int, last: int, new: str) -> None:
        """Replace whole lines, counted from 1, last included; `new` brings its own line ends."""
        self.replace(self.starts[first - 1], self.starts[last], new)

    def apply(self) -> str:
        data = self.text.encode()
        for begin, end, new in sorted(self.changes, reverse=True):
            data = data[:begin] + new.encode() + data[end:]
        return data.decode()

    def cut(self, begin: int, end: int) -> None:
        """Take one item out of a comma-separated list, with its comma, and its line where it has one of its own."""
        data = self.text.encode()
        line_begin, line_end = data.rfind(b"\n", 0, begin) + 1, data.find(b"\n", end)
        rest = data[end:line_end].strip()
        if not data[line_begin:begin].strip() and (rest in (b"", b",") or rest.startswith(b",  #")):
            self.replace(line_begin, line_end + 1, "")
        elif data[end : end + 1] == b",":
            behind = data[end + 1 :]
            self.replace(begin, end + 1 + len(behind) - len(behind.lstrip(b" ")), "")
        else:
            self.replace(data.rfind(b",", 0, begin), end, "")


@dataclass(frozen=True)
class Site:
    """A launch in the text: `kernel[grid](...)`, and the statement it is part of."""

    kernel: str
    call: ast.Call
    statement: ast.stmt

    def argument(self, function: ast.FunctionDef, name: str) -> ast.keyword | ast.expr | None:
        """What is passed for a parameter of the kernel; None where the default is."""
        for keyword in self.call.keywords:
            if keyword.arg == name:
                return keyword
        names = parameter_names(function)
        at = names.index(name) if name in names else len(self.call.args)
        return self.call.args[at] if at < len(self.call.args) else None

    def can_lose(self, function: ast.FunctionDef, name: str) -> bool:
        """Can the argument be taken out without moving what a star spreads out?"""
        if any(keyword.arg == name for keyword in self.call.keywords):
            return True
        if name not in parameter_names(function):
            return False
        at = parameter_names(function).index(name)
        stars = [i for i, argument in enumerate(self.call.args) if isinstance(argument, ast.Starred)]
        splat = any(keyword.arg is None for keyword in self.call.keywords)
        return (at < len(self.call.args) or not splat) and not any(star <= at for star in stars)


def launch_sites(tree: ast.Module, kernels: Container[str]) -> Iterator[Site]:
    """Launches of these kernels, in the functions of a module."""
    for statement in ast.walk(tree):
        if not isinstance(statement, ast.stmt) or isinstance(statement, ast.FunctionDef):
            continue
        for part in (child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.expr)):
            for call in ast.walk(part):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript):
                    kernel = call.func.value
                    if isinstance(kernel, ast.Name) and kernel.id in kernels:
                        yield Site(kernel.id, call, statement)


def function_named(tree: ast.Module, name: str) -> ast.FunctionDef:
    return next(s for s in tree.body if isinstance(s, ast.FunctionDef) and s.name == name)


def parameter_names(function: ast.FunctionDef) -> list[str]:
    return [parameter.arg for parameter in function.args.args]


def cut_parameter(edits: Edits, function: ast.FunctionDef, parameter: ast.arg) -> None:
    """Take a parameter, its annotation and its default out of a signature."""
    begin, end = edits.span(parameter)
    parameters, defaults = function.args.args, function.args.defaults
    with_default = parameters.index(parameter) - (len(parameters) - len(defaults))
    if with_default >= 0:
        end = edits.span(defaults[with_default])[1]
    edits.cut(begin, end)


def first_line(statement: ast.stmt) -> int:
    """The line a statement begins on, decorators included."""
    decorators = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(decorator.lineno for decorator in decorators)])


def above_comments(text: str, statement: ast.stmt) -> int:
    """The first of the comment lines right above a statement, or its own first line."""
    lines, line = text.splitlines(), first_line(statement)
    while line > 1 and lines[line - 2].lstrip().startswith("#"):
        line -= 1
    return line
