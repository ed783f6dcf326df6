"""Run the kernels in Triton's interpreter.

Whether a kernel is interpreted is settled when triton is first imported, which other tests of this process may already have done; so this
needs a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

INSIDE = Path(__file__).with_name("inside_interpreter.py")


@pytest.mark.slow
def test_the_kernels_in_the_interpreter():
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not run with numpy {np.__version__}; with numpy 2.2 it does")
    command = [sys.executable, "-m", "pytest", str(INSIDE), "-q", "--no-header", "-p", "no:cacheprovider", "--durations=5"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=INSIDE.parents[2], check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-4_000:]
    assert " passed" in done.stdout
