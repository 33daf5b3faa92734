"""Programs as MLIR: the op vocabulary in portable ATen, and the way through torch-mlir."""

from codegen.mlir.importing import DIALECTS, FIXED_SIZES, MlirError, decomposed, require_torch_mlir, to_mlir
from codegen.mlir.portable import PortableBlock, applied

__all__ = [
    "DIALECTS",
    "FIXED_SIZES",
    "MlirError",
    "PortableBlock",
    "applied",
    "decomposed",
    "require_torch_mlir",
    "to_mlir",
]
