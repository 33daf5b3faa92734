"""A script that shows a failed certificate again: both graphs as Python text, and how their inputs were drawn.

It needs torch and `codegen.ops` and nothing else of this project.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from torch import fx

from dsv3_compile.source import FUNCTION, graph_source
from passes.base import placeholders
from passes.bisection import relative_error
from passes.inputs import ascending, draw, draw_one
from passes.verify import EXACT, CertificateError, Failure

NARROW = re.compile(r"torch\.(float32|float16|bfloat16|float8_\w+)\b")
SCRIPT = '''"""{message}

Runs the block before and after the pass on the same inputs in float64 and shows where they part. Needs torch and
the operators in `codegen.ops`. Exit status 1: the error is still there.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import codegen.ops  # noqa: F401  defines torch.ops.dsv3

aten = torch.ops.aten
dsv3 = torch.ops.dsv3
torch.set_default_dtype(torch.float64)

SEED = {seed}
BOUND = {bound}
INPUTS = [  # name, kind, shape, bound of integers
{inputs}
]


{functions}


def main() -> int:
    with torch.no_grad():
        inputs = draw(INPUTS, SEED)
        expected = before({before})
        found = after({after})
    errors = [relative_error(*pair) for pair in zip(tree_leaves(found), tree_leaves(expected), strict=True)]
    for index, error in enumerate(errors):
        print(f"output {{index}}: relative error {{error:.3g}}" + ("" if error <= BOUND else "  <- differs"))
    return int(any(not error <= BOUND for error in errors))


if __name__ == "__main__":
    sys.exit(main())
'''


def explain(error: CertificateError, output: str | Path) -> CertificateError:
    """The same error with a script beside `output`, where there would have been an artifact, and its name."""
    if error.failure is None:
        return error
    path = Path(f"{output}.repro.py")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(repro(str(error), error.failure), encoding="utf-8")
    except ValueError as unprintable:
        return CertificateError(f"{error}; no script shows it: {unprintable}", error.failure)
    return CertificateError(f"{error}; to see it again: python {path}", error.failure)


def repro(message: str, failure: Failure) -> str:
    """The script's text. Raises ValueError for a graph that cannot be written as Python."""
    functions = [inspect.getsource(one) for one in (draw, draw_one, ascending, relative_error)]
    functions += [function("before", failure.before), function("after", failure.after)]
    bound = {node: node.meta["bind"] for node in placeholders(failure.after.graph) if node.meta.get("bind")}
    functions += [function(f"bind_{node.name}", recipe) for node, recipe in bound.items()]
    return SCRIPT.format(
        message=message.replace("\\", r"\\").replace('"""', "'''"),
        seed=failure.seed,
        bound=EXACT,
        inputs="\n".join(f"    {recipe!r}," for recipe in failure.recipes),
        functions="\n\n\n".join(text.strip() for text in functions),
        before=arguments(failure.before),
        after=arguments(failure.after),
    )


def function(name: str, module: fx.GraphModule) -> str:
    """A graph as one function, computed in float64, with its constants before it."""
    header, body = graph_source(module, name).split(f"def {FUNCTION}(", 1)
    constants = header.split("dsv3 = torch.ops.dsv3\n", 1)[1].strip()
    text = (f"{constants}\n\n\n" if constants else "") + f"def {name}({body}"
    return NARROW.sub("torch.float64", text)


def arguments(module: fx.GraphModule) -> str:
    """What a graph's function is called with, one argument per line; caches are written in place, hence the copies."""
    lines = []
    for node in placeholders(module.graph):
        recipe = node.meta.get("bind")
        if recipe is None:
            lines.append(f'inputs["{node.target}"].clone()')
        else:
            sources = ", ".join(f'inputs["{source.target}"]' for source in placeholders(recipe.graph))
            lines.append(f"bind_{node.name}({sources})")
    return "".join(f"\n            {line}," for line in lines) + "\n        "
