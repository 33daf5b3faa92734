"""The op vocabulary between passes and kernels; importing it defines `torch.ops.dsv3.*`.

Axis letters in shapes follow docs/architecture.md. Every op computes in `promote(x.dtype, float32)`, so that
float64 stays float64, and returns the dtype of its first argument unless its docstring says otherwise.
"""

from codegen.ops import attention, attention_inputs, cache, experts, hold, linear, norm, rotary, routing
from codegen.ops.registry import COMPOSITE, LAYOUTS, NAMESPACE, OPAQUE

__all__ = [
    "COMPOSITE",
    "LAYOUTS",
    "NAMESPACE",
    "OPAQUE",
    "attention",
    "attention_inputs",
    "cache",
    "experts",
    "hold",
    "linear",
    "norm",
    "rotary",
    "routing",
]
