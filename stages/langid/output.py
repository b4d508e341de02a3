"""The model's output layer as Numba kernels: the most probable label, and the probabilities of all labels."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from corpusprep.kernels import kernel
from corpusprep.stages.langid.features import ONE_VS_ALL, SOFTMAX

Bools = npt.NDArray[np.bool_]
I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

# fastText adds this to each probability before it takes the logarithm, so its reported values include it.
_SHIFT = 1e-5
_GRID = np.arange(513, dtype=np.float32) * np.float32(16) / np.float32(512) - np.float32(8)
_SIGMOID = (1.0 / (1.0 + np.exp(-_GRID).astype(np.float64))).astype(np.float32)
_MAGIC = 6755399441055744.0  # 1.5 * 2**52: adding it rounds to an integer in the low bits
_PER_LOG = 1.4426950408889634  # 1 / log(2)
_LOG, _LOG_HIGH, _LOG_LOW = 0.6931471805599453, 0.6931471805582987, 1.6465949582897082e-12  # log(2) = high + low
_C2, _C3, _C4, _C5, _C6, _C7, _C8, _C9, _C10, _C11, _C12, _C13 = (1 / math.factorial(k) for k in range(2, 14))


@kernel(leaf=True)
def products(matrix: F32, hidden: F32, x: F32, size: int) -> None:
    """x = hidden @ matrix for the first `size` columns, each added up in the order of the rows, as in fastText.
    Written so that it compiles to vector instructions."""
    for k in range(size):
        x[k] = 0
    whole = hidden.size & ~7
    for j in range(0, whole, 8):
        for k in range(size):
            total = x[k]
            for i in range(8):
                total += matrix[j + i, k] * hidden[j + i]
            x[k] = total
    for j in range(whole, hidden.size):
        for k in range(size):
            x[k] += matrix[j, k] * hidden[j]


@kernel(leaf=True)
def _powers_of_two(x: F32, size: int, turns: F64, powers: F64) -> None:
    """turns = x / log(2) rounded to integers and offset by _MAGIC, powers = 2**turns, where exp(x) is a float32."""
    turn_bits, power_bits = turns.view(np.int64), powers.view(np.int64)
    for k in range(size):
        turns[k] = min(max(np.float64(x[k]), np.float64(-104)), np.float64(89)) * _PER_LOG + _MAGIC
    for k in range(size):
        power_bits[k] = (turn_bits[k] + 1023) << 52


@kernel(leaf=True, error_model="numpy")
def _sigmoids(x: F32, size: int, turns: F64, powers: F64, out: F32) -> None:
    """out = 1 / (1 + exp(-x)), the same for every float32 as with `math.exp`, in vector instructions."""
    for k in range(size):
        x[k] = -x[k]
    _powers_of_two(x, size, turns, powers)
    for k in range(size):
        n = turns[k] - _MAGIC
        r = (min(max(np.float64(x[k]), np.float64(-104)), np.float64(89)) - n * _LOG_HIGH) - n * _LOG_LOW
        s = (((((_C13 * r + _C12) * r + _C11) * r + _C10) * r + _C9) * r + _C8) * r + _C7
        s = ((((s * r + _C6) * r + _C5) * r + _C4) * r + _C3) * r + _C2
        e = np.float32((1.0 + (r + r * r * s)) * powers[k])
        f = np.float32(1.0 / (1.0 + np.float64(e)))
        out[k] = f if x[k] == x[k] else x[k]  # NaN


@kernel(leaf=True)
def _exponentials(x: F32, turns: F64, powers: F64, out: F32) -> None:
    """out = exp(x), correctly rounded except in rare cases, in vector instructions."""
    _powers_of_two(x, x.size, turns, powers)
    for k in range(x.size):
        r = min(max(np.float64(x[k]), np.float64(-104)), np.float64(89)) - (turns[k] - _MAGIC) * _LOG
        s = (((_C9 * r + _C8) * r + _C7) * r + _C6) * r + _C5
        s = (((s * r + _C4) * r + _C3) * r + _C2) * r + 1.0
        out[k] = (1.0 + r * s) * powers[k]


@kernel(leaf=True, error_model="numpy")
def probabilities(loss: int, left: I32, right: I32, x: F32, e: F32, turns: F64, powers: F64, out: F64) -> None:
    """out[i] = the probability of label i as fastText reports it, from the products `x`, which are overwritten. The
    second half of `out` is room for the inner nodes of the tree."""
    if loss == ONE_VS_ALL:
        for k in range(x.size):
            if x[k] < np.float32(-8):
                out[k] = _SHIFT
            elif x[k] > np.float32(8):
                out[k] = 1.0 + _SHIFT
            else:
                out[k] = _SIGMOID[int((x[k] + np.float32(8)) * np.float32(32))] + _SHIFT
    elif loss == SOFTMAX:
        top = x[0]
        for k in range(x.size):
            top = max(top, x[k])
        for k in range(x.size):
            x[k] -= top
        _exponentials(x, turns, powers, e)
        total = np.float32(0)
        for k in range(x.size):
            total += e[k]
        for k in range(x.size):
            out[k] = np.float32(e[k] / total) + _SHIFT
    else:
        for k in range(x.size):
            x[k] = -x[k]
        _exponentials(x, turns, powers, e)
        for k in range(x.size):
            e[k] = np.float32(1.0 / (1.0 + np.float64(e[k])))
        labels = left.size + 1
        out[2 * labels - 2] = 1.0
        for k in range(left.size - 1, -1, -1):
            p = out[labels + k]
            out[left[k]] = p * (np.float64(np.float32(1.0 - np.float64(e[k]))) + _SHIFT)
            out[right[k]] = p * (np.float64(e[k]) + _SHIFT)


@kernel(leaf=True, error_model="numpy")
def descend(left: I32, right: I32, x: F32, stack: I32, stack_p: F64) -> tuple[int, float]:
    """The most probable label of the tree and its probability, from the products `x` of the inner nodes. Branches that
    cannot contain it are skipped."""
    labels = left.size + 1
    best, best_p = 0, 0.0
    stack[0], stack_p[0], depth = 2 * labels - 2, 1.0, 1
    while depth:
        depth -= 1
        node, p = stack[depth], stack_p[depth]
        if p < best_p:
            continue
        if node < labels:
            best, best_p = node, p
            continue
        f = np.float32(1.0 / (1.0 + np.float64(np.float32(math.exp(-np.float64(x[node - labels]))))))
        p_left = p * (np.float64(np.float32(1.0 - np.float64(f))) + _SHIFT)
        p_right = p * (np.float64(f) + _SHIFT)
        second = 1 if p_left > p_right else 0  # the more probable one is popped first
        stack[depth + second], stack_p[depth + second] = left[node - labels], p_left
        stack[depth + 1 - second], stack_p[depth + 1 - second] = right[node - labels], p_right
        depth += 2
    return best, best_p


@kernel(leaf=True)
def find_path(left: I32, right: I32, label: int, nodes: I32, rights: Bools) -> int:
    """Sets `nodes` to the inner nodes between the root and a label, from the label upwards, and `rights` to the turns
    there. Returns their number."""
    labels = left.size + 1
    depth, node = 0, label
    for k in range(left.size):  # a node is numbered after its children
        if left[k] == node or right[k] == node:
            nodes[depth] = k
            rights[depth] = right[k] == node
            node = labels + k
            depth += 1
    return depth


@kernel(leaf=True)
def follow_path(
    weights: F32,
    nodes: I32,
    rights: Bools,
    depth: int,
    across: F32,
    x: F32,
    f: F32,
    turns: F64,
    powers: F64,
    p: F64,
    side: F64,
    lead: F64,
) -> None:
    """p = the probability of the label at the path's end for each column of `across`, if `descend` would go straight
    there and then skip all other branches; else -1."""
    lines = across.shape[1]
    whole = across.shape[0] & ~7
    for t in range(depth):
        node, at = nodes[t], t * lines
        for k in range(lines):
            x[at + k] = 0
        for j in range(0, whole, 8):
            for k in range(lines):
                total = x[at + k]
                for i in range(8):
                    total += weights[j + i, node] * across[j + i, k]
                x[at + k] = total
        for j in range(whole, across.shape[0]):
            for k in range(lines):
                x[at + k] += weights[j, node] * across[j, k]
    _sigmoids(x, depth * lines, turns, powers, f)
    for k in range(lines):
        p[k], side[k], lead[k] = 1.0, 0.0, 1.0
    for t in range(depth - 1, -1, -1):
        at, to_right = t * lines, rights[t]
        for k in range(lines):
            right = np.float64(f[at + k]) + _SHIFT
            left = np.float64(np.float32(1.0 - np.float64(f[at + k]))) + _SHIFT
            other = p[k] * (left if to_right else right)
            p[k] *= right if to_right else left
            side[k] = max(side[k], other)
            lead[k] = min(lead[k], p[k] - other)
    for k in range(lines):
        p[k] = p[k] if lead[k] > 0 and side[k] < p[k] else -1.0
