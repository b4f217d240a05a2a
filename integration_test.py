#!/usr/bin/env python3
"""Check a model with Triton kernels on and off, streamed, in a batch and restored: see --help."""

import sys

from eagle.cli import run
from eagle.commands.integration_test import app

if __name__ == "__main__":
    sys.exit(run(app, "integration_test.py"))
