"""transformers' own models: every layer decodes on its latent, with each kind of cache, to the same numbers."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from codegen.targets import target
from dsv3_compile.functional import callable_again, functional
from passes.base import Context, Workload, calls
from tests.foreign.models import deepseek_v2, deepseek_v3, kimi_like
from tests.foreign.test_attention_zoo import ATTENTION

LAYERS = 2


class Compiler:
    """A torch.compile backend that runs the attention passes and keeps what they did, graph by graph."""

    def __init__(self):
        self.graphs = []

    def __call__(self, traced, examples):
        found = functional(traced)
        ATTENTION.run(found.module, Context("any", target("cpu"), Workload(0, 0, 0)))
        self.graphs.append(found.module.graph)
        return callable_again(found)


def steps(model, cache, batch, padded):
    """Logits of a prompt and two decode steps."""
    torch.manual_seed(1)
    tokens = [torch.randint(0, 97, (batch, length)) for length in (12, 1, 1)]
    mask = torch.ones(batch, 12, dtype=torch.int64)
    mask[-1, :4] = 0  # padding on the left
    logits = []
    with torch.no_grad():
        for ids in tokens:
            options = {"attention_mask": mask} if padded else {}
            logits.append(model(input_ids=ids, past_key_values=cache, use_cache=True, **options).logits)
            mask = torch.cat([mask, mask.new_ones(batch, 1)], 1)
    return logits


def dynamic(model):
    return DynamicCache(config=model.config)


def static(model):
    return StaticCache(config=model.config, max_cache_len=40)


@pytest.mark.parametrize(
    "build, cache, attention, padded",
    [
        pytest.param(deepseek_v3, dynamic, "sdpa", False, marks=pytest.mark.slow),  # in test_backend.py as well
        pytest.param(deepseek_v2, static, "sdpa", False, marks=pytest.mark.slow),
        (kimi_like, static, "eager", False),
        (deepseek_v3, static, "sdpa", True),
    ],
)
def test_every_layer_decodes_on_its_latent(build, cache, attention, padded):
    model = build(num_hidden_layers=LAYERS)
    model.set_attn_implementation(attention)
    compiler = Compiler()
    torch._dynamo.reset()
    expected = steps(model, cache(model), 2, padded)
    found = steps(torch.compile(model, backend=compiler), cache(model), 2, padded)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=5e-5, rtol=0)
    for graph in compiler.graphs[1:]:
        fused = len(list(calls(graph, torch.ops.dsv3.mla_attention)))
        products = len(list(calls(graph, torch.ops.aten._safe_softmax)))
        assert (fused, products) == ((0, LAYERS) if padded else (LAYERS, 0))
        assert not list(calls(graph, torch.ops.aten.scaled_dot_product_attention))
