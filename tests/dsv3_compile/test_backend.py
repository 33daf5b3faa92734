"""torch.compile(model, backend="dsv3") on transformers models, which nobody here wrote, and on models without MLA."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

import dsv3_compile
from codegen import dispatch
from codegen.targets import TARGETS
from dsv3_compile import backend
from dsv3_compile.options import OptionError
from passes import certify
from passes.base import Outcome, calls
from passes.pipeline import RequirementError
from passes.settings import PassError
from tests.foreign.models import deepseek_v2, deepseek_v3, kimi_like, randomised

SCHEMA = json.loads((Path(backend.__file__).parent / "report" / "schema.json").read_text(encoding="utf-8"))
TOLERANCE = 5e-5  # on logits of RMS about one, in float32
FAMILY = {
    "V3": deepseek_v3,
    "Kimi-like": kimi_like,
    "V2 greedy": deepseek_v2,
    "V2 grouped": functools.partial(deepseek_v2, "group_limited_greedy", q_lora_rank=48),
}
CASES = [("V3", "dynamic", 2), ("V3", "static", 3), ("Kimi-like", "static", 2), ("V2 greedy", "dynamic", 2),
         ("V2 grouped", "static", 2)]  # fmt: skip


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    """Every test compiles anew and sees its own reports."""
    torch._dynamo.reset()
    backend._reports.clear()
    with torch.no_grad():
        yield


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the rewritten graphs as they are: what Inductor makes of a graph is tested once, its C++ takes long."""
    monkeypatch.setattr(backend, "inductor", lambda module, *_: module.forward)


def matches(report: dict[str, Any]) -> dict[str, int]:
    (block,) = report["blocks"]
    return {one["name"]: len(one["matches"]) for one in block["passes"]}


def conversation(model: PreTrainedModel, forward: Callable[..., Any], static: bool) -> Tensor:
    """Logits of a prompt and of three tokens behind it."""
    torch.manual_seed(3)
    ids = torch.randint(0, model.config.vocab_size, (2, 7))
    cache = {"past_key_values": StaticCache(config=model.config, max_cache_len=24)} if static else {}
    out = forward(ids, use_cache=True, **cache)
    logits = [out.logits]
    for position in range(3):
        out = forward(ids[:, position : position + 1], past_key_values=out.past_key_values)
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize(("family", "cache", "layers"), CASES)
def test_every_layer_of_the_family_is_absorbed_routed_equal_and_reported_as_inspect_does(
    family: str, cache: str, layers: int, without_inductor: None
) -> None:
    model = FAMILY[family](num_hidden_layers=layers)
    expected = conversation(model, model, cache == "static")
    found = conversation(model, torch.compile(model, backend="dsv3"), cache == "static")
    assert (found - expected).abs().max() <= TOLERANCE
    for report in dsv3_compile.reports():
        assert not report["fallback"] and not report["uncertified"]
        fired = matches(report)
        assert fired["fuse-routing"] == fired["fuse-experts"] == layers - 1
    for report in dsv3_compile.reports()[1:]:  # decode: scores and values of every layer
        assert matches(report)["order-contractions"] == 2 * layers
    last = dsv3_compile.last_report()
    jsonschema.validate(last, SCHEMA)
    assert last is dsv3_compile.reports()[-1]
    assert last["target"] == "cpu" and "order-contractions" in str(last)
    assert len(dsv3_compile.reports()) <= 3  # prompt, first step, and the steps behind it


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_works_unchanged_and_gives_the_same_tokens(cache: str, without_inductor: None) -> None:
    model = deepseek_v3(num_hidden_layers=2)
    ids = torch.randint(1, 97, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])  # of different lengths, padded as generate wants it
    options: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, attention_mask=mask)
    if cache == "static":
        options["cache_implementation"] = "static"
    expected = model.generate(ids, **options)
    model.forward = torch.compile(model.forward, backend="dsv3")
    assert model.generate(ids, **options).tolist() == expected.tolist()
    assert any(matches(report)["order-contractions"] == 4 for report in dsv3_compile.reports())
    assert len(dsv3_compile.reports()) <= 4


