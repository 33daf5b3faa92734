"""Attention on Hopper: the kernels' logic in the emulator, their machine code made without a GPU."""

import pytest
import torch

from codegen import ops  # noqa: F401  defines torch.ops.dsv3
from codegen.kernels.sm_90 import attention as prefill
from codegen.kernels.sm_90 import mla_attention as hopper
from codegen.record import TensorSpec
from codegen.targets import target
from codegen.tuning import choose
from tests.codegen.calls import compiled
from tests.codegen.sm_90.emulator import emulated

SM_90 = target("sm_90")
BF16 = torch.bfloat16
TOLERANCE = 4e-3


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """torch.empty gives NaN: what a kernel leaves unwritten shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))


def draw(lengths, capacity, queries, heads, rank, rope):
    """Inputs whose cache holds NaN behind each request's last position; the last query ends at the length."""
    generator = torch.Generator().manual_seed(sum(lengths) + heads)
    batch = len(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(BF16)

    positions = (torch.tensor(lengths)[:, None] - queries + torch.arange(queries)).clamp(min=0)
    latent, rope_key = normal(batch, capacity, rank), normal(batch, capacity, rope)
    hidden = torch.arange(capacity) > positions.amax(1, keepdim=True)
    latent[hidden], rope_key[hidden] = torch.nan, torch.nan
    return normal(batch, queries, heads, rank) * 0.3, normal(batch, queries, heads, rope), latent, rope_key, positions


def error(found, inputs, scale):
    """Relative to the reference in float32, which is not shown the NaN behind the last positions."""
    wide = [x.float().nan_to_num() if x.is_floating_point() else x for x in inputs]
    expected = torch.ops.dsv3.mla_attention(*wide, scale)
    return ((found.float() - expected).norm() / expected.norm()).item()


def attend(lengths, capacity, queries, heads, rank, rope, processors, growth=1):
    """growth: how much larger the last cached rows are than the first ones, and scores with them."""
    inputs, scale = draw(lengths, capacity, queries, heads, rank, rope), 0.09
    inputs[3].mul_(torch.linspace(1, growth, capacity)[:, None])
    with emulated(processors):
        found = hopper.mla_attention(*inputs, scale)
    return error(found, inputs, scale)


# One row; rows that fill no tile; ragged requests that share programs; fewer programs than requests; equal requests;
# row tiles that end at different positions; a request of more parts than are joined at a time.
@pytest.mark.parametrize(
    "lengths, queries, heads, rank, rope, processors",
    [
        ([1], 1, 1, 128, 64, 5),
        ([300], 1, 6, 128, 32, 3),
        ([64, 65, 1, 200], 1, 16, 192, 64, 4),
        ([130, 7, 64, 128, 90], 3, 5, 128, 16, 2),
        ([200, 200, 200], 1, 16, 128, 64, 3),
        ([300, 150], 40, 3, 128, 64, 9),
        ([300, 1, 2, 3], 1, 16, 128, 64, 12),
    ],
)
def test_few_rows_agree(lengths, queries, heads, rank, rope, processors):
    assert attend(lengths, 300, queries, heads, rank, rope, processors) < TOLERANCE


# Two warp groups of rows; 64-row tiles, of which the last is partly filled.
@pytest.mark.parametrize(
    "lengths, queries, heads, rank, rope, processors",
    [
        ([150, 20], 1, 20, 128, 64, 3),
        ([70, 257, 3], 2, 40, 128, 64, 4),
        ([190, 1], 3, 24, 192, 32, 5),
        ([65, 129, 300], 1, 64, 256, 64, 7),
        ([220, 140], 100, 2, 128, 64, 10),
    ],
)
def test_many_rows_agree(lengths, queries, heads, rank, rope, processors, monkeypatch):
    monkeypatch.setattr(hopper, "SHORT", 0)
    assert attend(lengths, 300, queries, heads, rank, rope, processors) < TOLERANCE


# Scores that grow from tile to tile, by more than a format has room for.
@pytest.mark.parametrize("growth", [30, 1000])
@pytest.mark.parametrize("heads", [16, 20, 64])
def test_sums_follow_scores_that_grow(heads, growth, monkeypatch):
    monkeypatch.setattr(hopper, "SHORT", 0)
    assert attend([300, 70, 200], 300, 2 if heads == 16 else 1, heads, 128, 64, 4, growth) < TOLERANCE


def test_a_short_cache_is_read_by_many_narrow_row_tiles():
    assert attend([280], 300, 1, 40, 128, 64, 12) < TOLERANCE


@pytest.mark.parametrize("heads", [4, 40])
def test_pages_hold_the_same_rows_in_any_order(heads, monkeypatch):
    monkeypatch.setattr(hopper, "SHORT", 0)
    inputs, scale = draw([100, 256, 31], 256, 2, heads, 128, 64), 0.1
    q_latent, q_rope, latent, rope_key, positions = inputs
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))[:12]
    pages = [torch.full((15, 64, x.shape[2]), torch.nan, dtype=BF16) for x in (latent, rope_key)]
    for page, x in zip(pages, (latent, rope_key), strict=True):
        page[order] = x.reshape(12, 64, -1)
    table = order.view(3, 4).to(torch.int32)
    with emulated(4):
        found = hopper.paged_mla_attention(q_latent, q_rope, *pages, table, positions, scale)
    assert error(found, inputs, scale) < TOLERANCE


