"""EAGLE speculative decoding of Hugging Face language models, with Triton kernels."""

__version__ = "0.1.0"

__all__ = ["__version__"]
