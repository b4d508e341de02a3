from __future__ import annotations

import numba
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from corpusprep.stages import bits

WORDS = st.integers(0, 2**64 - 1) | st.integers(0, 63).map(lambda k: 1 << k) | st.just(0)


@numba.njit
def counted(word: np.uint64) -> tuple[int, int, int]:
    return bits.popcount(word), bits.leading_zeros(word), bits.trailing_zeros(word)


@numba.njit
def loaded(data: np.ndarray, i: int) -> np.uint64:
    return bits.load64(data, i)


@numba.njit
def equal(word: np.uint64, byte: int) -> np.uint64:
    return bits.bytes_equal(word, byte)


@numba.njit
def copied(to: np.ndarray, at: int, data: np.ndarray, start: int, size: int) -> None:
    bits.copy_bytes(to, at, data, start, size)


@given(WORDS)
def test_bits_of_a_word(word: int) -> None:
    low = (word & -word).bit_length() - 1 if word else 64
    assert counted(np.uint64(word)) == (word.bit_count(), 64 - word.bit_length(), low)


@given(st.binary(min_size=8, max_size=30), st.data())
def test_eight_bytes_are_loaded(text: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(text) - 8))
    assert loaded(np.frombuffer(text, np.uint8), at) == int.from_bytes(text[at : at + 8], "little")


@given(st.lists(st.sampled_from([0, 1, 31, 32, 33, 127, 128, 160, 255]), min_size=8, max_size=8))
def test_the_lowest_byte_that_is_equal_is_marked(text: list[int]) -> None:
    found = equal(np.uint64(int.from_bytes(bytes(text), "little")), 32) & np.uint64(bits.TOPS)
    first = text.index(32) if 32 in text else None
    assert first == (None if found == 0 else counted(found)[2] // 8)


@given(st.binary(max_size=40), st.data())
def test_bytes_are_copied(text: bytes, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)))
    size = data.draw(st.integers(0, len(text) - start))
    at = data.draw(st.integers(0, 5))
    to = np.full(50, 7, np.uint8)
    copied(to, at, np.frombuffer(text, np.uint8), start, size)
    assert to.tobytes() == b"\7" * at + text[start : start + size] + b"\7" * (50 - at - size)