def test_generate_compiles_its_own_steps_by_the_backend_where_it_is_asked_to(without_inductor: None) -> None:
    model = deepseek_v3(num_hidden_layers=2)
    ids = torch.randint(1, 97, (2, 5), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, cache_implementation="static")
    expected = model.generate(ids, disable_compile=True, **options)
    by = CompileConfig(backend="dsv3")
    by._compile_all_devices = True  # transformers does so on a GPU alone
    assert model.generate(ids, compile_config=by, **options).tolist() == expected.tolist()
    assert any(matches(report)["order-contractions"] == 4 for report in dsv3_compile.reports())
    assert not any(report["fallback"] for report in dsv3_compile.reports())


def test_all_sizes_free_from_the_start_change_nothing(without_inductor: None) -> None:
    model = deepseek_v3(num_hidden_layers=1, first_k_dense_replace=0)
    expected = conversation(model, model, True)
    found = conversation(model, torch.compile(model, backend="dsv3", dynamic=True), True)
    assert (found - expected).abs().max() <= TOLERANCE
    assert all(matches(report)["fuse-experts"] == 1 for report in dsv3_compile.reports())
    assert matches(dsv3_compile.last_report())["order-contractions"] == 2


def test_the_last_position_is_followed_through_the_experts_whatever_is_free(without_inductor: None) -> None:
    model = deepseek_v3(num_hidden_layers=1, first_k_dense_replace=0)
    compiled = torch.compile(model, backend="dsv3", dynamic=True)
    for rows, length in ((2, 9), (3, 12)):
        ids = torch.randint(model.config.vocab_size, (rows, length))
        with torch.no_grad():
            found, expected = (one(input_ids=ids, logits_to_keep=1).logits for one in (compiled, model))
        assert (found - expected).abs().max() <= TOLERANCE
    (report,) = dsv3_compile.reports()
    (early,) = [one for one in report["blocks"][0]["passes"] if one["name"] == "slice-early"]
    assert len(early["matches"]) == 1 and any("routed_swiglu" in line for line in early["diff"])


