"""`--from transformers`: their layers in our frame compute what they compute, and become the same kind of artifact."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from dsv3_compile import driver
from dsv3_compile.capture import layer_inputs
from dsv3_compile.options import Options
from dsv3_compile.own_ops import check_ops
from dsv3_compile.program import BlockGraph
from dsv3_compile.runtime import load
from dsv3_compile.tracing import CaptureError, capture_fake
from dsv3_compile.transformers_layers import TransformersError, TransformersLayers
from dsv3_compile.verification import verify
from model_def.checkpoint import write
from model_def.config import ModelConfig
from model_def.decoder import Layer
from model_def.presets import PRESETS
from model_def.rope import cos_sin
from passes.canonicalise import Canonicalise
from passes.pipeline import IMPORTED_PIPELINE, Pipeline
from tests.dsv3_compile.tiny import TINY, checkpoint_of, trained_looking
from tests.passes.capture import CONTEXT

V3 = replace(TINY, hidden_size=36, moe_intermediate_size=12)  # torch's grouped product wants rows of 16 bytes
V2 = replace(
    V3, model_type="deepseek_v2", scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False,
    q_lora_rank=None,
)  # fmt: skip


V2_FIVE_HEADS = replace(V2, num_attention_heads=5, num_key_value_heads=1)  # 36 is no multiple of five
EVERY_SECOND = replace(V3, first_k_dense_replace=0, moe_layer_freq=2)
NO_SHARED = replace(V3, n_shared_experts=0)
GLM = replace(V3, model_type="glm4_moe_lite", rope_scaling=None)
YOUTU = replace(V3, model_type="youtu", n_routed_experts=None, first_k_dense_replace=0, num_nextn_predict_layers=0)


@pytest.mark.parametrize(
    ("config", "index"),
    [
        pytest.param(V3, 0, id="V3-dense"),
        pytest.param(V3, 1, id="V3-moe"),
        pytest.param(V2, 0, id="V2-dense"),
        pytest.param(V2, 1, id="V2-moe"),
        pytest.param(V2_FIVE_HEADS, 1, id="V2-five-heads"),
        pytest.param(EVERY_SECOND, 0, id="first-moe"),
        pytest.param(EVERY_SECOND, 1, id="second-dense"),
        pytest.param(NO_SHARED, 1, id="no-shared-experts"),
        pytest.param(replace(V3, n_routed_experts=None), 1, id="no-experts"),
        pytest.param(GLM, 0, id="GLM-Flash-dense"),
        pytest.param(GLM, 1, id="GLM-Flash-moe"),
        pytest.param(YOUTU, 0, id="Youtu"),
    ],
)
def test_their_layer_on_our_weights_is_our_layer(config: ModelConfig, index: int) -> None:
    spec = config.layer(index)
    ours = trained_looking(config).layers[index]
    theirs = TransformersLayers(config)(spec, torch.float32)
    theirs.load_state_dict(ours.state_dict())
    assert isinstance(ours, Layer)
    positions = torch.tensor([[3, 4, 5], [0, 1, 2]])
    cos, sin = cos_sin(positions, config.rotary_dim, config.rope_theta, config.rope_scaling)
    x, latent = torch.randn(2, 3, config.hidden_size), torch.randn(2, 9, spec.attention.kv_lora_rank)
    rope_key = torch.zeros(2, 9, config.rotary_dim)  # theirs may order the columns otherwise
    latent[0, :3] = 0.0
    with torch.no_grad():
        found, expected = (layer(x, cos, sin, positions, latent, rope_key) for layer in (theirs, ours))
    assert (found[0] - expected[0]).abs().max() <= 5e-5
    assert (found[1] - expected[1]).abs().max() <= 1e-5


def test_an_artifact_of_their_code_is_verified_against_the_definition(tmp_path: Path) -> None:
    config = replace(TINY, num_hidden_layers=2)
    write(tmp_path / "checkpoint", config, checkpoint_of(trained_looking(config)).items())
    required = ("group-experts", "open-attention")
    driver.compile(
        tmp_path / "checkpoint", tmp_path / "artifact", origin="transformers", max_batch=3, max_length=32,
        require=required, verify=False,
    )  # fmt: skip
    assert verify(tmp_path / "artifact", certificates=False)["passed"]
    model = load(tmp_path / "artifact")
    assert model.generate(torch.tensor([[1, 2, 3]]), 4).shape == (1, 4)


def layer_graph(config: ModelConfig, index: int = 0) -> fx.GraphModule:
    """A layer of theirs, captured."""
    spec = config.layer(index)
    build = partial(TransformersLayers(config), spec, torch.float32)
    return capture_fake(build, layer_inputs(config, spec, torch.float32))


@pytest.mark.parametrize(("top_k", "disable"), [(1, ()), (3, ("group-experts",))], ids=["one-expert", "not-grouped"])
def test_no_graph_calls_an_op_of_transformers(top_k: int, disable: tuple[str, ...]) -> None:
    graph = layer_graph(replace(V3, first_k_dense_replace=0, num_experts_per_tok=top_k))
    pipeline = Pipeline(IMPORTED_PIPELINE).configured(disable=disable, until="fuse-routing")
    matches = {record.name: len(record.matches) for record in pipeline.run(graph, CONTEXT)}
    expected = {"adopt-grouped-products": 2} if disable else {"group-experts": 1, "adopt-grouped-products": 0}
    assert expected.items() <= matches.items() and matches["fuse-routing"] == 1
    check_ops(BlockGraph("moe", "prefill", graph))


def test_an_op_that_would_be_left_to_the_artifact_is_named() -> None:
    config = replace(V3, num_hidden_layers=1, first_k_dense_replace=0)
    options = Options(origin="transformers", max_length=32, verify=False, until="canonicalise")
    named = r"^moe prefill still calls transformers::grouped_mm_fallback \(moe.py:\d+\) after the passes"
    with pytest.raises(CaptureError, match=named):
        driver.build(config, options)


def test_shared_experts_that_are_not_there_leave_nothing_in_the_graph() -> None:
    with warnings.catch_warnings(action="error"):
        graph = layer_graph(NO_SHARED, 1)
    Canonicalise().run(graph, CONTEXT)
    values = [value for node in graph.graph.nodes for value in tree_leaves(node.meta.get("val"))]
    assert all(0 not in value.shape for value in values if isinstance(value, torch.Tensor))


def test_a_large_model_is_certified_on_a_twin_that_their_products_take() -> None:
    config = replace(PRESETS["glm-4.7-flash"], num_hidden_layers=2)
    options = Options(no_weights=True, origin="transformers", until="group-experts", require=("group-experts",))
    program = driver.build(config, options)
    assert max(found.max_rel_error for found in program.certificates.values()) < 1e-10
    assert program.certificates.keys() == program.blocks.keys()


def test_a_config_that_transformers_refuses_is_one_line() -> None:
    config = replace(V3, rms_norm_eps=1e-6)
    object.__setattr__(config, "vocab_size", "many")
    with pytest.raises(TransformersError, match=r"^transformers refuses this config: .*vocab_size.* expected int"):
        TransformersLayers(config)(config.layer(0), torch.float32)


def test_what_transformers_does_not_have_is_refused() -> None:
    ranks = replace(TINY, kv_lora_rank=(22, 24, 22, 24), model_type="custom")
    with pytest.raises(TransformersError, match="one latent rank for all layers"):
        TransformersLayers(ranks)


def test_what_their_own_code_cannot_run_is_one_line() -> None:
    config = replace(V3, moe_intermediate_size=10)  # torch's grouped product again
    with pytest.raises(TransformersError, match=r"^transformers' own DeepseekV3DecoderLayer does not run: .*16"):
        driver.build(config, Options(no_weights=True, origin="transformers", dtype="bfloat16", verify=False))
