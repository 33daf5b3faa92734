"""One self-contained module from a kernel file and the kernel files it imports, as text.

Definitions keep their text, comments included. Only what the entry function needs is kept.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from codegen.surgery import Edits, above_comments

PACKAGE = "codegen"
ROOT = Path(__file__).parent
ALLOWED = ("torch", "triton")


def bundle(path: Path, entry: str, numbers: Mapping[str, int]) -> str:
    """Source of one module with everything that function `entry` of the file at `path` needs.

    numbers: values for the file's own upper-case numbers. Raises ValueError naming the file and what is wrong: an
    import of anything but the standard library, torch and triton; a statement that is not a definition; a number
    that the file does not have; no entry function.
    """
    files = list(_with_dependencies(path, []))
    if entry not in {name for statement in ast.parse(files[-1][1]).body for name in _defined(statement)}:
        raise ValueError(f"{path.name}: does not define {entry}, its launcher")
    files[-1] = (path, _set_numbers(path, files[-1][1], numbers))
    wanted: dict[Path, set[str]] = {file: set() for file, _ in files}
    wanted[path] = {entry}
    parts = []
    # Backwards, so that everything that may want a name from a file comes before it.
    for file, text in reversed(files):
        text = prune(text, wanted[file])
        for statement in ast.parse(text).body:
            inner = _inner_import(statement)
            if inner is not None:
                wanted[inner] |= {alias.name for alias in statement.names}  # type: ignore[attr-defined]
        parts.append((file, text))
    joined = "\n\n".join(text for _, text in _without_clashes(parts[::-1]))
    return prune(joined, {entry}, inner_imports=False)


def prune(text: str, entries: set[str], inner_imports: bool = True) -> str:
    """The same module without what `entries` do not need; imports first, sorted, the rest in its order."""
    tree = ast.parse(text)
    definitions: dict[str, ast.stmt] = {}
    for statement in tree.body:
        definitions.update(dict.fromkeys(_defined(statement), statement))
    needed: set[str] = set()
    waiting = list(entries)
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting.extend(_names(definitions[name]) if name in definitions else ())
    kept = []
    for index, statement in enumerate(tree.body):
        if needed & set(_defined(statement)):
            kept.append((statement, _with_comments(text, tree.body, index)))
    return _imports(tree.body, needed, inner_imports) + "\n" + _spaced(kept)


def _with_dependencies(path: Path, seen: list[Path]) -> Iterator[tuple[Path, str]]:
    """(path, text) of the kernel files that a file imports, each once, before the file itself."""
    seen.append(path)
    text = path.read_text()
    for statement in ast.parse(text).body:
        where = f"{path.name}: line {statement.lineno}"
        inner = _inner_import(statement)
        if inner is not None and inner not in seen:
            yield from _with_dependencies(inner, seen)
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            if inner is not None and any(alias.asname for alias in statement.names):
                raise ValueError(f"{where}: kernel files are imported without `as`")
            module = getattr(statement, "module", None) or statement.names[0].name
            root = module.split(".")[0]
            if inner is None and root not in ALLOWED and root not in sys.stdlib_module_names:
                raise ValueError(f"{where}: imports {root}; accepted: torch, triton, the standard library")
        elif not (_defined(statement) or _is_docstring(statement)):
            raise ValueError(f"{where}: only imports and definitions are accepted")
    yield path, text


def _inner_import(statement: ast.stmt) -> Path | None:
    if isinstance(statement, ast.ImportFrom) and (statement.module or "").split(".")[0] == PACKAGE:
        assert statement.module is not None
        return ROOT.parent / (statement.module.replace(".", "/") + ".py")
    return None


def _set_numbers(path: Path, text: str, numbers: Mapping[str, int]) -> str:
    edits, left = Edits(text), dict(numbers)
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            for name in set(_defined(statement)) & set(left):
                edits.replace(*edits.span(statement.value), str(left.pop(name)))
    if left:
        raise ValueError(f"{path.name}: has no number called {', '.join(left)}")
    return edits.apply()


def _without_clashes(files: list[tuple[Path, str]]) -> list[tuple[Path, str]]:
    """Two files may define the same name for themselves: the later one's is prefixed with its file's name."""
    taken: set[str] = set()
    renamed = []
    for path, text in files:
        tree = ast.parse(text)
        own = {name for statement in tree.body for name in _defined(statement)}
        clashes = {name: f"_{path.stem}_{name.lstrip('_')}" for name in own & taken}
        taken |= {clashes.get(name, name) for name in own}
        renamed.append((path, _rename(text, tree, clashes) if clashes else text))
    return renamed


def _rename(text: str, tree: ast.Module, names: Mapping[str, str]) -> str:
    edits = Edits(text)

    def visit(node: ast.AST, hidden: set[str]) -> None:
        if isinstance(node, ast.FunctionDef):
            if node.name in names:
                begin = edits.span(node)[0] + len("def ")
                edits.replace(begin, begin + len(node.name), names[node.name])
            hidden = hidden | _local(node)
        if isinstance(node, ast.Name) and node.id in names and node.id not in hidden:
            edits.replace(*edits.span(node), names[node.id])
        for child in ast.iter_child_nodes(node):
            visit(child, hidden)

    visit(tree, set())
    return edits.apply()


def _local(function: ast.FunctionDef) -> set[str]:
    parameters = {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}
    assigned = (n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    return parameters.union(assigned)


def _defined(statement: ast.stmt) -> list[str]:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets if isinstance(target, ast.Name)]
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return [statement.target.id]
    return []


def _names(statement: ast.stmt) -> set[str]:
    """Names that a definition takes from its module."""
    names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return names - _local(statement) if isinstance(statement, ast.FunctionDef) else names


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _with_comments(text: str, body: list[ast.stmt], index: int) -> str:
    """A statement's text with the comment lines right above it."""
    begin, end = above_comments(text, body[index]) - 1, body[index].end_lineno
    return "\n".join(text.splitlines()[begin:end])


