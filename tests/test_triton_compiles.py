"""Kernels compile for GPUs that need not be here, and fit what those have of shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED_MEMORY = {(8, 0): 166_912, (8, 9): 101_376, (9, 0): 232_448, (12, 0): 101_376}
"""Bytes a program may have, by compute capability (CUDA C++ Programming Guide, technical specifications: 163, 99, 227 KB).
8.6 has as little as 8.9, and no fp8."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler comes with its Linux wheels")
@pytest.mark.parametrize("capability", SHARED_MEMORY, ids=lambda found: f"sm_{found[0]}{found[1]}")
def test_kernels_compile_and_fit(capability, tmp_path):
    here, limit = Path(__file__).resolve().parent, SHARED_MEMORY[capability]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(here.parent)}
    command = [sys.executable, str(here / "compiled.py"), *map(str, (*capability, limit))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len({name.split(",")[0] for name in found}) >= 24
    assert {name: taken for name, taken in found.items() if taken > limit} == {}
