"""Which chains of a graph must be decided together, and what of the graph a decision can spare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import networkx as nx
from torch import fx

from passes.base import is_call
from passes.chains import Chain, elementwise_users
from passes.nodes import SOFTMAX, softmax_behind


def groups_of(chains: list[Chain]) -> list[list[Chain]]:
    """Chains that share a computed value or the softmax of an attention, and so must be decided together.

    Groups and their chains are in graph order.
    """
    links = nx.Graph()
    links.add_nodes_from(chains)
    for chain in chains:
        links.add_edges_from((chain, node) for node in (*chain.value.through, *softmaxes_of(chain)))
    order = {chain: position for position, chain in enumerate(chains)}
    groups = (sorted(found & order.keys(), key=order.__getitem__) for found in nx.connected_components(links))
    return sorted(groups, key=lambda group: order[group[0]])


def softmaxes_of(chain: Chain) -> Iterator[fx.Node]:
    """Those that the chain's result goes into, and those that it reads."""
    yield from (user for user in elementwise_users(chain.root) if is_call(user, *SOFTMAX))
    for operand in (operand for term in chain.value.terms for operand in term.operands):
        softmax = softmax_behind(operand.node)
        if softmax is not None:
            yield softmax


@dataclass(frozen=True)
class Region:
    """The nodes that a group of chains reads through, and those among them that others read."""

    nodes: frozenset[fx.Node]
    read: tuple[fx.Node, ...]
    known: dict[frozenset[fx.Node], frozenset[fx.Node]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, group: list[Chain]) -> Region:
        nodes = frozenset().union(*(chain.value.through for chain in group))
        roots = {chain.root for chain in group}
        return cls(nodes, tuple(n for n in nodes - roots if any(user not in nodes for user in n.users)))

    def computed(self, feeds: Mapping[fx.Node, list[fx.Node]]) -> frozenset[fx.Node]:
        """Nodes that are still needed when each root in `feeds` reads the given nodes instead of its own inputs."""
        starts = frozenset(node for nodes in feeds.values() for node in nodes)
        if starts not in self.known:  # most orders of a chain read the same
            seen: set[fx.Node] = set()
            stack = [*self.read, *starts]
            while stack:
                node = stack.pop()
                if node in self.nodes and node not in seen and node not in feeds:
                    seen.add(node)
                    stack.extend(node.all_input_nodes)
            self.known[starts] = frozenset(seen)
        return self.known[starts]
