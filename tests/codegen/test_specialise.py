"""specialise: constants in the body, checks in the launcher, what differs between launches left alone."""

from codegen.record import Launch
from codegen.specialise import literal, specialise

BEFORE = '''import triton
import triton.language as tl

BLOCK = 64


@triton.jit
def scale_kernel(
    x,
    bias,
    out,
    FACTOR: tl.constexpr,
    BIASED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scale."""
    # A row each.
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at) * FACTOR
    if BIASED:
        value += tl.load(bias + at)  # added last
    if WIDE:
        value = value.to(tl.float32)
    tl.store(out + at, value)


def scale(x, factor):
    rows = x.shape[0]
    block = min(rows, BLOCK)
    out = x.new_empty(x.shape)
    scale_kernel[(1,)](
        x,
        None,
        out,
        FACTOR=factor,
        BIASED=False,
        WIDE=rows > 8,
        BLOCK=BLOCK,
        num_warps=max(1, block // 16),
    )
    return out
'''

AFTER = '''import triton
import triton.language as tl

BLOCK = 64


def expect(**constants: tuple[object, object]) -> None:
    """These kernels serve the constants that they were cut for: given value, value cut for."""
    for name, (given, cut_for) in constants.items():
        if given != cut_for:
            raise ValueError(f"{name} is {given!r}; this kernel was written for {cut_for!r}")


@triton.jit
def scale_kernel(
    x,
    out,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scale."""
    FACTOR: tl.constexpr = 2.5
    # A row each.
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at) * FACTOR
    if WIDE:
        value = value.to(tl.float32)
    tl.store(out + at, value)


def scale(x, factor):
    rows = x.shape[0]
    out = x.new_empty(x.shape)
    expect(FACTOR=(factor, 2.5))
    scale_kernel[(1,)](
        x,
        out,
        WIDE=rows > 8,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return out
'''


def launch(wide, factor=2.5):
    constants = {"bias": None, "FACTOR": factor, "BIASED": False, "WIDE": wide, "BLOCK": 64}
    return Launch("scale_kernel", constants, {"x": "*fp32", "out": "*fp32"}, ("x", "out"), {"num_warps": 4})


def test_constants_are_cut_in_and_what_they_decide_is_gone():
    assert specialise(BEFORE, "scale", [launch(True), launch(False)]) == AFTER


def test_constants_that_launches_disagree_on_stay_parameters():
    text = specialise(BEFORE, "scale", [launch(True, 2.5), launch(True, 2)])
    assert "    FACTOR: tl.constexpr,\n" in text and "FACTOR=factor" in text
    assert "WIDE" not in text.split("expect(")[0]


def test_infinities_have_a_literal():
    assert eval(literal(float("-inf"))) == float("-inf")
    assert literal(1e-20) == "1e-20"
