"""Emitted kernels: readable text, usable without this project, machine code for every target."""

import ast
import dataclasses
import subprocess
import sys
import time
from importlib import import_module

import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.emit import compile_kernels, write_kernel
from codegen.kernels.grouped_linear import TILINGS
from codegen.targets import target
from codegen.tuning import KERNELS, available, choose
from tests.codegen.calls import EXPERTS, OPS, arguments, compiled, operands, real_operands

# A target without forms of its own gets the plain kernels.
SM_90 = dataclasses.replace(target("sm_90"), name="sm_90 without its own forms")
GPUS = [target("sm_80"), SM_90, target("sm_100"), target("gfx942")]

ALONE = """
import importlib.util, sys, torch

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("codegen", "passes", "dsv3_compile", "model_def"):
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Blocked())
for case in torch.load("cases.pt"):
    spec = importlib.util.spec_from_file_location("kernel", case["file"])
    kernel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    found = getattr(kernel, case["op"])(*case["arguments"])
    if found is None:
        found = case["arguments"][5:7]
    torch.testing.assert_close(found, case["expected"], atol=1e-4, rtol=1e-4)
    print(case["op"])
"""


def test_the_list_of_ops_is_complete():
    assert all(available(op, target("gfx942")) for op in OPS)


def test_every_emitted_kernel_runs_without_this_project(tmp_path):
    cases = []
    sizes = {"B": 2, "S": 3, "T": 5, "N": 7, "M": 9}
    for op in OPS:
        kernel = write_kernel(op, operands(op, torch.float32), SM_90)
        (tmp_path / f"{kernel.name}.py").write_text(kernel.source)
        inputs = arguments(op, sizes)
        copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
        expected = getattr(torch.ops.dsv3, op)(*copies)
        expected = copies[5:7] if expected is None else expected
        cases.append({"op": op, "file": f"{kernel.name}.py", "arguments": inputs, "expected": expected})
    torch.save(cases, tmp_path / "cases.pt")
    done = subprocess.run(
        [sys.executable, "-I", "-c", "import os; os.environ['TRITON_INTERPRET'] = '1'\n" + ALONE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(OPS)


@pytest.mark.parametrize("op", ["add_rms_norm", "route", "mla_attention", "routed_swiglu"])
def test_emitted_text(op, golden):
    golden(write_kernel(op, operands(op), target("sm_80")).source, f"kernels/{op}.py")


class Garbage:
    """What keeps itself alive until it is collected, and lets another thread run then."""

    def __init__(self):
        self.own = self

    def __del__(self):
        time.sleep(0)


def test_sources_are_read_by_several_threads_among_garbage(monkeypatch):
    read = ast.parse

    def among_garbage(*arguments, **named):
        for _ in range(50):
            Garbage()
        return read(*arguments, **named)

    written = [write_kernel(op, operands(op), target("sm_80")) for op in ("routed_swiglu", "mla_attention", "route")]
    monkeypatch.setattr(ast, "parse", among_garbage)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert len(compile_kernels(written, target("sm_80"))) == 3


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name.split()[0])
def test_machine_code_for_every_kernel_without_a_gpu(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compiled here and now, not found in a cache
    for kernel in compile_kernels((write_kernel(op, operands(op), gpu) for op in OPS), gpu):
        assert kernel.binaries
        for entry in kernel.metadata["binaries"]:
            code = kernel.binaries[entry["file"]]
            assert code.startswith(b"\x7fELF") and entry["symbol"].encode() in code
            assert entry["registers"] > 0 and entry["shared_bytes"] <= gpu.shared_memory


def own_forms():
    """(target, op) for every form of a kernel that is written for one target."""
    files = [file for file in KERNELS.glob("*/*.py") if file.stem in OPS]
    return [
        (f.parent.name, f.stem)
        for f in files
        if hasattr(import_module(f"codegen.kernels.{f.parent.name}.{f.stem}"), f.stem)
    ]


@pytest.mark.parametrize("name, op", own_forms())
def test_forms_for_one_target_are_emitted_at_widths_of_a_real_model(name, op):
    gpu, wide = target(name), real_operands(op)
    assert choose(op, wide, gpu) == KERNELS / name / f"{op}.py"
    kernel = compiled(op, wide, gpu)
    assert "codegen" not in kernel.source.split('"""', 2)[2]
    machine_code = [code for file, code in kernel.binaries.items() if file.endswith(".cubin")]
    assert machine_code and all(code.startswith(b"\x7fELF") for code in machine_code)


@pytest.mark.parametrize("experts", [8, 64, 385])
@pytest.mark.parametrize("op", ["grouped_linear", "routed_swiglu"])
def test_every_tiling_of_experts_is_written(op, experts):
    call = [
        dataclasses.replace(one, shape=(experts, *one.shape[1:])) if one.shape[0] == EXPERTS else one
        for one in operands(op)
    ]
    launches = write_kernel(op, call, target("sm_80")).launches
    rows = {launch.constants["BLOCK_M"] for launch in launches if launch.kernel == "grouped_linear_kernel"}
    assert rows == {tiling.rows for tiling in TILINGS}


def test_plain_kernels_are_launched_with_options_that_every_target_knows():
    for op in OPS:
        for launch in write_kernel(op, operands(op), target("gfx942")).launches:
            assert set(launch.options) <= {"num_warps", "num_stages"}, launch


def test_the_same_constants_share_a_name():
    dtypes = (torch.bfloat16, torch.bfloat16, torch.float16)
    assert len({write_kernel("swiglu", operands("swiglu", dtype), target("sm_80")).name for dtype in dtypes}) == 2


def test_a_name_says_op_dtype_and_sizes():
    kernel = write_kernel("grouped_linear", operands("grouped_linear"), target("sm_80"))
    assert kernel.name.startswith("grouped_linear__bfloat16_E6_D72_")
    assert kernel.name.isidentifier()


def test_a_launcher_refuses_other_constants(tmp_path):
    kernel = write_kernel("rms_norm", operands("rms_norm"), target("sm_80"))
    namespace = {}
    (tmp_path / "kernel.py").write_text(kernel.source)
    exec(compile(kernel.source.replace("@triton.jit", ""), "kernel", "exec"), namespace)
    with pytest.raises(ValueError, match="D is 64; this kernel was written for 72"):
        namespace["rms_norm"](torch.randn(2, 64), torch.randn(64), 1e-6)


def test_a_kernel_that_does_not_fit_is_named():
    small = dataclasses.replace(target("sm_80"), shared_memory=1024)
    with pytest.raises(ValueError, match="mla_attention_kernel needs .* bytes of shared memory on sm_80"):
        compiled("mla_attention", operands("mla_attention"), small)


def test_kernels_are_compiled_while_others_are_written():
    gpu, both = GPUS[0], ("rms_norm", "swiglu")

    def written():
        for op in both:
            yield write_kernel(op, operands(op), gpu)

    found = compile_kernels(written(), gpu)
    assert [kernel.op for kernel in found] == list(both)
    for kernel in found:
        assert kernel.binaries.keys() == compiled(kernel.op, operands(kernel.op), gpu).binaries.keys()
        assert all(entry["kernel"].startswith(kernel.op) for entry in kernel.metadata["binaries"])


def test_a_kernel_that_cannot_be_written_ends_the_others():
    def written():
        yield write_kernel("rms_norm", operands("rms_norm"), GPUS[0])
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        compile_kernels(written(), GPUS[0])
