"""Operations for kernels that Numba does not have: bits of a word, text eight bytes at a time, copies of bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from corpusprep.kernels import kernel

ONES = 0x0101010101010101
"""One in each byte of a word."""
TOPS = 0x8080808080808080
"""The highest bit of each byte of a word."""


def _popcount(typing: Any, value: Any) -> Any:
    """Number of set bits, as the processor's own instruction."""
    return types.int64(types.uint64), lambda context, builder, signature, args: builder.ctpop(args[0])


def _trailing_zeros(typing: Any, value: Any) -> Any:
    """The place of the lowest set bit; 64 if there is none."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], context.get_constant(types.boolean, False))

    return types.int64(types.uint64), generate


def _leading_zeros(typing: Any, value: Any) -> Any:
    """The number of bits above the highest set bit; 64 if there is none."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctlz(args[0], context.get_constant(types.boolean, False))

    return types.int64(types.uint64), generate


def _copy_bytes(typing: Any, to: Any, at: Any, data: Any, start: Any, size: Any) -> Any:
    """`to[at:at + size] = data[start:start + size]` for arrays of bytes that do not overlap. Of the plain form the compiler makes a
    loop over single bytes, which takes ten times as long."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointers = [
            builder.gep(context.make_array(signature.args[k])(context, builder, args[k]).data, [args[k + 1]])
            for k in (0, 2)
        ]
        copy: Any = cgutils.raw_memcpy
        copy(builder, pointers[0], pointers[1], args[4], 1)
        return context.get_dummy_value()

    return types.void(to, types.int64, data, types.int64, types.int64), generate


copy_bytes: Any = intrinsic(_copy_bytes)
popcount: Any = intrinsic(_popcount)
leading_zeros: Any = intrinsic(_leading_zeros)
trailing_zeros: Any = intrinsic(_trailing_zeros)


@kernel(inline="always", leaf=True)
def load64(data: npt.NDArray[np.uint8], i: int) -> np.uint64:
    """`data[i:i + 8]` as one word, the first byte lowest: a single load, because unsigned indices need no test for negative
    ones."""
    at = np.uint64(i)
    word = np.uint64(data[at])
    for k in range(1, 8):
        word |= np.uint64(data[at + np.uint64(k)]) << np.uint64(8 * k)
    return word


@kernel(inline="always", leaf=True)
def bytes_equal(word: np.uint64, byte: int) -> np.uint64:
    """The highest bit of each byte of the word that has this value. A byte above one that has it may be marked wrongly, and
    the other bits mean nothing."""
    differs = word ^ (np.uint64(byte) * np.uint64(ONES))
    return (differs - np.uint64(ONES)) & ~differs
