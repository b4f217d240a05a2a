"""EAGLE speculative decoding of Hugging Face language models, with Triton kernels."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("eagle-triton-kernels")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["__version__"]
