"""How dots of float32 operands are computed: as three TF32 products on the tensor cores.

Each operand is split into its TF32 value and the TF32 value of the rest; high·high + high·low + low·high drops only
low·low, about 2⁻²² of a product, which is what float32 itself keeps. IEEE dots leave the tensor cores idle. Dots of 16-bit
operands are not concerned.
"""

from __future__ import annotations

import triton.language as tl

FLOAT32_DOTS = tl.constexpr("tf32x3")
