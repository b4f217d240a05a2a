"""``python -m eagle.train``, for torchrun: the flags of ``eagle train``."""

import sys

from eagle.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
