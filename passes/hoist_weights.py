"""Work on weights alone is done once, when weights are bound."""

from __future__ import annotations

import hashlib
import operator
from dataclasses import dataclass

import torch
from torch import fx

from passes.base import Context, Outcome, Pass, Role, ancestors, is_call, placeholders
from passes.nodes import from_weights

aten = torch.ops.aten
SHARE_STORAGE = (
    aten.view, aten.unflatten, aten.flatten, aten.unsqueeze, aten.squeeze, aten.permute, aten.transpose, aten.t,
    aten.expand, aten.slice, aten.select, aten.split_with_sizes, aten.split, aten.chunk, aten.alias, aten.detach,
    operator.getitem,
)  # fmt: skip


@dataclass(frozen=True)
class HoistWeights(Pass):
    """y = linear(x, cat([Wg, Wu]))    →    y = linear(x, W)        bind: W = cat([Wg, Wu])

    Every largest computation on weights alone becomes a new weight, whose recipe is a graph of its own
    (`meta["bind"]` of the new input). Views stay where they are: they cost nothing and share storage.
    """

    def run(self, graph_module: fx.GraphModule, context: Context) -> Outcome:
        graph, outcome = graph_module.graph, Outcome()
        computed = from_weights(graph)
        roots = [n for n in graph.nodes if n in computed and any(user not in computed for user in n.users)]
        anchor = next(n for n in graph.nodes if n.op != "placeholder")
        for node in roots:
            root = source_of_views(node)
            if root.op == "placeholder" or "bound_as" in root.meta:
                continue
            recipe = extract(root)
            with graph.inserting_before(anchor):
                bound = graph.placeholder(bound_name(recipe))
            bound.meta.update({k: v for k, v in root.meta.items() if k in ("val", "stack_trace", "nn_module_stack")})
            bound.meta.update(role=Role.WEIGHT, bind=recipe)
            root.meta["bound_as"] = bound
            root.replace_all_uses_with(bound)
            outcome.matches.append(f"{root.name} is bound as {bound.name}")
        graph.eliminate_dead_code()
        for weight in placeholders(graph, Role.WEIGHT):
            if not weight.users:
                graph.erase_node(weight)
        return outcome


def source_of_views(node: fx.Node) -> fx.Node:
    """The node whose storage this one looks at."""
    while is_call(node, *SHARE_STORAGE):
        node = node.all_input_nodes[0]
    return node


def extract(root: fx.Node) -> fx.GraphModule:
    """The computation of `root` as a graph of its own, from the weights it starts at."""
    recipe = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def visit(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source not in copies:
                visit(source)
        copies[node] = recipe.node_copy(node, lambda n: copies[n])

    needed = ancestors(root)
    for node in root.graph.nodes:  # inputs first, in the block's own order
        if node in needed and node.op == "placeholder":
            copies[node] = recipe.node_copy(node)
    visit(root)
    recipe.output(copies[root])
    return fx.GraphModule({}, recipe)


def bound_name(recipe: fx.GraphModule) -> str:
    """A name that is equal exactly for equal recipes, so that phases share what they bind."""
    names: dict[fx.Node, str] = {}
    lines = []
    for node in recipe.graph.nodes:
        if node.op == "placeholder":
            names[node] = str(node.target)
            continue
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{names[n]}")
        names[node] = f"v{len(names)}"
        lines.append(f"{names[node]} = {node.target}{arguments}")
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]
    sources = [str(n.target) for n in placeholders(recipe.graph)]
    common = sources[0].rsplit("_", 1)[0] if len(sources) == 1 else _common_prefix(sources)
    return f"{common or 'weight'}_bound_{digest}"


def _common_prefix(names: list[str]) -> str:
    prefix = names[0]
    for name in names[1:]:
        while not name.startswith(prefix):
            prefix = prefix[:-1]
    return prefix.strip("_")
