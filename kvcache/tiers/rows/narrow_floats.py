"""Between the dtypes of KV and float32, in numpy, which has no bfloat16."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


LARGEST = {"float32": np.float32(3.4028e38), "float16": np.float32(65504), "bfloat16": np.float32(3.3895314e38)}
"""Of each dtype; of float32 a little less, so that what is rounded up from there is finite."""
_HALF_SHIFT = 13
"""float16's mantissa is so many bits shorter than float32's,"""
_HALF_BIAS = np.float32(2.0**112)
"""and its exponents count from 15 instead of 127. (numpy's own conversions take five times as long.)"""


def widened(data: Bytes, dtype: str) -> Floats:
    """`data`, whose last axis is bytes of numbers of this dtype, as float32; a view where it is that already. What is
    not finite is above LARGEST then, or is not a number."""
    if dtype == "float32":
        return data.view(np.float32)
    if dtype == "bfloat16":
        wide = data.view(np.uint16).astype(np.uint32)
        wide <<= 16  # bfloat16 is the upper half of float32
        return wide.view(np.float32)
    assert dtype == "float16"
    bits = data.view(np.int16).astype(np.int32)
    bits <<= _HALF_SHIFT
    bits &= np.int32(~0x7000_0000)  # the copies of the sign in the exponent's place
    numbers = bits.view(np.float32)
    numbers *= _HALF_BIAS
    return numbers


def narrow(numbers: Floats, data: Bytes, dtype: str) -> None:
    """Numbers up to LARGEST, each rounded to the nearest of this dtype, into `data`. (In the subnormals of float16 that
    is, for what lies all but half-way between two, either of them.)"""
    if dtype == "float32":
        data.view(np.float32)[...] = numbers
    elif dtype == "bfloat16":
        data.view(np.uint16)[...] = _rounded(numbers.view(np.uint32), 16)
    else:
        assert dtype == "float16"
        magnitude = _rounded((numbers * (1 / _HALF_BIAS)).view(np.uint32), _HALF_SHIFT).astype(np.uint16)
        magnitude &= 0x7FFF
        sign = numbers.view(np.uint32) >> 16
        sign &= 0x8000
        np.bitwise_or(magnitude, sign.astype(np.uint16), out=data.view(np.uint16))


def _rounded(bits: NDArray[np.uint32], dropped: int) -> NDArray[np.uint32]:
    """Without so many of the lowest bits, to the nearest; to the even one where two are as near."""
    kept: NDArray[np.uint32] = bits >> np.uint32(dropped)
    kept &= 1
    kept += bits
    kept += (1 << (dropped - 1)) - 1
    kept >>= dropped
    return kept