class Scaled(nn.Module):
    """A product between two activations, times a number of the module and one of the call."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.factor = nn.Linear(8, 12, bias=False), 0.5

    def forward(self, x: Tensor, y: Tensor, factor: float) -> Tensor:
        return y @ (self.map(x) * self.factor).mT * factor


def test_floats_of_a_module_are_constants_and_may_change_those_of_a_call_are_told(without_inductor: None) -> None:
    model, x, y = Scaled(), torch.randn(40, 8), torch.randn(1, 12)
    compiled = torch.compile(model, backend="dsv3", dynamic=True)
    compiled(x, y, 1)
    assert not dsv3_compile.last_report()["fallback"]
    model.factor = 3.0
    torch.testing.assert_close(compiled(x, y, 1), model(x, y, 1))
    torch.testing.assert_close(compiled(x, y, 0.3), model(x, y, 0.3))
    assert "a float may change from call to call" in dsv3_compile.last_report()["fallback"]


def test_inductor_compiles_what_the_passes_made() -> None:
    model = deepseek_v3(num_hidden_layers=1, first_k_dense_replace=0, hidden_size=32)
    expected = conversation(model, model, True)
    found = conversation(model, torch.compile(model, backend="dsv3"), True)
    assert (found - expected).abs().max() <= TOLERANCE


def test_a_gpu_gets_kernels_for_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(backend, "inductor", lambda module, *_: compiled.append(module) or module.forward)
    monkeypatch.setattr(backend, "target_of", lambda _: TARGETS["sm_90"])
    monkeypatch.setattr(dispatch, "register", lambda _: None)
    model = deepseek_v2(num_hidden_layers=2).bfloat16()
    expected = conversation(model, model, True)
    found = conversation(model, torch.compile(model, backend="dsv3"), True)
    assert (found - expected).norm() <= 2e-2 * expected.norm()
    prompt, *steps = map(matches, dsv3_compile.reports())
    assert steps and all(step["fuse-head-products"] == prompt["real-arithmetic"] == 4 for step in steps)
    called = [str(node.target) for node in compiled[-1].graph.nodes]
    assert not any("complex" in name for name in called)
    for op in (
        "linear_call",
        "linear_pair_call",
        "head_linear_call",
        "swiglu_call",
        "rms_norm_call",
        "add_rms_norm_call",
        "norm_router_call",
        "route_call",
        "routed_swiglu",
        "mla_attention",
    ):
        assert f"dsv3.{op}.default" in called


@pytest.mark.parametrize("family", ["V3", "V2 greedy"])
def test_a_prompt_on_a_gpu_attends_to_keys_in_parts_and_leaves_products_alone(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(backend, "inductor", lambda module, *_: compiled.append(module) or module.forward)
    monkeypatch.setattr(backend, "target_of", lambda _: TARGETS["sm_90"])
    monkeypatch.setattr(dispatch, "register", lambda _: None)
    widths = dict(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=512, hidden_size=512)
    model = FAMILY[family](num_hidden_layers=2, **widths).bfloat16()
    ids = torch.randint(97, (1, 70), generator=torch.Generator().manual_seed(3))
    expected = model(ids, use_cache=True).logits
    found = torch.compile(model, backend="dsv3")(ids, use_cache=True).logits
    errors = (found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
    assert errors.median() <= 2e-2, errors  # a tie may send a token to another expert
    (graph,) = (module.graph for module in compiled)
    attentions = list(calls(graph, torch.ops.dsv3.attention))
    assert len(attentions) == 2 and all(node.args[6].meta["val"].shape == (1, 70, 1, 64) for node in attentions)
    assert len(list(calls(graph, torch.ops.dsv3.hold))) == 2  # sines and cosines of the angles
    products = list(calls(graph, *(getattr(torch.ops.dsv3, op) for op in ("linear", "linear_call"))))
    assert [node.args[4] for node in products] == [True]  # the router's


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["V3", "V2 greedy"])
def test_a_vocabulary_that_no_certificate_can_run_keeps_nobody_from_reading_the_layers(
    family: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certify, "MOST_NUMBERS", 1 << 20)
    monkeypatch.setattr(backend, "inductor", lambda module, *_: module.forward)
    monkeypatch.setattr(backend, "target_of", lambda _: TARGETS["sm_90"])
    monkeypatch.setattr(dispatch, "register", lambda _: None)
    widths = dict(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=128, hidden_size=256)
    model = FAMILY[family](num_hidden_layers=2, vocab_size=5000, **widths).bfloat16()
    assert model.get_input_embeddings().weight.numel() > certify.MOST_NUMBERS
    conversation(model, torch.compile(model, backend="dsv3"), cache == "static")
    assert not any(report["fallback"] for report in dsv3_compile.reports())
    for report in dsv3_compile.reports():
        fired = matches(report)
        assert fired["fuse-experts"] == 1 and fired["fuse-attention"] == 2
        attention = ("order-contractions", "fuse-attention", "split-heads")
        assert not [one for one in report["uncertified"] if one["pass"] in attention]


@pytest.mark.parametrize("family", ["V3", "V2 greedy"])
def test_a_gpu_serves_caches_that_grow(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "inductor", lambda module, *_: module.forward)
    monkeypatch.setattr(backend, "target_of", lambda _: TARGETS["sm_90"])
    monkeypatch.setattr(dispatch, "register", lambda _: None)
    model = FAMILY[family](num_hidden_layers=1, first_k_dense_replace=0).bfloat16()
    expected = conversation(model, model, False)
    found = conversation(model, torch.compile(model, backend="dsv3", options={"verify": False}), False)
    errors = (found - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
    assert errors.quantile(0.8) <= 2e-2, errors  # a tie may send a token to another expert
    assert all(report["fallback"] == "" for report in dsv3_compile.reports())


def test_a_step_of_one_request_is_kernels_from_the_first_product_on(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(backend, "inductor", lambda module, *_: compiled.append(module) or module.forward)
    monkeypatch.setattr(backend, "target_of", lambda _: TARGETS["sm_90"])
    monkeypatch.setattr(dispatch, "register", lambda _: None)
    model = deepseek_v2(num_hidden_layers=3).bfloat16()
    ids, found = torch.randint(0, 97, (1, 9)), {}
    for name, step in (("as written", model), ("compiled", torch.compile(model, backend="dsv3", dynamic=False))):
        cache = StaticCache(config=model.config, max_cache_len=24)
        model(ids[:, :5], past_key_values=cache)
        logits = [step(ids[:, i : i + 1], past_key_values=cache).logits for i in range(5, 9)]
        rows = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        found[name] = [torch.cat(logits, 1), *rows]
    for one, other in zip(found["as written"], found["compiled"], strict=True):
        assert (one - other).norm() <= 2e-2 * one.norm()
    (report,) = dsv3_compile.reports()
    assert not report["uncertified"] and matches(report)["stream-attention-inputs"] == 3
    names = [str(node.target) for node in compiled[0].graph.nodes if node.op == "call_function"]
    computed = [name.split(".")[1] for name in names if name.startswith("dsv3.")]
    attention = ["linear_pair_call", "attention_inputs_", "mla_attention", "head_linear_call", "linear_call"]
    dense = ["rms_norm_call", "linear_pair_call", "swiglu_call", "linear_call", "rms_norm_call"]
    shared = ["linear_pair_call", "swiglu_call", "linear_call", "add_rms_norm_call"]
    moe = ["norm_router_call", "route_call", "routed_swiglu", *shared]
    # Angles and positions, once for all layers.
    assert computed.count("hold") == 3
    computed = [name for name in computed if name != "hold"]
    assert computed == [*attention, *dense, *(attention + moe) * 2, "linear_call"]
    # Apart from the first norm and the angles, which are computed once, nothing else is left.
    assert sum(name.startswith(("aten.mean", "aten.rsqrt", "aten.cos")) for name in names) == 3
    assert names.count("aten._foreach_add.Scalar") == 1
    assert not any(name.startswith(("aten.index_copy", "aten.silu", "aten.linear", "aten.stack")) for name in names)


# ---- models without MLA or experts


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=89, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return randomised(LlamaForCausalLM(config))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()).eval()


def test_a_transformer_without_mla_is_left_as_it_was(without_inductor: None) -> None:
    model = llama()
    ids = torch.randint(0, 89, (2, 9))
    assert torch.equal(torch.compile(model, backend="dsv3")(ids).logits, model(ids).logits)
    (report,) = dsv3_compile.reports()
    fired = matches(report)
    assert fired["order-contractions"] == fired["fuse-routing"] == fired["fuse-experts"] == 0


def test_a_convolutional_net_is_left_as_it_was(without_inductor: None) -> None:
    model, x = convolutions(), torch.randn(2, 3, 9, 9)
    assert torch.equal(torch.compile(model, backend="dsv3")(x), model(x))
    (report,) = dsv3_compile.reports()
    assert not any(count for name, count in matches(report).items() if name != "canonicalise")


# ---- what the backend does not do


def test_a_graph_that_trains_goes_to_inductor_and_says_so(without_inductor: None) -> None:
    model = nn.Linear(4, 4)
    with torch.enable_grad():
        torch.compile(model, backend="dsv3")(torch.randn(2, 4)).sum().backward()
    assert model.weight.grad is not None
    assert dsv3_compile.last_report()["fallback"].startswith("the graph trains")


def stop(*_: Any) -> None:
    raise ZeroDivisionError("no number\nof a kind")


@pytest.mark.parametrize(
    ("place", "name", "step"),
    [
        ("passes.fuse_routing.FuseRouting", "run", "fuse-routing"),
        ("passes.certify.RegionalSpecimen", "certify", "canonicalise"),
        ("passes.pipeline.Snapshot", "of", "reading the graph"),
        ("codegen.dispatch", "call_kernels", "lowering"),
        ("dsv3_compile.inspection", "changes", "writing the report"),
    ],
)
def test_a_graph_on_which_a_step_stops_goes_to_inductor_and_says_so(
    place: str, name: str, step: str, monkeypatch: pytest.MonkeyPatch, caplog: Any, without_inductor: None
) -> None:
    def routing(x: Tensor) -> Tensor:
        weights, indices = x.sigmoid().topk(2)
        return weights / weights.sum(-1, keepdim=True) + indices

    monkeypatch.setattr(f"{place}.{name}", stop)
    x = torch.randn(3, 8)
    assert torch.equal(torch.compile(routing, backend="dsv3")(x), routing(x))
    (report,) = dsv3_compile.reports()
    assert report["fallback"] == f"{step} stopped with ZeroDivisionError: no number"
    assert report["fallback"] in caplog.text and "Traceback" in caplog.text
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no number"):
        torch.compile(routing, backend="dsv3", options={"require": ("fuse-routing",)})(x)


def latent_attention(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, 4] is its own latent; weight [2, 4, 4] makes keys of it: more to do than to ask the latent itself."""
    scores = torch.einsum("sa,had,td->hst", x[-1:], weight, x)
    return torch.einsum("hst,td->shd", scores.softmax(-1), x)


