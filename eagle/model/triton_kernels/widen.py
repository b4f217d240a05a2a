"""One-byte weights as bfloat16 or float16 in registers, exactly and cheaply.

Triton's own conversions go through float32 at a quarter of the rate of other instructions, which is slower than the
memory that a weight comes from. On Hopper two values at a time are put together with integer instructions and one packed
subtraction or product. Every int8, and every e4m3 value but NaN (which `quantize_weight` never makes), is exact.
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

# b + 128, which has no sign, beside 0x64: the float16 of 1024 + 128 + b less that of 1152.
_INT8_TO_F16 = tl.constexpr("""{
.reg .b32 pair, base;
cvt.u32.u16 pair, $1;
xor.b32 pair, pair, 0x8080;
prmt.b32 pair, pair, 0x64646464, 0x4140;
mov.b32 base, 0x64806480;
sub.f16x2 $0, pair, base;
}""")

# Sign-extended to 16 bits, e4m3's exponent and mantissa moved to the end of bfloat16's, or to that of float16's, are the
# value times 2 ** (7 - 127), or 2 ** (7 - 15); subnormals too.
_E4M3_TO_BF16 = tl.constexpr("""{
.reg .b32 pair, big;
cvt.u32.u16 pair, $1;
prmt.b32 pair, pair, 0, 0x9180;
shl.b32 pair, pair, 4;
and.b32 pair, pair, 0x87f087f0;
mov.b32 big, 0x7b807b80;
mul.bf16x2 $0, pair, big;
}""")

_E4M3_TO_F16 = tl.constexpr("""{
.reg .b32 pair, big;
cvt.u32.u16 pair, $1;
prmt.b32 pair, pair, 0, 0x9180;
shl.b32 pair, pair, 7;
and.b32 pair, pair, 0xbf80bf80;
mov.b32 big, 0x5c005c00;
mul.f16x2 $0, pair, big;
}""")


@triton.jit
def widen(weight, dtype: tl.constexpr, HOPPER: tl.constexpr):
    """weight as ``dtype``; HOPPER: whether the device has arithmetic on pairs of 16 bits (and is no interpreter)."""
    known: tl.constexpr = weight.dtype == tl.int8 or weight.dtype == tl.float8e4nv
    if HOPPER and known and dtype == tl.bfloat16:
        code: tl.constexpr = _INT8_TO_BF16 if weight.dtype == tl.int8 else _E4M3_TO_BF16
        codes = weight.to(tl.int8, bitcast=True)
        wide = tl.inline_asm_elementwise(code, "=r,h", [codes], dtype=tl.bfloat16, is_pure=True, pack=2)
    elif HOPPER and known and dtype == tl.float16:
        code: tl.constexpr = _INT8_TO_F16 if weight.dtype == tl.int8 else _E4M3_TO_F16
        codes = weight.to(tl.int8, bitcast=True)
        wide = tl.inline_asm_elementwise(code, "=r,h", [codes], dtype=tl.float16, is_pure=True, pack=2)
    else:
        wide = weight.to(dtype)
    return wide


@triton.jit
def finished(total, HOPPER: tl.constexpr):
    """``total`` (float32) itself, once the dot that makes it is done: no instruction, but its use has Triton wait.

    Triton to 3.6 lets a wgmma whose left side is in registers run on while the loop's next step writes those registers
    (github.com/triton-lang/triton/issues/9433). A 128-row tile of an int8 product came out wrong that way on an H100.
    """
    if HOPPER:
        total = tl.inline_asm_elementwise("", "=f,0", [total], dtype=tl.float32, is_pure=True, pack=1)
    return total
