"""One small call of every op that has a kernel: operands as the compiler sees them, and arguments to run."""

import math

import pytest
import torch

from codegen.emit import compile_kernels, write_kernel
from codegen.record import TensorSpec

INT64, INT32, FLOAT32 = torch.int64, torch.int32, torch.float32

# Widths that are not powers of two, three heads, experts that do not fill a power of two.
HEADS, RANK, ROPE, EXPERTS, TOP_K, HIDDEN, WIDTH = 3, 40, 12, 6, 2, 72, 24


def compiled(op, operands, target):
    """Source and machine code of one kernel."""
    (kernel,) = compile_kernels([write_kernel(op, operands, target)], target)
    return kernel


def operands(op, dtype=torch.bfloat16):
    def tensor(*shape, dtype=dtype):
        return TensorSpec(shape, dtype)

    tokens = ("B", "S")
    half = tensor(*tokens, ROPE // 2, dtype=FLOAT32)
    positions = tensor(*tokens, dtype=INT64)
    cache = tensor("B", "T", RANK), tensor("B", "T", ROPE)
    pairs = tensor("N", TOP_K, dtype=INT64), tensor("N", TOP_K, dtype=FLOAT32)
    return {
        "rms_norm": (tensor(*tokens, HIDDEN), tensor(HIDDEN), 1e-6),
        "add_rms_norm": (tensor(*tokens, HIDDEN), tensor(*tokens, HIDDEN), tensor(HIDDEN), 1e-6),
        "swiglu": (tensor(*tokens, 2 * WIDTH),),
        "rotary": (tensor(*tokens, HEADS, ROPE), half, half, True),
        "write_cache_": (tensor(*tokens, RANK + ROPE), tensor(RANK), half, half, positions, *cache, 1e-6, False),
        "mla_attention": (
            tensor(*tokens, HEADS, RANK),
            tensor(*tokens, HEADS, ROPE),
            *cache,
            positions,
            0.2,
        ),
        "attention": (
            tensor(*tokens, HEADS, RANK + ROPE),
            tensor("B", "T", HEADS, RANK + ROPE),
            tensor("B", "T", HEADS, RANK),
            positions,
            0.2,
        ),
        "route": (
            tensor("N", EXPERTS, dtype=FLOAT32),
            tensor(EXPERTS, dtype=FLOAT32),
            "sigmoid",
            TOP_K,
            3,
            2,
            "top2",
            -math.inf,
            True,
            1e-20,
            2.5,
        ),
        "sort_pairs": (pairs[0], EXPERTS),
        "grouped_linear": (tensor("M", HIDDEN), tensor(EXPERTS, WIDTH, HIDDEN), tensor(EXPERTS, dtype=INT32)),
        "routed_swiglu": (
            tensor("N", HIDDEN),
            *pairs,
            tensor(EXPERTS, 2 * WIDTH, HIDDEN),
            tensor(EXPERTS, HIDDEN, WIDTH),
        ),
    }[op]


def real_operands(op):
    """A model with 16 heads over a latent of 512 and 64 experts: decode, or prefill; any number of requests."""

    def tensor(*shape, dtype=torch.bfloat16):
        return TensorSpec(shape, dtype)

    pairs = tensor("B", 6, dtype=INT64), tensor("B", 6, dtype=FLOAT32)
    return {
        "rms_norm": (tensor("B", 1, 2048), tensor(2048), 1e-6),
        "add_rms_norm": (tensor("B", 1, 2048), tensor("B", 1, 2048), tensor(2048), 1e-6),
        "swiglu": (tensor("B", 1, 5632),),
        "mla_attention": (
            tensor("B", 1, 16, 512),
            tensor("B", 1, 16, 64),
            tensor("B", "T", 512),
            tensor("B", "T", 64),
            tensor("B", 1, dtype=INT64),
            0.1,
        ),
        "attention": (
            tensor("B", "S", 16, 192),
            tensor("B", "T", 16, 192),
            tensor("B", "T", 16, 128),
            tensor("B", "S", dtype=INT64),
            0.1,
        ),
        "route": (
            tensor("B", 64, dtype=FLOAT32),
            tensor(64, dtype=FLOAT32),
            *("sigmoid", 6, 1, 1, "top2", -math.inf, True, 1e-20, 2.5),
        ),
        "routed_swiglu": (tensor("B", 2048), *pairs, tensor(64, 2816, 2048), tensor(64, 2048, 1408)),
    }[op]


OPS = (
    "rms_norm",
    "add_rms_norm",
    "swiglu",
    "rotary",
    "write_cache_",
    "mla_attention",
    "attention",
    "route",
    "sort_pairs",
    "grouped_linear",
    "routed_swiglu",
)


# Operands, by place, that may have another dtype than the rest: what is added, multiplied or looked up in float32.
LOOSE = {
    "rms_norm": (1,),
    "add_rms_norm": (2,),
    "rotary": (1, 2),
    "write_cache_": (1, 2, 3, 4),
    "attention_inputs_": (3, 4, 5, 6),
    "mla_attention": (4,),
    "attention": (3,),
    "route": (0, 1),
    "norm_router": (1, 3),
    "sort_pairs": (0,),
    "grouped_linear": (2,),
    "routed_swiglu": (1, 2),
}


WRITTEN = {"write_cache_": (5, 6), "attention_inputs_": (7, 8)}  # operands, by place


def outcomes(op, run, operands):
    """All that `run`, which may be the op, its reference or a kernel, writes into the operands and gives."""
    found = run(*operands)
    given = [] if found is None else [found] if isinstance(found, torch.Tensor) else list(found)
    return [operands[place].clone() for place in WRITTEN.get(op, ())] + given


def copies(operands):
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in operands]


# Of a routing: scoring, group_score, masked, normalise.
SIGMOID = ("sigmoid", "top2", -math.inf, True)
SOFTMAX = ("softmax", "max", 0.0, False)
ROOT = ("sqrtsoftplus", "max", 0.0, True)
SCORINGS = pytest.mark.parametrize("settings", [SIGMOID, SOFTMAX, ROOT], ids=lambda settings: settings[0])


def arguments(op, sizes, dtype=torch.float32):
    """Random arguments for the operands of `op` at these sizes; integers are valid positions, experts, offsets."""
    drawn = []
    for operand in operands(op, dtype):
        if not isinstance(operand, TensorSpec):
            drawn.append(operand)
            continue
        shape = [sizes.get(size, size) for size in operand.shape]
        if operand.dtype == INT64:
            drawn.append(torch.arange(math.prod(shape)).view(shape) % (EXPERTS if "N" in operand.shape else sizes["S"]))
        elif operand.dtype == INT32:
            drawn.append(
                (torch.rand(shape) * sizes["M"]).to(INT32).sort().values.index_fill(0, torch.tensor(-1), sizes["M"])
            )
        else:
            drawn.append(torch.randn(shape).to(operand.dtype))
    return drawn