def strided(x: Tensor, weight: Tensor) -> Tensor:
    return latent_attention(x, weight) + x.mT.contiguous().as_strided((1, 1, 4), (4, 4, 1))


def mapped(x: Tensor, weight: Tensor) -> Tensor:
    return latent_attention(x, weight) + torch.vmap(lambda row: row.softmax(-1) * row)(x).sum()


def choosing(x: Tensor, weight: Tensor) -> Tensor:
    return latent_attention(x, weight) + x[x[:, 0] > 0].sum()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (choosing, "the size of index depends on data"),
        (strided, "as_strided reads memory"),
        (mapped, "the graph maps over an axis (vmap)"),
    ],
)
def test_what_no_pass_may_read_goes_to_inductor_as_it_came(
    model: Callable[..., Tensor], reason: str, without_inductor: None
) -> None:
    arguments = torch.randn(9, 4), torch.randn(2, 4, 4)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = torch.compile(model, backend="dsv3")(*arguments)
    assert torch.allclose(found, model(*arguments), atol=1e-6)
    assert dsv3_compile.last_report()["fallback"].startswith(reason)


def branching(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y - 1, (x,))


CAUSAL = create_block_mask(lambda b, h, q, k: q >= k, None, None, 8, 8, device="cpu", BLOCK_SIZE=8)


