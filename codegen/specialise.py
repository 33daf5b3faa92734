"""Cutting a kernel module for given constants, as text: fixed parameters become lines of the body, branches that
they decide are gone, and the launcher no longer passes them but checks them.

Positions come from `ast`; what stays is the original text, comments included.
"""

from __future__ import annotations

import ast
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from codegen.bundle import prune
from codegen.record import Launch
from codegen.surgery import (
    Edits,
    Site,
    above_comments,
    cut_parameter,
    first_line,
    function_named,
    launch_sites,
)
from codegen.trim import drop_unused_constants, drop_unused_locals, drop_unused_parameters, prune_branches

LINE_LENGTH = 110
CHECK = '''def expect(**constants: tuple[object, object]) -> None:
    """These kernels serve the constants that they were cut for: given value, value cut for."""
    for name, (given, cut_for) in constants.items():
        if given != cut_for:
            raise ValueError(f"{name} is {given!r}; this kernel was written for {cut_for!r}")'''


def specialise(text: str, entry: str, launches: Sequence[Launch]) -> str:
    """The module cut for the constants and options on which all launches of a kernel agree.

    Constants that differ between launches stay parameters, and so do the file's own upper-case numbers. Launches
    must come from running `entry` of this text.
    """
    kernels = list(dict.fromkeys(launch.kernel for launch in launches))
    text = _fix(text, {name: agreed([one for one in launches if one.kernel == name]) for name in kernels})
    for kernel in kernels:
        text = drop_unused_constants(prune_branches(text, kernel), kernel)
    text = drop_unused_locals(drop_unused_parameters(text, kernels))
    return prune(text, {entry}, inner_imports=False)


def agreed(launches: Sequence[Launch]) -> dict[str, Any]:
    """Constants and options that are the same in all of these launches and can be written as a literal."""
    first, *others = [{**launch.constants, **launch.options} for launch in launches]
    return {
        name: value
        for name, value in first.items()
        if isinstance(value, (bool, int, float, str, type(None)))
        and all(name in other and repr(other[name]) == repr(value) for other in others)
    }


def literal(value: Any) -> str:
    """A constant as source text; infinities have no literal of their own."""
    if isinstance(value, str):
        return json.dumps(value)
    return f'float("{value}")' if isinstance(value, float) and not math.isfinite(value) else repr(value)


def _fix(text: str, fixed: Mapping[str, Mapping[str, Any]]) -> str:
    """Write constants into bodies, literals into launch options, checks above launches."""
    tree, edits = ast.parse(text), Edits(text)
    sites = list(launch_sites(tree, fixed))
    checks = False
    for kernel, values in fixed.items():
        function, own = function_named(tree, kernel), [site for site in sites if site.kernel == kernel]
        parameters = [
            parameter
            for parameter in function.args.args
            if parameter.arg in values and all(_fixed_by(site, function, parameter.arg) for site in own)
        ]
        _write_constants(edits, function, parameters, values)
        for site in own:
            expected = {}
            for parameter in parameters:
                node = site.argument(function, parameter.arg)
                if node is None:
                    continue
                given = node.value if isinstance(node, ast.keyword) else node
                if _worth_checking(parameter.arg, given):
                    expected[parameter.arg] = (edits.segment(given), literal(values[parameter.arg]))
                edits.cut(*edits.span(node))
            _write_options(edits, site, function, values)
            line = edits.starts[first_line(site.statement) - 1]
            edits.replace(line, line, _check(expected, site.statement.col_offset))
            checks = checks or bool(expected)
    return _with_check(edits.apply()) if checks else edits.apply()


def _write_constants(
    edits: Edits, function: ast.FunctionDef, parameters: Sequence[ast.arg], values: Mapping[str, Any]
) -> None:
    """Parameters become the first lines of the body: `NAME: tl.constexpr = value`."""
    lines = [
        f"    {p.arg}: {edits.segment(p.annotation)} = {literal(values[p.arg])}\n"
        for p in parameters
        if p.annotation is not None
    ]
    body = function.body[1] if ast.get_docstring(function) is not None else function.body[0]
    at = edits.starts[above_comments(edits.text, body) - 1]
    edits.replace(at, at, "".join(lines))
    for parameter in parameters:
        cut_parameter(edits, function, parameter)


def _write_options(edits: Edits, site: Site, function: ast.FunctionDef, values: Mapping[str, Any]) -> None:
    names = {parameter.arg for parameter in function.args.args}
    for keyword in site.call.keywords:
        if (
            keyword.arg is not None
            and keyword.arg in values
            and keyword.arg not in names
            and not _is_number_of_file(keyword.value)
        ):
            edits.replace(*edits.span(keyword.value), literal(values[keyword.arg]))


def _fixed_by(site: Site, function: ast.FunctionDef, name: str) -> bool:
    """Is it a constant of the call? The file's own numbers are passed on, so that they can be tuned in one place."""
    node = site.argument(function, name)
    given = node.value if isinstance(node, ast.keyword) else node
    return site.can_lose(function, name) and not _is_number_of_file(given)


def _is_number_of_file(given: ast.expr | None) -> bool:
    return isinstance(given, ast.Name) and given.id.isupper()


def _worth_checking(name: str, given: ast.expr) -> bool:
    """Literals cannot differ, nor can tiles, which follow from what is checked."""
    return not isinstance(given, ast.Constant) and not name.startswith("BLOCK")


def _check(expected: Mapping[str, tuple[str, str]], column: int) -> str:
    if not expected:
        return ""
    pairs = [f"{name}=({given}, {value})" for name, (given, value) in expected.items()]
    line = f"expect({', '.join(pairs)})\n"
    if column + len(line) > LINE_LENGTH:
        line = "expect(\n" + "".join(f"    {pair},\n" for pair in pairs) + ")\n"
    return textwrap.indent(line, " " * column)


def _with_check(text: str) -> str:
    first = next(statement for statement in ast.parse(text).body if isinstance(statement, ast.FunctionDef))
    lines, at = text.splitlines(keepends=True), above_comments(text, first) - 1
    return "".join(lines[:at]) + CHECK + "\n\n\n" + "".join(lines[at:])
