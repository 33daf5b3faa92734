"""What the next item is, told by the warp that takes items to all others of a program, through shared memory."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def tell(mail, kind, tile, part, row, end, slot, phase):
    """Say what the next item is, to the groups and the signalling warp. A letter has eight words, five are in use."""
    letters, told, heard, _ = mail
    mbarrier.wait(heard.index(slot), phase ^ 1)
    _write(letters.index(slot * 8 + 0), kind)
    _write(letters.index(slot * 8 + 1), tile)
    _write(letters.index(slot * 8 + 2), part)
    _write(letters.index(slot * 8 + 3), row)
    _write(letters.index(slot * 8 + 4), end)
    mbarrier.arrive(told.index(slot))


@gluon.jit
def hear(mail, slot, phase):
    """What the next item is, as it was told: kind, tile, part, first row and end."""
    letters, told, _, _ = mail
    mbarrier.wait(told.index(slot), phase)
    return (
        _read(letters.index(slot * 8 + 0)),
        _read(letters.index(slot * 8 + 1)),
        _read(letters.index(slot * 8 + 2)),
        _read(letters.index(slot * 8 + 3)),
        _read(letters.index(slot * 8 + 4)),
    )


@gluon.jit
def _write(word, value):
    word.store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def _read(word):
    return gl.max(word.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)
