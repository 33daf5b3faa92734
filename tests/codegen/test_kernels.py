"""Every kernel file is checked against the references in Triton's interpreter, each in its own process.

The interpreter has to be chosen before triton is imported, and would change triton for the rest of this process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = sorted((Path(__file__).parent / "kernels").glob("check_*.py"))
KERNELS = Path(__file__).parents[2] / "codegen" / "kernels"


@pytest.mark.parametrize("check", CHECKS, ids=lambda path: path.stem.removeprefix("check_"))
def test_kernel_agrees_with_the_reference(check):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(check)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_kernel_file_has_a_check():
    kernels = {path.stem for path in KERNELS.glob("*.py")} - {"__init__", "layout"}
    assert kernels == {path.stem.removeprefix("check_") for path in CHECKS}
