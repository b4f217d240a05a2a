#!/usr/bin/env python3
"""Time a model as loaded against the model with Triton kernels, and plain decoding of both: see --help."""

import sys

from eagle.cli import run
from eagle.commands.benchmark import app

if __name__ == "__main__":
    sys.exit(run(app, "benchmark.py"))
