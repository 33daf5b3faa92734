"""A launch of a kind that has been launched before goes straight to the code, any other through triton."""

import ast
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses import FakeTensorMode
from triton import knobs

from codegen import direct
from codegen.direct import DirectLaunches, kind_of
from codegen.kernels.sm_90.boxes import in_boxes
from codegen.tuning import KERNELS


@triton.jit
def kernel(x, n, rows, BLOCK: tl.constexpr, SCALE: tl.constexpr):
    pass


class Triton:
    """Stands for triton's own way: gives each launch code that notes what it is run with."""

    def __init__(self):
        self.asked, self.ran = [], []

    def __call__(self, *arguments, grid, warmup, **options):
        code = SimpleNamespace(function=len(self.asked), packed_metadata="packed")
        code.run = lambda *given: self.ran.append(given)
        self.asked.append(arguments)
        return code


@pytest.fixture
def launches(monkeypatch):
    gpu = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: f"stream {device}")
    monkeypatch.setattr(direct, "driver", SimpleNamespace(active=gpu))
    made = DirectLaunches(kernel)
    made.through_triton = Triton()
    return made


def launch(launches, x, n, rows=None, grid=(7, 2), BLOCK=64, SCALE=0.5, num_warps=4):
    launches(x, n, rows, grid=grid, warmup=False, BLOCK=BLOCK, SCALE=SCALE, num_warps=num_warps)
    return len(launches.through_triton.asked)


def test_the_second_launch_of_a_kind_is_direct_and_gets_its_own_arguments(launches):
    x, other = torch.randn(64), torch.randn(128)
    assert launch(launches, x, 48) == launch(launches, other, 32, grid=(5,)) == 1
    ((*blocks, stream, function, packed, _, enter, leave, y, n, rows, block, scale),) = launches.through_triton.ran
    assert blocks == [5, 1, 1] and (stream, function, packed, enter, leave) == ("stream 0", 0, "packed", None, None)
    assert y is other and (n, rows, block, scale) == (32, None, 64, 0.5)


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.randn(64).half()},
        {"x": torch.randn(65)[1:]},
        {"n": 1},
        {"n": 47},
        {"n": 16 << 40},
        {"rows": 3},
        {"rows": torch.randn(4)},
        {"BLOCK": 32},
        {"SCALE": 0.25},
        {"num_warps": 8},
    ],
    ids=["half", "unaligned", "one", "odd", "large", "number", "tensor", "block", "scale", "warps"],
)
def test_another_kind_goes_through_triton(launches, changed):
    usual = {"x": torch.randn(64), "n": 48}
    assert launch(launches, **usual) == 1
    assert launch(launches, **{**usual, **changed}) == 2
    assert launch(launches, **usual) == launch(launches, **{**usual, **changed}) == 2


def test_boxes_of_another_shape_or_layout_are_another_kind(launches):
    matrix = torch.randn(64, 64).half()
    assert launch(launches, in_boxes(matrix, 16, 64), 48) == launch(launches, in_boxes(matrix.clone(), 16, 64), 48) == 1
    assert launch(launches, in_boxes(matrix, 32, 64), 48) == 2
    assert launch(launches, in_boxes(matrix.to(torch.bfloat16), 16, 64), 48) == 3


def test_a_profiler_that_watches_launches_sees_them_all(launches):
    x = torch.randn(64)
    launch(launches, x, 48)

    def hook(metadata):
        pass

    knobs.runtime.launch_exit_hook.add(hook)
    assert launch(launches, x, 48) == 2 and not launches.through_triton.ran
    knobs.runtime.launch_exit_hook.remove(hook)
    assert launch(launches, x, 48) == 2 and launches.through_triton.ran


def test_another_device_has_code_of_its_own(launches, monkeypatch):
    x = torch.randn(64)
    launch(launches, x, 48)
    monkeypatch.setattr(direct.driver.active, "get_current_device", lambda: 1)
    assert launch(launches, x, 48) == 2


def test_a_number_given_by_name_is_not_taken_for_a_constant(launches):
    for rows in (2, 3):
        launches(torch.randn(64), 48, grid=(1,), warmup=False, rows=rows, BLOCK=64, SCALE=0.5)
    assert len(launches.through_triton.asked) == 2 and not launches.known


def test_constants_given_by_position_are_left_to_triton(launches):
    for block in (32, 64, 32):
        launches(torch.randn(64), 48, None, block, grid=(1,), warmup=False, SCALE=0.5)
    assert len(launches.through_triton.asked) == 3 and not launches.known


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_tensor_on_a_gpu_is_launched_with_its_address():
    with FakeTensorMode():
        x = torch.empty(64, device="cuda")
        assert kind_of(x) == (torch.float32, x.data_ptr())


def test_every_launch_in_a_kernel_file_can_be_direct():
    found = 0
    for path in KERNELS.rglob("*.py"):
        module = import_module(".".join(path.relative_to(KERNELS.parents[1]).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                kernel = getattr(module, node.func.value.id)
                variable = [parameter.name for parameter in kernel.params if not parameter.is_constexpr]
                unpacked = any(isinstance(argument, ast.Starred) for argument in node.args)
                assert unpacked or len(node.args) == len(variable), f"{path.name}: {node.lineno}"
                assert not {keyword.arg for keyword in node.keywords} & set(variable), f"{path.name}: {node.lineno}"
                found += 1
    assert found > 20
