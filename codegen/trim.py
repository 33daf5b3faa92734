"""Removing what constants have made dead in a kernel module: branches, constants, parameters, locals of launchers."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from codegen.surgery import Edits, cut_parameter, function_named, launch_sites

# Calls in a launcher that only compute: a result of theirs that nobody reads can go.
PURE = {"next_power_of_2", "cdiv", "min", "max", "stride", "size", "numel", "bit_length", "len"}
UNDECIDED = object()


def prune_branches(text: str, function: str) -> str:
    """Replace every `if` and `a if c else b` that the function's constants decide by what is left of it."""
    while True:
        node = function_named(ast.parse(text), function)
        constants = _constants(node)
        for inner in ast.walk(node):
            if isinstance(inner, (ast.If, ast.IfExp)):
                value = _evaluate(inner.test, constants)
                if value is not UNDECIDED:
                    break
        else:
            return text
        edits = Edits(text)
        if isinstance(inner, ast.IfExp):
            edits.replace(*edits.span(inner), edits.segment(inner.body if value else inner.orelse))
        else:
            edits.replace_lines(inner.lineno, _end(inner), _branch(text, inner, bool(value)))
        text = edits.apply()


def drop_unused_constants(text: str, function: str) -> str:
    """Remove `NAME: tl.constexpr = value` lines whose name the function does not read."""
    while True:
        node = function_named(ast.parse(text), function)
        read = _read(node)
        dead = [s for s in node.body if isinstance(s, ast.AnnAssign) and _is_constant(s) and _target(s) not in read]
        if not dead:
            return text
        edits = Edits(text)
        for statement in dead:
            edits.replace_lines(statement.lineno, _end(statement), "")
        text = edits.apply()


def drop_unused_parameters(text: str, kernels: Sequence[str]) -> str:
    """Remove parameters that a kernel no longer reads, and their arguments at every launch."""
    for kernel in kernels:
        tree, edits = ast.parse(text), Edits(text)
        function, sites = function_named(tree, kernel), list(launch_sites(tree, {kernel}))
        read = _read(function)
        for parameter in function.args.args:
            if parameter.arg in read or not all(site.can_lose(function, parameter.arg) for site in sites):
                continue
            cut_parameter(edits, function, parameter)
            for site in sites:
                argument = site.argument(function, parameter.arg)
                if argument is not None:
                    edits.cut(*edits.span(argument))
        text = edits.apply()
    return text


def drop_unused_locals(text: str) -> str:
    """Remove assignments in launchers that nobody reads and that do nothing but compute."""
    while True:
        edits = Edits(text)
        for function in (s for s in ast.parse(text).body if isinstance(s, ast.FunctionDef) and not s.decorator_list):
            read = _read(function)
            for statement in ast.walk(function):
                if isinstance(statement, ast.Assign) and _is_pure(statement.value):
                    if all(_targets(target) and not _targets(target) & read for target in statement.targets):
                        edits.replace_lines(statement.lineno, _end(statement), "")
        if not edits.changes:
            return text
        text = edits.apply()


def _constants(function: ast.FunctionDef) -> dict[str, Any]:
    """Values of the constexpr lines of a body; a line may compute with those above it."""
    constants: dict[str, Any] = {}
    for statement in function.body:
        if isinstance(statement, ast.AnnAssign) and _is_constant(statement) and statement.value is not None:
            value = _evaluate(statement.value, constants)
            if value is not UNDECIDED:
                constants[_target(statement)] = value
    return constants


def _evaluate(expression: ast.expr, constants: Mapping[str, Any]) -> Any:
    """The value of an expression in constants only, or UNDECIDED."""
    names = {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}
    calls = any(isinstance(node, (ast.Call, ast.Attribute, ast.Subscript)) for node in ast.walk(expression))
    if calls or not names <= set(constants):
        return UNDECIDED
    return eval(compile(ast.Expression(expression), "<constants>", "eval"), {"__builtins__": {}}, dict(constants))


def _branch(text: str, node: ast.If, taken: bool) -> str:
    """The text that replaces a decided `if`, in its place."""
    lines = text.splitlines(keepends=True)
    head, margin = lines[node.lineno - 1], " " * node.col_offset
    rest = ""
    if taken:
        kept = _dedented(lines[_end(node.test) : _end(node.body[-1])], margin)
    elif not node.orelse:
        kept = ""
    else:
        # The `else` or `elif` stands on the last line at the margin between the two blocks.
        at = max(i for i in range(_end(node.body[-1]), node.orelse[0].lineno) if lines[i].strip().startswith("el"))
        if lines[at].strip().startswith("elif"):
            rest = re.sub(r"^(\s*)elif", r"\1if", "".join(lines[at : _end(node)]))
            kept = ""
        else:
            kept = _dedented(lines[at + 1 : _end(node)], margin)
    if head.strip().startswith("elif"):
        # Part of a chain: the kept block becomes its `else`, a chain that goes on keeps its `elif`.
        if rest:
            return re.sub(r"^(\s*)if", r"\1elif", rest)
        return f"{margin}else:\n{textwrap.indent(kept, '    ')}" if kept else ""
    return rest or kept


def _dedented(lines: Sequence[str], margin: str) -> str:
    return textwrap.indent(textwrap.dedent("".join(lines)), margin)


def _end(node: ast.stmt | ast.expr) -> int:
    assert node.end_lineno is not None
    return node.end_lineno


def _is_constant(statement: ast.AnnAssign) -> bool:
    return ast.unparse(statement.annotation).endswith("constexpr")


def _target(statement: ast.AnnAssign) -> str:
    assert isinstance(statement.target, ast.Name)
    return statement.target.id


def _targets(target: ast.expr) -> set[str]:
    """Names that an assignment binds; none if it writes anywhere else."""
    parts = target.elts if isinstance(target, ast.Tuple) else [target]
    return {part.id for part in parts if isinstance(part, ast.Name)} if all(map(_is_name, parts)) else set()


def _is_name(node: ast.expr) -> bool:
    return isinstance(node, ast.Name)


def _read(function: ast.FunctionDef) -> set[str]:
    loads = (n for part in function.body for n in ast.walk(part) if isinstance(n, ast.Name))
    return {node.id for node in loads if isinstance(node.ctx, ast.Load)}


def _is_pure(value: ast.expr) -> bool:
    for call in (node for node in ast.walk(value) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name not in PURE:
            return False
    return True
