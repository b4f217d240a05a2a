"""Every kernel as a registered operator: after this import, ``torch.ops.eagle.<name>`` is there for all of them.

    import eagle.model.triton_kernels.operators
    torch.ops.eagle.rms_norm(x, weight, 1e-5)

An operator is registered where its kernel's module is imported, which the package itself puts off until a kernel is asked
for. `torch.compile` takes the operators; the plain functions launch Triton in ways that it cannot follow. Raises ImportError
where triton is not installed.
"""

from __future__ import annotations

from eagle.model import triton_kernels

for _name in triton_kernels._KERNELS:
    getattr(triton_kernels, _name)
