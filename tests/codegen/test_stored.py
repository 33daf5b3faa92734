"""Stored machine code serves the launches that it was compiled for, and no others."""

from types import SimpleNamespace

import pytest
import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from codegen import stored
from codegen.build import imported
from codegen.direct import DirectLaunches
from codegen.planned import Planned
from codegen.record import TensorSpec
from codegen.stored import make_launchers, stored_first, use_stored
from codegen.targets import target
from tests.codegen.calls import compiled

SM_90 = target("sm_90")
BF16 = torch.bfloat16
CALLS = {
    "head_linear": (TensorSpec(("N", 16, 512), BF16), TensorSpec((16, 128, 512), BF16)),
    "linear": (TensorSpec(("N", 512), BF16), TensorSpec((1024, 512), BF16), 1e-6, None),
}


@pytest.fixture(scope="module", params=CALLS)
def emitted(request, tmp_path_factory):
    kernel = compiled(request.param, CALLS[request.param], SM_90)
    folder = tmp_path_factory.mktemp("kernels")
    for file, code in kernel.binaries.items():
        (folder / file).write_bytes(code)
    with imported(kernel.source) as module:
        yield kernel, module, folder


def launch_of(kernel, entry, **changed):
    """What triton asks a compiler for at a launch that `entry` serves; changed: (type, constant, aligned) by name."""
    source = SimpleNamespace(signature={}, constants={}, attrs={})
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        constant = entry["constants"].get(name)
        kind = "constexpr" if constant is not None else entry["arguments"][name]
        value = None if constant is None else eval(constant)
        kind, value, aligned = changed.get(name, (kind, value, name in entry["multiples_of_16"]))
        source.signature[name] = kind
        if kind == "constexpr":
            source.constants[(index,)] = value
        if aligned:
            source.attrs[(index,)] = [["tt.divisibility", 16]]
    return source


def compiler_of(emitted, number=0):
    """(kernel, its first entry, a compile that prefers stored code and otherwise says so)"""
    kernel, module, folder = emitted
    entries = kernel.metadata["binaries"]
    entry = entries[number]
    function = getattr(module, entry["kernel"])
    own = [one for one in entries if one["kernel"] == entry["kernel"]]
    return function, entry, stored_first(function, own, folder, lambda src, target, options: "compiled")


def test_a_launch_gets_the_code_it_was_compiled_for(emitted):
    for number, expected in enumerate(emitted[0].metadata["binaries"]):
        function, entry, compile = compiler_of(emitted, number)
        found = compile(launch_of(function, entry), target=None, options={"num_stages": 3, **entry["options"]})
        assert isinstance(found, CompiledKernel)
        assert found.kernel == emitted[0].binaries[expected["file"]]
        assert found.metadata.num_warps == entry["num_warps"] and found.metadata.name == entry["symbol"]


def test_a_size_of_one_is_a_constant_to_triton_and_any_number_to_the_code(emitted):
    function, entry, compile = compiler_of(emitted)
    name = next(n for n, kind in entry["arguments"].items() if kind == "i32" and n not in entry["multiples_of_16"])
    one = launch_of(function, entry, **{name: ("constexpr", 1, False)})
    assert isinstance(compile(one, target=None, options=entry["options"]), CompiledKernel)
    two = launch_of(function, entry, **{name: ("constexpr", 2, False)})
    assert compile(two, target=None, options=entry["options"]) == "compiled"


def test_other_launches_are_compiled(emitted):
    function, entry, compile = compiler_of(emitted)
    pointer = next(name for name, kind in entry["arguments"].items() if kind.startswith("*"))
    kind = entry["arguments"][pointer]
    for changed in ({pointer: ("*fp32", None, True)}, {pointer: (kind, None, False)}):
        assert compile(launch_of(function, entry, **changed), target=None, options=entry["options"]) == "compiled"
    other = {**entry["options"], "num_warps": 2 * entry["num_warps"]}
    assert compile(launch_of(function, entry), target=None, options=other) == "compiled"


def test_another_constant_is_compiled(emitted):
    function, entry, compile = compiler_of(emitted)
    names = [p.name for p in function.params if entry["constants"].get(p.name, "None").isdigit()]
    for name in names:
        changed = launch_of(function, entry, **{name: ("constexpr", int(entry["constants"][name]) + 1, False)})
        assert compile(changed, target=None, options=entry["options"]) == "compiled"


def test_code_of_another_triton_is_left_alone(emitted, monkeypatch, caplog):
    kernel, module, folder = emitted
    function = getattr(module, kernel.metadata["binaries"][0]["kernel"])
    before = function.device_caches
    monkeypatch.setattr(stored.triton, "__version__", "0.0")
    with caplog.at_level("INFO", logger="codegen.stored"):
        use_stored(module, kernel.metadata, folder)
    assert function.device_caches is before and "is left alone" in caplog.text
    monkeypatch.undo()
    assert kernel.metadata["triton"] == triton.__version__
    use_stored(module, kernel.metadata, folder)
    assert function.device_caches is not before and not function.device_caches


@pytest.mark.parametrize("suffix", ["cubin", "hsaco"])
def test_launches_of_nvidias_code_are_direct_and_its_calls_planned(emitted, suffix):
    kernel, _, folder = emitted
    entries = [{**one, "file": one["file"].replace("cubin", suffix)} for one in kernel.metadata["binaries"]]
    with imported(kernel.source) as module:
        plain = getattr(module, kernel.op)
        use_stored(module, {**kernel.metadata, "binaries": entries}, folder)
        kernels = [one for one in vars(module).values() if isinstance(one, JITFunction)]
        assert {type(one.run) is DirectLaunches for one in kernels} == {suffix == "cubin"}
        launcher = getattr(module, kernel.op)
        if suffix == "cubin":
            assert isinstance(launcher, Planned) and launcher.launcher is plain
        else:
            assert launcher is plain


@pytest.fixture
def launchers(monkeypatch):
    """(kernel, signature) of every launcher that is made, on a GPU that says to be one of NVIDIA's."""
    made = []
    driver = SimpleNamespace(
        launcher_cls=lambda source, metadata: made.append((metadata.name, tuple(source.signature.items()))),
        get_current_target=lambda: SimpleNamespace(backend="cuda"),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    return made


def test_launchers_are_made_once_per_signature_before_the_first_launch(emitted, launchers):
    kernel, module, folder = emitted
    make_launchers([(module, kernel.metadata, folder)] * 2)
    expected = set()
    for entry in kernel.metadata["binaries"]:
        names = [parameter.name for parameter in getattr(module, entry["kernel"]).params]
        kinds = tuple((name, entry["arguments"].get(name, "constexpr")) for name in names)
        expected.add((entry["symbol"], kinds))
    assert set(launchers) == expected and len(launchers) == len(expected)


def test_launchers_of_another_triton_or_for_another_gpu_are_not_made(emitted, launchers):
    kernel, module, folder = emitted
    other = [{**entry, "file": entry["file"].replace(".cubin", ".hsaco")} for entry in kernel.metadata["binaries"]]
    make_launchers([(module, {**kernel.metadata, "triton": "0.0"}, folder)])
    make_launchers([(module, {**kernel.metadata, "binaries": other}, folder)])
    assert not launchers
