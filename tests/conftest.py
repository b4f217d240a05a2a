"""Shared by the tests: seeds, tiny models, relative error."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

# The same examples in every CI run; fresh ones elsewhere.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

if not torch.cuda.is_available():
    # Kernels then run in Triton's interpreter; it is chosen when triton is first imported, which `tiny` does.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tiny import seeded

# Beside other workers, threads of one's own only get in the way.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else max(1, min(2, torch.get_num_threads())))


@pytest.fixture(autouse=True)
def _fresh_seed(request: pytest.FixtureRequest) -> None:
    """Random inputs that differ from test to test and are the same from run to run."""
    seeded(request.node.nodeid)
