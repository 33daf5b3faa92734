"""Dead branches, constants, parameters and locals leave; everything else stays as it was written."""

import textwrap

import pytest

from codegen.trim import drop_unused_constants, drop_unused_locals, drop_unused_parameters, prune_branches


def body(text):
    return "def kernel(x):\n" + textwrap.indent(textwrap.dedent(text), "    ")


@pytest.mark.parametrize(
    "before, after",
    [
        ("if ON:\n    # why\n    x = 1\nelse:\n    x = 2\ny = 3\n", "# why\nx = 1\ny = 3\n"),
        ("if OFF:\n    x = 1\nelse:\n    # why not\n    x = 2\n", "# why not\nx = 2\n"),
        ("if OFF:\n    x = 1\ny = 3\n", "y = 3\n"),
        ("if N > 3 and not OFF:\n    x = 1\n", "x = 1\n"),
        ("if NAME == 'max':\n    x = 1\nelse:\n    x = 2\n", "x = 1\n"),
        ("if OFF:\n    x = 1\nelif x:\n    x = 2\nelse:\n    x = 3\n", "if x:\n    x = 2\nelse:\n    x = 3\n"),
        ("if x:\n    x = 1\nelif ON:\n    x = 2\nelse:\n    x = 3\n", "if x:\n    x = 1\nelse:\n    x = 2\n"),
        ("if x:\n    x = 1\nelif OFF:\n    x = 2\nelse:\n    x = 3\n", "if x:\n    x = 1\nelse:\n    x = 3\n"),
        ("if x:\n    x = 1\nelif OFF:\n    x = 2\n", "if x:\n    x = 1\n"),
        (
            "if x:\n    x = 1\nelif OFF:\n    x = 2\nelif x > 2:\n    x = 3\n",
            "if x:\n    x = 1\nelif x > 2:\n    x = 3\n",
        ),
        ("if ON:\n    if OFF:\n        x = 1\n    x = 2\n", "x = 2\n"),
        ("x = (1 if ON else 2) + (3 if x else 4)\n", "x = (1) + (3 if x else 4)\n"),
        ("if HALF > 1:\n    x = 1\n", "x = 1\n"),
    ],
)
def test_decided_branches(before, after):
    constants = "ON: tl.constexpr = True\nOFF: tl.constexpr = False\nN: tl.constexpr = 4\n"
    constants += "NAME: tl.constexpr = 'max'\nHALF: tl.constexpr = N // 2\n"
    assert prune_branches(body(constants + before), "kernel") == body(constants + after)


@pytest.mark.parametrize("near_miss", ["if x:\n    x = 1\n", "if f(ON):\n    x = 1\n", "while ON:\n    x = 1\n"])
def test_undecided_branches_stay(near_miss):
    text = body("ON: tl.constexpr = True\n" + near_miss)
    assert prune_branches(text, "kernel") == text


def test_constants_that_only_dead_constants_read_leave_too():
    text = body("A: tl.constexpr = 1\nB: tl.constexpr = A + 1\nC: tl.constexpr = 3\ny = C\n")
    assert drop_unused_constants(text, "kernel") == body("C: tl.constexpr = 3\ny = C\n")


def test_unused_parameters_leave_signature_and_launch():
    before = "def kernel(\n    x,\n    y,\n    z,\n):\n    use(x, z)\n\ndef f(a, b, c):\n    kernel[(1,)](a, b, c)\n"
    after = "def kernel(\n    x,\n    z,\n):\n    use(x, z)\n\ndef f(a, b, c):\n    kernel[(1,)](a, c)\n"
    assert drop_unused_parameters(before, ["kernel"]) == after


def test_an_argument_behind_a_star_stays():
    text = "def kernel(x, y):\n    use(x)\n\ndef f(a, b):\n    kernel[(1,)](*a, b)\n"
    assert drop_unused_parameters(text, ["kernel"]) == text


def test_locals_of_launchers_leave_unless_they_do_something():
    before = "def f(x):\n    a, b = x.shape\n    c = min(a, 2)\n    d = torch.empty(3)\n    return x\n"
    after = "def f(x):\n    d = torch.empty(3)\n    return x\n"
    assert drop_unused_locals(before) == after
