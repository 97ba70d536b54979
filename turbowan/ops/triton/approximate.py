"""Functions as the hardware approximates them, in one instruction: Triton's own spend up to four more on results or
divisors that float32 can only hold as subnormal numbers."""

import triton
import triton.language as tl

from .rounding import COMPILED


@triton.jit
def power_of_two(x):
    """2^x to about 2 units in the last place; 0 below 2^-126."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def reciprocal(x):
    """1 / x to 1 unit in the last place; 0 from 2^126 on."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x
