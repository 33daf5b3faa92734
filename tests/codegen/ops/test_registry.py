"""The vocabulary as compilers see it: fakes, symbolic shapes, export, torch.compile, AOTInductor."""

import math

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from codegen import ops

dsv3 = torch.ops.dsv3


class EveryOp(nn.Module):
    """Calls the whole vocabulary once; the latent and the rope key are mutated inputs."""

    def forward(self, x, w_kv, cos, sin, positions, latent, rope_key, weight, w_router, gate_up, down, bias):
        normed, total = dsv3.add_rms_norm(x, x, weight, 1e-6)
        kv = dsv3.rms_norm(total, weight, 1e-6) @ w_kv
        pure_latent, _ = dsv3.write_cache(kv, weight[:16], cos, sin, positions, latent, rope_key, 1e-6, True)
        dsv3.write_cache_(kv, weight[:16], cos, sin, positions, latent, rope_key, 1e-6, True)
        q = dsv3.hold(normed).unflatten(-1, (4, -1))
        q_rope = dsv3.rotary(q[..., :8], cos, sin, True)
        absorbed = dsv3.mla_attention(q[..., :16], q_rope, latent, rope_key, positions, 0.2)
        keys = normed.unflatten(-1, (2, -1))
        expanded = dsv3.attention(q[..., :12], keys[..., :12], keys, positions, 0.3, q_rope, keys[:, :, :1, 12:20])
        tokens = normed.flatten(0, 1)
        logits = tokens @ w_router
        indices, weights = dsv3.route(logits, bias, "sigmoid", 3, 4, 2, "top2", -math.inf, True, 1e-20, 2.5)
        fused = dsv3.routed_swiglu(tokens, indices, weights, gate_up, down)
        order, offsets = dsv3.sort_pairs(indices, 8)
        hidden = dsv3.swiglu(dsv3.grouped_linear(tokens[order // 3], gate_up, offsets))
        steps = dsv3.combine_pairs(dsv3.grouped_linear(hidden, down, offsets), order, weights)
        product = dsv3.linear(normed, weight.unsqueeze(0), 1e-6, normed[..., :1])
        _, scores = dsv3.norm_router(tokens, weight, 1e-6, w_router.T)
        pair = dsv3.linear_pair(normed, weight.unsqueeze(0), weight.unsqueeze(0))
        per_head = dsv3.head_linear(q, gate_up[:4, :, :16])
        inputs = normed, kv, gate_up[:4, :8, :16], weight[:16], cos, sin, positions, latent, rope_key, 1e-6, False
        inputs = *dsv3.attention_inputs(*inputs), *dsv3.attention_inputs_(*inputs)
        return pure_latent, absorbed, expanded, fused, steps, product, pair, scores, per_head, *inputs


def draw(batch, queries, context, dtype=torch.float32):
    def normal(*shape):
        return 0.3 * torch.randn(*shape, dtype=dtype)

    positions = torch.arange(queries).repeat(batch, 1)
    shapes = ((64,), (64, 8), (8, 32, 64), (8, 64, 16), (8,))
    return (
        normal(batch, queries, 64),
        normal(64, 24),
        normal(batch, queries, 4),
        normal(batch, queries, 4),
        positions,
        normal(batch, context, 16),
        normal(batch, context, 8),
        *(normal(*shape) for shape in shapes),
    )


def same_results(compiled, sizes):
    arguments = draw(*sizes)
    own, other = ([a.clone() for a in arguments] for _ in range(2))
    expected, found = EveryOp()(*own), compiled(*other)
    torch.testing.assert_close(tuple(found), expected)
    torch.testing.assert_close(other[5:7], own[5:7])


@pytest.fixture(scope="module")
def exported():
    batch, queries, context = (torch.export.Dim(n, min=1, max=1 << 16) for n in "BST")
    tokens = {0: batch, 1: queries}
    cache = {0: batch, 1: context}
    shapes = (tokens, None, tokens, tokens, tokens, cache, cache, *(None,) * 5)
    return torch.export.export(EveryOp(), draw(2, 5, 9), dynamic_shapes=shapes).run_decompositions({})


def test_export_keeps_every_op_whole_and_all_sizes_free(exported):
    called = {str(n.target).split(".")[1] for n in exported.graph.nodes if str(n.target).startswith("dsv3.")}
    assert called == {*ops.COMPOSITE, *ops.OPAQUE} - {"write_cache_", "attention_inputs_"}  # these are functionalised
    same_results(exported.module(), (1, 3, 7))


def test_torch_compile_with_dynamic_shapes():
    compiled = torch.compile(EveryOp(), dynamic=True)
    same_results(compiled, (2, 5, 9))
    same_results(compiled, (3, 2, 4))


@pytest.mark.skipif(torch.version.cuda is not None, reason="loading a package crashes CUDA builds of torch 2.11")
def test_ahead_of_time_inductor_writes_the_cache_in_place(exported, tmp_path):
    options = {"aot_inductor.precompile_headers": False}  # they take longer to make than one package saves by them
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "every.pt2"), inductor_configs=options
    )
    same_results(torch._inductor.aoti_load_package(package), (1, 4, 6))


def test_float64_stays_float64():
    outputs = EveryOp()(*draw(2, 3, 4, torch.float64))
    assert {out.dtype for out in outputs} == {torch.float64}


@pytest.mark.parametrize("name", ops.OPAQUE)
def test_opaque_ops_pass_torch_checks(name):
    x, w_kv, cos, sin, positions, latent, rope_key, weight, _, gate_up, down, _ = draw(2, 3, 5)
    tokens, q = x.flatten(0, 1), x.unflatten(-1, (4, -1))
    indices = torch.stack([torch.randperm(8)[:3] for _ in range(6)])
    offsets = torch.tensor([0, 1, 1, 2, 3, 6, 6, 6], dtype=torch.int32)
    keys = torch.randn(2, 5, 2, 16)
    heads = torch.randn(2, 3, 4 * (6 + 8)), x @ w_kv, torch.randn(4, 6, 16), weight[:16]
    arguments = {
        "attention_inputs_": (*heads, cos, sin, positions, latent, rope_key, 1e-6, True),
        "write_cache_": (x @ w_kv, weight[:16], cos, sin, positions, latent, rope_key, 1e-6, True),
        "mla_attention": (q, q[..., :8], latent, rope_key, positions, 0.2),
        "attention": (q, keys, keys[..., :12], positions, 0.3),
        "hold": (x.mT,),
        "sort_pairs": (indices, 8),
        "grouped_linear": (tokens, gate_up, offsets),
        "routed_swiglu": (tokens, indices, torch.rand(6, 3), gate_up, down),
    }[name]
    torch.library.opcheck(getattr(dsv3, name).default, arguments)


@pytest.mark.parametrize(
    ("reference", "shapes"),
    [
        (ops.attention.mla_attention, [(2, 3, 4, 16), (2, 3, 4, 8), (2, 5, 16), (2, 5, 8)]),
        (ops.attention.attention, [(2, 3, 4, 12), (2, 5, 2, 12), (2, 5, 2, 12)]),
    ],
)
def test_attention_is_counted_as_the_products_it_runs_up_to_the_last_position(reference, shapes):
    positions = torch.tensor([[0, 1, 2], [2, 3, 4]])
    same_flops(reference, (*map(torch.randn, shapes), positions, 0.2))


def test_both_parts_of_the_heads_are_counted():
    q, k, v = torch.randn(2, 3, 4, 7), torch.randn(2, 5, 2, 7), torch.randn(2, 5, 2, 12)
    positions, rope = torch.tensor([[0, 1, 2], [2, 3, 4]]), (torch.randn(2, 3, 4, 5), torch.randn(2, 5, 1, 5))
    same_flops(ops.attention.attention, (q, k, v, positions, 0.2, *rope))


def test_experts_are_counted_as_the_products_of_the_chosen_pairs():
    x, indices = torch.randn(6, 64), torch.stack([torch.randperm(8)[:3] for _ in range(6)])
    gate_up, down = torch.randn(8, 32, 64), torch.randn(8, 64, 16)
    same_flops(ops.experts.routed_swiglu, (x, indices, torch.rand(6, 3), gate_up, down))
    _, offsets = dsv3.sort_pairs(indices, 8)
    same_flops(ops.experts.grouped_linear, (torch.randn(18, 64), gate_up, offsets))


def same_flops(reference, arguments):
    """What torch counts for the op, which it cannot see into, against what it sees inside the reference."""
    op = getattr(dsv3, reference.__name__)
    # The fused kernels of the CPU are not counted by torch.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as inside:
        reference(*arguments)
    with FlopCounterMode(display=False) as counted:
        op(*arguments)
    assert counted.get_total_flops() == inside.get_total_flops() > 0


def layout_cases():
    """(op, arguments) for every composite op, over rows that lie apart, transposed, and in 16 bits."""
    x, residual, cos = torch.randn(3, 5, 2, 16), torch.randn(3, 5, 2, 16), torch.randn(3, 5, 8)
    wide, moved = torch.randn(3, 5, 2, 20)[..., 2:18], torch.randn(5, 3, 2, 16).transpose(0, 1)
    logits, order = torch.randn(6, 8), torch.randperm(18)
    for rows in (x, wide, moved, x.half(), wide.half()):
        weight, square = torch.randn(16, dtype=rows.dtype), torch.randn(7, 16, dtype=rows.dtype)
        yield "rms_norm", (rows, weight, 1e-6)
        yield "add_rms_norm", (rows, residual.to(rows.dtype), weight, 1e-6)
        yield "swiglu", (rows,)
        yield "head_linear", (rows, torch.randn(2, 7, 16, dtype=rows.dtype))
        yield "norm_router", (rows.flatten(0, 2), weight, 1e-6, square)
        for eps, added in ((None, None), (1e-6, torch.randn(3, 5, 2, 7, dtype=rows.dtype))):
            yield "linear", (rows, square, eps, added)
            yield "linear", (rows, square, eps, added, True)
        yield "linear_pair", (rows, square, square[:3])
        for interleaved in (True, False):
            yield "rotary", (rows, cos, cos, interleaved)
            caches = (torch.randn(3, 9, 12, dtype=rows.dtype), torch.randn(3, 9, 4, dtype=rows.dtype))
            angles, positions = (cos[..., :2], cos[..., 2:4]), torch.arange(5).repeat(3, 1)
            steps = weight[:12], *angles, positions, *caches, 1e-6, interleaved
            yield "write_cache", (rows[:, :, 0], *steps)
            up = torch.randn(2, 4, 12, dtype=rows.dtype)
            yield "attention_inputs", (rows[:, :, 0], rows[:, :, 1], up, *steps)
    for scores, groups, always in ((logits, 1, 0), (logits, 4, 2), (logits.half(), 4, 0)):
        yield "route", (scores, None, "sigmoid", 3, groups, 2, "top2", -math.inf, True, 1e-20, 2.5, always)
        yield "combine_pairs", (torch.randn(18, 7, dtype=scores.dtype), order, torch.rand(6, 3))


def test_a_layout_is_that_of_what_the_reference_computes():
    def form(tensor):
        return tensor.dtype, tensor.shape, tensor.stride()

    for name, arguments in layout_cases():
        op = getattr(dsv3, name).default
        real, empty = (pytree.tree_leaves(compute(*arguments)) for compute in (op, ops.LAYOUTS[op]))
        assert [form(one) for one in empty] == [form(one) for one in real], name
    assert {name for name, _ in layout_cases()} == set(ops.COMPOSITE) == {str(op)[5:-8] for op in ops.LAYOUTS}
