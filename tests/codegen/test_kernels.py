"""All kernel files are checked against the references in Triton's interpreter, in a process of their own.

The interpreter has to be chosen before triton is imported, and would change triton for the rest of this process.
"""

import os
import subprocess
import sys
from pathlib import Path

CHECKS = Path(__file__).parent / "kernels"
KERNELS = Path(__file__).parents[2] / "codegen" / "kernels"


def test_kernels_agree_with_the_references():
    checks = sorted(str(path) for path in CHECKS.glob("check_*.py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *checks],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_kernel_file_has_a_check():
    kernels = {path.stem for path in KERNELS.glob("*.py")} - {"__init__", "layout"}
    checks = {path.stem.removeprefix("check_") for path in CHECKS.glob("check_*.py")}
    assert checks == kernels | {"operands"}  # of all of them
