"""Options are checked where they are given, and their repr rebuilds them."""

from __future__ import annotations

import pytest
import torch

from dsv3_compile.options import DEFAULT_LENGTH, OptionError, Options, options_from


def test_the_repr_rebuilds_them():
    options = Options(target="sm_90", set=["order-contractions.decode=folded"], max_length=7, verify=False)
    assert eval(repr(options)) == options
    assert hash(options) == hash(eval(repr(options)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "sm_42"}, "unknown target 'sm_42'; accepted: cpu"),
        ({"dtype": "int8"}, "dtype 'int8'; accepted: float32, bfloat16, float16"),
        ({"max_batch": 0}, "max_batch is 0; accepted: a whole number from 1"),
        ({"max_length": 1.5}, "max_length is 1.5; accepted: a whole number from 1"),
        ({"max_batch": True}, "max_batch is True"),
        ({"set": "a.b=c"}, "set is 'a.b=c'; accepted: a list of strings"),
        ({"disable": None}, "disable is None; accepted: a list of strings"),
        ({"require": [3]}, r"require is \[3\]; accepted: a list of strings"),
        ({"aot": True, "target": "sm_90"}, "aot is for target cpu; the target is sm_90"),
        ({"speed": 3}, "unknown option 'speed'; accepted: target, origin, dtype"),
    ],
)
def test_bad_values_say_what_is_accepted(settings, message):
    with pytest.raises(ValueError, match=message):
        options_from(settings)


def test_the_cpu_computes_in_float32_and_a_gpu_as_stored():
    assert Options().dtype_for(torch.bfloat16) is torch.float32
    assert Options(target="sm_90").dtype_for(torch.bfloat16) is torch.bfloat16
    assert Options(dtype="float16").dtype_for(torch.bfloat16) is torch.float16


def test_the_length_is_the_models_unless_it_is_long():
    assert Options().length_for(300) == 300
    assert Options().length_for(1 << 20) == DEFAULT_LENGTH
    assert Options(max_length=200).length_for(300) == 200
    with pytest.raises(OptionError, match="max_length is 301; the model has 300 positions"):
        Options(max_length=301).length_for(300)