def test_a_cache_that_is_a_view_is_not_copied():
    q_latent, q_rope, latent, rope_key, positions = draw([130, 20], 192, 1, 4, 128, 64)
    roomy = torch.full((2, 256, 128), torch.nan, dtype=BF16)
    roomy[:, :192] = latent
    rows, step = hopper.cache_view(roomy[:, :192])
    assert rows.data_ptr() == roomy.data_ptr() and step == 256
    with emulated(3):
        found = hopper.mla_attention(q_latent, q_rope, roomy[:, :192], rope_key, positions, 0.1)
    assert error(found, (q_latent, q_rope, latent, rope_key, positions), 0.1) < TOLERANCE


def call(batch, queries, heads, rank, rope, capacity, dtype=BF16):
    return (
        TensorSpec((batch, queries, heads, rank), dtype),
        TensorSpec((batch, queries, heads, rope), dtype),
        TensorSpec((batch, capacity, rank), dtype),
        TensorSpec((batch, capacity, rope), dtype),
        TensorSpec((batch, queries), torch.int64),
        0.0721,
    )


# Two warp groups of 16 rows keep a few loop invariants on the stack: nothing, beside waiting for memory.
@pytest.mark.parametrize(
    "kernel, batch, queries, heads, rank, rope, stack",
    [
        ("mla_decode_narrow", 1, 1, 16, 512, 64, 0),
        ("mla_decode_narrow", 5, 4, 6, 384, 32, 96),
        ("mla_decode_wide", 64, 2, 64, 512, 64, 0),
    ],
)
def test_kernels_fit_the_chip_without_spilling(kernel, batch, queries, heads, rank, rope, stack):
    kernels = compiled("mla_attention", call(batch, queries, heads, rank, rope, 40000), SM_90)
    binaries = kernels.metadata["binaries"]
    assert [binary["kernel"] for binary in binaries] == [kernel, "mla_merge"]
    assert [binary["stack_bytes"] <= limit for binary, limit in zip(binaries, (stack, 0), strict=True)] == [True, True]
    assert max(binary["shared_bytes"] for binary in binaries) <= SM_90.shared_memory


@pytest.mark.parametrize("rank", range(128, 513, 64))
@pytest.mark.parametrize("rows", [1, 16, 20, 64, 512])
def test_every_form_has_room_for_more_than_a_tile(rows, rank):
    form = hopper.choose_form(rows, rank, positions=1 << 20)
    assert rank % form.width == 0
    assert form.slots(rank, 128) * form.width > rank


@pytest.mark.parametrize(
    "operands",
    [
        call(1, 1, 16, 512, 64, 64, torch.float16),
        call(1, 1, 16, 96, 64, 64),
        call(1, 1, 16, 576, 64, 64),
        call(1, 1, 16, 512, 60, 64),
    ],
    ids=["float16", "rank 96", "rank 576", "rope 60"],
)
def test_other_calls_get_the_plain_form(operands):
    assert choose("mla_attention", operands, SM_90).parent.name == "kernels"
    assert choose("mla_attention", call("B", "S", 16, 512, 64, "T"), SM_90).parent.name == "sm_90"


