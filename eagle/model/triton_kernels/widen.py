"""One-byte weights as bfloat16 or float16 in registers, exactly and cheaply.

Triton's own conversions go through float32 at a quarter of the rate of other instructions, which is slower than the
memory that a weight comes from. On Hopper two values at a time become bfloat16 with integer instructions and one
packed subtraction or product. Every int8, and every e4m3 value but NaN (which `quantize_weight` never makes), is exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A byte b = s·128 + v beside 0x43: the bfloat16 of 128 + v less that of 128 (s = 0) or 256 (s = 1) is the int8 b.
_INT8_TO_BF16 = tl.constexpr("""{
.reg .b32 pair, low;
cvt.u32.u16 pair, $1;
prmt.b32 pair, pair, 0x43434343, 0x4140;
and.b32 low, pair, 0xff7fff7f;
and.b32 pair, pair, 0xff80ff80;
sub.bf16x2 $0, low, pair;
}""")

# e4m3's exponent and mantissa moved to the end of bfloat16's are the value times 2 ** (7 - 127); subnormals too.
_E4M3_TO_BF16 = tl.constexpr("""{
.reg .b32 pair, low, big;
cvt.u32.u16 pair, $1;
prmt.b32 pair, pair, 0, 0x1404;
shr.u32 low, pair, 4;
and.b32 low, low, 0x07f007f0;
lop3.b32 low, pair, low, 0x80008000, 0xec;
mov.b32 big, 0x7b807b80;
mul.bf16x2 $0, low, big;
}""")


@triton.jit
def widen(weight, dtype: tl.constexpr, HOPPER: tl.constexpr):
    """weight as ``dtype``; HOPPER: whether the device has bfloat16 arithmetic on pairs (and is no interpreter)."""
    if HOPPER and dtype == tl.bfloat16 and weight.dtype == tl.int8:
        wide = tl.inline_asm_elementwise(_INT8_TO_BF16, "=r,h", [weight], dtype=tl.bfloat16, is_pure=True, pack=2)
    elif HOPPER and dtype == tl.bfloat16 and weight.dtype == tl.float8e4nv:
        wide = tl.inline_asm_elementwise(
            _E4M3_TO_BF16, "=r,h", [weight.to(tl.int8, bitcast=True)], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        wide = weight.to(dtype)
    return wide
