"""bundle: one module from several kernel files, nothing superfluous, comments kept."""

import pytest

from codegen import bundle as module
from codegen.bundle import bundle, prune


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """Writes kernel files of a package of its own and bundles one of them."""
    monkeypatch.setattr(module, "ROOT", tmp_path / "codegen")
    folder = tmp_path / "codegen" / "kernels"
    folder.mkdir(parents=True)

    def write_and_bundle(entry, numbers=None, **files):
        for name, text in files.items():
            (folder / f"{name}.py").write_text(text)
        return bundle(folder / f"{entry}.py", entry, numbers or {})

    return write_and_bundle


def test_imported_kernel_files_are_written_in(kernels):
    text = kernels(
        "outer",
        outer="import torch\nfrom codegen.kernels.inner import helper\n\n"
        "def outer(x):\n    return helper(torch.neg(x))\n",
        inner="import math\n\n# Half, because.\ndef helper(x):\n    return x / math.e\n\ndef other():\n    pass\n",
    )
    assert text == (
        "import math\n\nimport torch\n\n\n"
        "# Half, because.\ndef helper(x):\n    return x / math.e\n\n\n"
        "def outer(x):\n    return helper(torch.neg(x))\n"
    )


def test_same_private_name_in_two_files_is_told_apart(kernels):
    text = kernels(
        "outer",
        inner="_SIZE = 3\n\ndef helper(SIZE):\n    return _SIZE + SIZE\n",
        outer="from codegen.kernels.inner import helper\n_SIZE = 4\n\ndef outer(x):\n    return helper(x) + _SIZE\n",
    )
    namespace = {}
    exec(text, namespace)
    assert namespace["outer"](10) == 17


def test_a_parameter_of_the_same_name_is_not_renamed(kernels):
    text = kernels(
        "outer",
        inner="SIZE = 3\n\ndef helper():\n    return SIZE\n",
        outer="from codegen.kernels.inner import helper\nSIZE = 4\n\ndef own(SIZE):\n    return SIZE\n\n"
        "def outer(x):\n    return helper() + own(x) + SIZE\n",
    )
    namespace = {}
    exec(text, namespace)
    assert namespace["outer"](10) == 17


def test_numbers_are_replaced_and_their_comments_stay(kernels):
    text = kernels("outer", {"BLOCK": 32}, outer="BLOCK = 16  # rows\n\ndef outer():\n    return BLOCK\n")
    assert text.startswith("\nBLOCK = 32  # rows\n") or text.startswith("BLOCK = 32  # rows\n")


@pytest.mark.parametrize(
    "text, message",
    [
        ("import numpy\n\ndef outer():\n    return numpy.e\n", "outer.py: line 1: imports numpy; accepted: torch"),
        ("print('hello')\n\ndef outer():\n    pass\n", "outer.py: line 1: only imports and definitions"),
        ("from codegen.kernels.outer import outer as other\n", "outer.py: line 1: kernel files are imported without"),
    ],
)
def test_what_cannot_stand_alone_is_refused(kernels, text, message):
    with pytest.raises(ValueError, match=message):
        kernels("outer", outer=text)


def test_a_number_the_file_does_not_have_is_refused(kernels):
    with pytest.raises(ValueError, match="outer.py: has no number called BLOCK_X"):
        kernels("outer", {"BLOCK_X": 1}, outer="def outer():\n    pass\n")


def test_prune_keeps_what_is_reached_through_others():
    text = "A = 1\nB = A + 1\nC = 3\n\ndef f():\n    return B\n\ndef g():\n    return C\n"
    assert prune(text, {"f"}).split() == "A = 1 B = A + 1 def f(): return B".split()