def prompt(batch, queries, context, heads, groups, widths):
    """Arguments of attention over one or two parts, keys and values of one projection, one rope key for all heads."""
    width, rope, value_width = widths

    def normal(*shape):
        return torch.randn(*shape).to(BF16)

    q, q_rope = normal(batch, queries, heads, width + rope).split([width, rope], -1)
    k, v = normal(batch, context, groups, width + value_width).split([width, value_width], -1)
    rest = (q_rope.contiguous(), normal(batch, context, 1, rope)) if rope else ()
    return q, k, v, (torch.arange(queries) + context - queries).repeat(batch, 1), 0.1, *rest


def agrees(arguments):
    wide = [x.float().nan_to_num() if getattr(x, "dtype", None) == BF16 else x for x in arguments]
    expected = torch.ops.dsv3.attention(*wide)
    with emulated(4):
        found = prefill.attention(*arguments)
    return ((found.float() - expected).norm() / expected.norm()).item() < TOLERANCE


# One query; whole tiles; ends inside of tiles; a context before; heads that share keys and a rope key; more lines than
# go together.
@pytest.mark.parametrize(
    "batch, queries, context, heads, groups, widths",
    [
        (1, 1, 1, 1, 1, (64, 0, 64)),
        (1, 256, 256, 1, 1, (128, 64, 128)),
        (2, 130, 300, 2, 2, (128, 32, 64)),
        (1, 65, 400, 4, 2, (64, 64, 128)),
        (1, 150, 200, 2, 1, (192, 64, 256)),
        (2, 70, 90, 2, 2, (256, 32, 64)),
    ],
)
def test_prefill_agrees(batch, queries, context, heads, groups, widths, monkeypatch):
    monkeypatch.setattr(prefill, "CACHED_BYTES", 1 << 16)
    assert agrees(prompt(batch, queries, context, heads, groups, widths))


def test_queries_at_any_positions_do_not_see_what_lies_behind():
    q, k, v, _, scale, *rope = prompt(2, 140, 300, 2, 2, (128, 64, 128))
    positions = torch.stack([torch.randperm(210)[:140], torch.full((140,), 5)])
    hidden = torch.arange(300) > positions.amax(1, keepdim=True)
    k, v = k.clone(), v.clone()
    k[hidden], v[hidden] = torch.nan, torch.nan
    assert agrees((q, k, v, positions, scale, *rope))


def test_a_joined_head_of_two_powers_of_two_is_cut():
    q, k = torch.randn(1, 70, 2, 192).to(BF16), torch.randn(1, 70, 1, 192).to(BF16).expand(-1, -1, 2, -1)
    assert agrees((q, k, torch.randn(1, 70, 2, 64).to(BF16), torch.arange(70)[None], 0.1))


def prefill_call(widths, groups=16, dtype=BF16):
    width, rope, value_width = widths
    return (
        TensorSpec(("B", "S", 16, width), dtype, ("S*5120", 5120, 320, 1)),
        TensorSpec(("B", "T", groups, width), dtype),
        TensorSpec(("B", "T", groups, value_width), dtype),
        TensorSpec(("B", "S"), torch.int64),
        0.07,
        *((TensorSpec(("B", "S", 16, rope), dtype), TensorSpec(("B", "T", 1, rope), dtype)) if rope else ()),
    )


@pytest.mark.parametrize(
    "widths, groups",
    [
        ((128, 64, 128), 16),
        ((192, 0, 128), 16),
        ((128, 0, 128), 4),
        ((192, 64, 256), 16),
        ((256, 64, 256), 16),
        ((256, 0, 128), 4),
    ],
)
def test_prefill_fits_the_chip_without_spilling(widths, groups):
    (binary,) = compiled("attention", prefill_call(widths, groups), SM_90).metadata["binaries"]
    assert binary["kernel"] == "prefill_attention_kernel" and binary["stack_bytes"] == 0
    assert binary["shared_bytes"] <= SM_90.shared_memory


@pytest.mark.parametrize(
    "operands",
    [
        prefill_call((128, 64, 128), dtype=torch.float32),
        prefill_call((512, 0, 128)),
        prefill_call((128, 16, 128)),
        prefill_call((64, 0, 96)),
        (*prefill_call((64, 0, 64))[:4], -0.07),
    ],
    ids=["float32", "width 512", "rope 16", "values 96", "negative scale"],
)
def test_other_prompts_get_the_plain_form(operands):
    assert choose("attention", operands, SM_90).parent.name == "kernels"
    assert choose("attention", prefill_call((128, 64, 128)), SM_90).parent.name == "sm_90"