def _spaced(statements: list[tuple[ast.stmt, str]]) -> str:
    """Two blank lines around functions, none between neighbouring assignments, as formatters want it."""
    text = ""
    previous: ast.stmt | None = None
    for statement, source in statements:
        plain = isinstance(statement, (ast.Assign, ast.AnnAssign))
        if previous is not None:
            text += "\n" if plain and isinstance(previous, (ast.Assign, ast.AnnAssign)) else "\n\n\n"
        elif not plain:
            text += "\n"
        text += source
        previous = statement
    return text + "\n"


def _imports(statements: Iterable[ast.stmt], needed: set[str], inner_imports: bool) -> str:
    whole: set[str] = set()
    parts: dict[str, set[str]] = {}
    for statement in statements:
        if not isinstance(statement, (ast.Import, ast.ImportFrom)):
            continue
        if _inner_import(statement) is not None and not inner_imports:
            continue
        for alias in statement.names:
            if (alias.asname or alias.name.split(".")[0]) not in needed and alias.name != "annotations":
                continue
            name = alias.name + (f" as {alias.asname}" if alias.asname else "")
            if isinstance(statement, ast.Import):
                whole.add(name)
            else:
                parts.setdefault(statement.module or "", set()).add(name)
    groups: dict[str, list[str]] = {"future": [], "standard": [], "foreign": []}
    for name in sorted(whole):
        groups[_group(name)].append(f"import {name}")
    for module, names in sorted(parts.items()):
        groups[_group(module)].append(_from_import(module, sorted(names)))
    return "\n".join("\n".join(lines) + "\n" for lines in groups.values() if lines)


def _group(module: str) -> str:
    root = module.split(".")[0]
    return "future" if root == "__future__" else "standard" if root in sys.stdlib_module_names else "foreign"


def _from_import(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= 110:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in names) + ")"
