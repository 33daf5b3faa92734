"""choose: the target's own form where it serves, the plain one otherwise; tiles that exist."""

import sys
from types import SimpleNamespace

import pytest

from codegen import tuning
from codegen.bundle import bundle
from codegen.targets import TARGETS, target
from codegen.tuning import KERNELS, TILES, choose, tiles
from tests.codegen.calls import operands


def test_plain_form_where_the_target_has_none_of_its_own():
    assert choose("rms_norm", operands("rms_norm"), target("gfx942")) == KERNELS / "rms_norm.py"


def test_own_form_unless_it_gives_a_reason(tmp_path, monkeypatch):
    (tmp_path / "sm_80").mkdir()
    (tmp_path / "rms_norm.py").touch()
    (tmp_path / "sm_80" / "rms_norm.py").touch()
    monkeypatch.setattr(tuning, "KERNELS", tmp_path)

    form = SimpleNamespace(rms_norm=None, serves=lambda x, weight, eps: None if eps < 1e-5 else "eps is too large")
    monkeypatch.setitem(sys.modules, "codegen.kernels.sm_80.rms_norm", form)
    x, weight, _ = operands("rms_norm")
    assert choose("rms_norm", (x, weight, 1e-6), target("sm_80")) == tmp_path / "sm_80" / "rms_norm.py"
    assert choose("rms_norm", (x, weight, 1e-4), target("sm_80")) == tmp_path / "rms_norm.py"
    del form.rms_norm
    assert choose("rms_norm", (x, weight, 1e-6), target("sm_80")) == tmp_path / "rms_norm.py"


def test_an_op_without_a_kernel_is_named():
    with pytest.raises(ValueError, match="no kernel for op 'combine_pairs'; there are: add_rms_norm, attention"):
        choose("combine_pairs", (), target("sm_80"))


@pytest.mark.parametrize("op, name", TILES)
def test_tuned_numbers_exist_in_their_kernel_file(op, name):
    assert name in TARGETS
    assert bundle(KERNELS / f"{op}.py", op, tiles(KERNELS / f"{op}.py", target(name)))