def masked(x: Tensor) -> Tensor:
    heads = x[None, None]
    return flex_attention(heads, heads, heads, block_mask=CAUSAL)[0, 0]


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("step", [branching, masked])
def test_a_graph_in_the_graph_is_left_and_read_around(step: Callable[[Tensor], Tensor], without_inductor: None) -> None:
    def model(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        weights, indices = torch.nn.functional.linear(step(x), weight).sigmoid().topk(2)
        return weights / weights.sum(-1, keepdim=True), indices

    x, weight = torch.randn(8, 16), torch.randn(16, 16)
    found, expected = torch.compile(model, backend="dsv3")(x, weight), model(x, weight)
    assert torch.allclose(found[0], expected[0], atol=1e-6) and torch.equal(found[1], expected[1])
    report = dsv3_compile.last_report()
    assert not report["fallback"] and matches(report)["fuse-routing"] == 1


def test_a_report_is_printed_as_what_was_found_left_and_not_tried(without_inductor: None) -> None:
    def biased(latent: Tensor, up: Tensor, bias: Tensor, query: Tensor) -> Tensor:
        shares = (query @ torch.nn.functional.linear(latent, up, bias).T).softmax(-1)
        return (shares @ latent).sigmoid() * (query @ up).sigmoid()

    torch.compile(biased, backend="dsv3")(torch.randn(9, 4), torch.randn(6, 4), torch.randn(6), torch.randn(2, 6))
    report = dsv3_compile.last_report()
    refused = [one for row in report["blocks"][0]["passes"] for one in row["refusals"]]
    assert refused and all(one["reason"] in str(report) for one in refused)
    assert str(report).startswith(f"{report['blocks'][0]['name']}, any\n  pass ")
    assert json.loads(json.dumps(report)) == report
    torch.compile(strided, backend="dsv3")(torch.randn(9, 4), torch.randn(2, 4, 4))
    assert "goes to Inductor as it came, because as_strided reads memory" in str(dsv3_compile.last_report())


def test_switches_and_constants_do_not_keep_passes_away(without_inductor: None) -> None:
    @torch.enable_grad()
    def model(x: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            weights, indices = torch.nn.functional.linear(x, weight[0]).sigmoid().topk(2)
        table = torch.tensor([float(i % 7) for i in range(5000)])
        return weights / weights.sum(-1, keepdim=True) + indices + table[3]

    x, weight = torch.randn(9, 4), torch.randn(2, 4, 4)
    assert torch.allclose(torch.compile(model, backend="dsv3")(x, weight), model(x, weight))
    report = dsv3_compile.last_report()
    assert not report["fallback"] and matches(report)["fuse-routing"] == 1


def test_a_graph_that_a_pass_changed_goes_to_inductor_as_it_came(
    monkeypatch: pytest.MonkeyPatch, without_inductor: None
) -> None:
    def wrong(self: Any, graph_module: fx.GraphModule, context: Any) -> Outcome:
        (node,) = calls(graph_module.graph, torch.ops.aten.sigmoid)
        node.target = torch.ops.aten.tanh.default
        return Outcome(matches=[node.name])

    def scores(x: Tensor) -> Tensor:
        return x.sigmoid() + x

    monkeypatch.setattr("passes.fuse_routing.FuseRouting.run", wrong)
    x = torch.randn(3, 8)
    assert torch.equal(torch.compile(scores, backend="dsv3")(x), scores(x))
    assert dsv3_compile.last_report()["fallback"].startswith("fuse-routing stopped with CertificateError: fuse-routing")
    torch._dynamo.reset()
    required = torch.compile(scores, backend="dsv3", options={"require": ("fuse-routing",)})
    with pytest.raises(Exception, match="fuse-routing on graph . differs|sigmoid differs"):
        required(x)


def test_a_graph_break_is_two_graphs(without_inductor: None) -> None:
    def broken(x: Tensor) -> Tensor:
        y = x.relu() + 1
        print(end="")
        return y @ y.T

    x = torch.randn(3, 4)
    assert torch.equal(torch.compile(broken, backend="dsv3")(x), broken(x))
    assert len(dsv3_compile.reports()) == 2


def test_no_report_before_anything_was_compiled() -> None:
    with pytest.raises(ValueError, match="compiled nothing"):
        dsv3_compile.last_report()


def test_graphs_are_numbered_on_where_older_reports_are_gone() -> None:
    for _ in range(backend.KEPT_REPORTS + 3):
        backend._publish([], [torch.ones(1)], backend.Settings(), "falls back")
    names = [report["blocks"][0]["name"] for report in dsv3_compile.reports()]
    assert names == [f"graph {number}" for number in range(3, backend.KEPT_REPORTS + 3)]


@pytest.mark.parametrize("falls_back", [False, True], ids=["through the passes", "falls back"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"disable": ("absorb",)}, PassError, "unknown pass 'absorb'"),
        ({"require": ("absorb",)}, PassError, "unknown pass 'absorb'; accepted: canonicalise"),
        ({"set": ("fuse-swiglu.speed=3",)}, PassError, "fuse-swiglu has no option 'speed'"),
        ({"disable": "fuse-swiglu"}, OptionError, "disable is 'fuse-swiglu'; accepted: a list of strings"),
        ({"verify": "no"}, OptionError, "verify is 'no'; accepted: True, False"),
        (
            {"disable": ("fuse-swiglu",), "require": ("fuse-swiglu",)},
            OptionError,
            "pass 'fuse-swiglu' is both required and disabled",
        ),
        ({"require": ("fuse-experts",)}, RequirementError, "required pass fuse-experts did not (fire|run: the graph)"),
    ],
)
def test_options_are_checked(
    options: dict[str, Any], error: type[Exception], message: str, falls_back: bool, without_inductor: None
) -> None:
    compiled = torch.compile(nn.Linear(4, 4), backend="dsv3", options=options)
    with pytest.raises(Exception, match=message) as caught, torch.set_grad_enabled(falls_back):
        compiled(torch.randn(2, 4))
    assert isinstance(caught.value.__cause__ or getattr(caught.value, "inner_exception", None), error)
