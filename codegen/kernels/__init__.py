"""Triton kernels, one op a file: the readable source that specialise.py cuts and emit.py writes out.

A file holds `@triton.jit` kernels and a launcher: a Python function with the name and the signature of the op that
allocates the outputs and launches `kernel[grid](…)`. `codegen/kernels/<target>/<op>.py` is a form for one target; it
may define `serves`, with the op's signature, which returns None or the reason why the plain form must be used.

Launchers are also run on fake tensors, to learn which constants a kernel gets. So a launcher imports only torch,
triton and other kernel files, asks nothing of the device, and looks at shapes, strides and dtypes, never at values.
Upper-case numbers at the top of a file are its tiles; `codegen/tuning.py` holds other values per target.
"""
