"""Triton kernels for GPUs: the steps between the matrix products of the comet scorer's encoder, with as few passes over
memory as possible.

Sentences are short. Attention kernels for long texts spend most of their time beyond the end of a sentence. Here a
program processes one row and head, in blocks not much larger than the batch's longest row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(x, y, weight, bias, out, size, epsilon, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    at = row * size + column
    value = tl.load(x + at, mask=inside, other=0).to(tl.float32) + tl.load(y + at, mask=inside, other=0).to(tl.float32)
    mean = tl.sum(value, 0) / size
    value = tl.where(inside, value - mean, 0)
    deviation = tl.sqrt(tl.sum(value * value, 0) / size + epsilon)
    scale = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, value / deviation * scale + shift, mask=inside)


def add_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """The layer norm of x + y, (n, size) each, contiguous; weight and bias are (size,). It is computed in float32, with
    one row per program, so that the bits of a row do not depend on its neighbours."""
    rows, size = x.shape
    out = torch.empty_like(x)
    if rows:
        block = triton.next_power_of_2(size)
        _add_norm[(rows,)](x, y, weight, bias, out, size, epsilon, BLOCK=block, num_warps=4 if block <= 1024 else 8)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _attention(  # type: ignore[no-untyped-def]
    query, key, value, out, query_bounds, bounds, query_stride, key_stride, value_stride, out_stride, scale,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(query_bounds + row).to(tl.int64)
    asking = tl.load(query_bounds + row + 1) - first
    begin = tl.load(bounds + row).to(tl.int64)
    length = (tl.load(bounds + row + 1) - begin).to(tl.int32)
    m = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)
    if tl.program_id(2) * QUERIES < asking:
        d = tl.arange(0, WIDTH)
        there = (m < asking)[:, None] & (d < SIZE)[None, :]
        column = head * SIZE + d
        q = tl.load(query + (first + m)[:, None] * query_stride + column[None, :], mask=there, other=0)
        most = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        found = tl.zeros([QUERIES, WIDTH], tl.float32)
        for start in range(0, length, KEYS):
            n = start + tl.arange(0, KEYS)
            inside = (n < length)[:, None] & (d < SIZE)[None, :]
            k = tl.load(key + (begin + n)[:, None] * key_stride + column[None, :], mask=inside, other=0)
            v = tl.load(value + (begin + n)[:, None] * value_stride + column[None, :], mask=inside, other=0)
            scores = tl.where((n < length)[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
            higher = tl.maximum(most, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
            shrunk = tl.exp2(most - higher)
            total = total * shrunk + tl.sum(weights, 1)
            found = found * shrunk[:, None] + tl.dot(weights.to(v.dtype), v)
            most = higher
        at = (first + m)[:, None] * out_stride + column[None, :]
        tl.store(out + at, (found / total[:, None]).to(out.dtype.element_ty), mask=there)


def attention(
    query: Tensor, key: Tensor, value: Tensor, query_bounds: Tensor, bounds: Tensor, asking: int, longest: int
) -> Tensor:
    """Attention within each of n concatenated rows, over all tokens of the row.

    Args:
        query: (queries, heads, size), the last two contiguous.
        key, value: (t, heads, size), likewise.
        query_bounds, bounds: int32 (n + 1,), the start of each row's queries and tokens, and the end of the last row's.
        asking, longest: maximum number of queries and of tokens of a row.

    Returns:
        (queries, heads, size).
    """
    _, heads, size = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    queries, keys, warps, stages = _blocks(asking, longest)
    _attention[(len(bounds) - 1, heads, triton.cdiv(asking, queries))](
        query, key, value, out, query_bounds, bounds, query.stride(0), key.stride(0), value.stride(0), out.stride(0),
        size**-0.5 * 1.4426950408889634, SIZE=size, WIDTH=max(triton.next_power_of_2(size), 16), QUERIES=queries, KEYS=keys,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _blocks(asking: int, longest: int) -> tuple[int, int, int, int]:
    """Queries and keys of a block, warps, and stages of the pipeline: the fastest values on an H100."""
    queries, keys = max(triton.next_power_of_2(asking), 16), max(triton.next_power_of_2(longest), 16)
    if queries <= 32:
        return queries, min(keys, 64), 2, 1 if keys <= 64 else 2
    if queries <= 64:
        return queries, min(keys, 64), 4, 1 if keys <= 64 else 2
    return 128, 64, 8, 2


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU of a linear layer, in the tanh approximation, which cuBLAS computes at the end of the product. The
    difference from exact GELU is below the rounding of bfloat16."""
    found: Tensor = torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return found


def check(like: Tensor, heads: int) -> None:
    """Compiles and runs each kernel in each of its possible shapes. Raises the error of Triton if this fails."""
    size = like.shape[1]
    some = torch.zeros((512, size), dtype=like.dtype, device=like.device)
    add_norm(some, some, some[0], some[0], 1e-5)
    if like.dtype == torch.bfloat16:
        apart = some.view(512, heads, -1)
        for asking, longest in ((1, 16), (1, 32), (1, 64), (1, 512), (16, 16), (32, 32), (64, 64), (512, 512)):
            asked, bounds = (torch.tensor([0, end], dtype=torch.int32, device=like.device) for end in (asking, longest))
            attention(apart[:asking], apart, apart, asked, bounds, asking, longest)
        linear_gelu(some, some.new_zeros((8, size)), some.new_zeros(8))
    torch.cuda.synchronize(like.device)
