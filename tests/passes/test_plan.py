"""Layers of one graph are decided apart from each other, and each as if it stood alone."""

import torch
from torch import nn

from codegen.targets import target
from passes.base import Context, Workload
from passes.chains import find_chains
from passes.order_contractions import OrderContractions
from passes.regions import groups_of
from tests.foreign.mla_zoo import HeadFirst, inputs
from tests.passes.capture import module_graph

ANY = Context("any", target("cpu"), Workload(0, 0, 0))


class Layers(nn.Module):
    """Each layer has a cache of its own, and reads what the one before wrote."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x_BSD, positions_BS, latent_BTC, rope_key_BTR):
        for number, layer in enumerate(self.layers):
            x_BSD = x_BSD + layer(torch.tanh(x_BSD), positions_BS, torch.tanh(latent_BTC * (number + 1)), rope_key_BTR)
        return x_BSD


class Eager(HeadFirst):
    def attend(self, q, k, v, mask):
        return torch.matmul(torch.matmul(q, k.transpose(2, 3)).softmax(-1), v)


def graph_of(layers, **sizes):
    return module_graph(Layers(*(Eager() for _ in range(layers))), *inputs(**sizes))


def forms(graph):
    outcome = OrderContractions().run(graph, ANY)
    return [match.split(": ")[1].split(",")[0] for match in outcome.matches]


def test_scores_and_values_of_one_attention_are_one_group():
    chains = find_chains(graph_of(3).graph)
    groups = groups_of(chains)
    assert [len(group) for group in groups] == [2, 2, 2]
    assert [chain for group in groups for chain in group] == chains


def test_every_layer_takes_the_order_that_it_takes_alone():
    assert forms(graph_of(1)) == ["absorbed"] * 2
    assert forms(graph_of(3)) == ["absorbed"] * 6
    assert forms(graph_of(3, queries=33)) == []
