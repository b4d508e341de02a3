"""IBM model 1 in both directions, trained by EM, one fold at a time over the same links.

Brown et al., "The Mathematics of Statistical Machine Translation", 1993. The two directions are trained to agree: the
count of a link is the product of its two posteriors (Liang, Taskar and Klein, "Alignment by Agreement", 2006), which
sharpens the model without more text. The empty word is the unigram distribution with a fixed share of the probability.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from corpusprep.kernels import kernel

U32 = npt.NDArray[np.uint32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
Integer = int | np.integer[Any]

NULL = 0.2  # the share of the empty word
_TINY = np.float32(1e-12)


class Rows(NamedTuple):
    """Rows of token numbers, without repeats: row r is `ids[at[r]:at[r + 1]]`."""

    at: I64
    ids: I32


class Links(NamedTuple):
    """Candidate translations of tokens, and the rows in which they occur.

    An entry is a pair of a source and a target token that occur together. Entries of more than one row come first, by ascending
    source token, and then those of one row, in the order of the rows, so that look-ups at random stay in a small part of memory.
    A link is an entry in a row. The links of row r begin at `at[r]`: those of its first source token with all its target tokens,
    then those of its second.

    Attributes:
        sources, targets: tokens of each entry.
        order: entries by ascending source token, and those of one source token in the order in which they are met.
        shared: number of entries of more than one row.
        entry: the entry of each link.
        src: the rows of the source, each with its tokens in ascending order.
        tgt: the rows of the target.
    """

    sources: I32
    targets: I32
    order: I32
    shared: int
    at: I64
    entry: U32
    src: Rows
    tgt: Rows


@kernel
def link(src: Rows, tgt: Rows, n_src: int, n_tgt: int) -> Links:
    """Numbers all pairs of tokens that occur together, and finds their rows."""
    rows = src.at.size - 1
    # The rows of each source token.
    first = np.zeros(n_src + 1, np.int64)
    for k in range(src.ids.size):
        first[src.ids[k] + 1] += 1
    for e in range(n_src):
        first[e + 1] += first[e]
    fill = first[:-1].copy()
    row = np.empty(src.ids.size, np.int32)
    at = np.zeros(rows + 1, np.int64)
    for r in range(rows):
        for k in range(src.at[r], src.at[r + 1]):
            e = src.ids[k]
            row[fill[e]] = r
            fill[e] += 1
        at[r + 1] = at[r] + (src.at[r + 1] - src.at[r]) * (tgt.at[r + 1] - tgt.at[r])
    entry = np.empty(at[rows], np.uint32)
    # Entries are numbered by source token first. A source token's links follow those of lower tokens in each row.
    times = np.empty(1 << 16, np.uint8)
    sources, targets = np.empty(times.size, np.int32), np.empty(times.size, np.int32)
    ids, cursor = np.empty(src.ids.size, np.int32), src.at[:-1].copy()
    met = np.zeros(n_tgt, np.int32)
    seen = np.empty(n_tgt, np.int32)
    total = 0
    for e in range(n_src):
        n_seen = 0
        for o in range(first[e], first[e + 1]):
            for k in range(tgt.at[row[o]], tgt.at[row[o] + 1]):
                f = tgt.ids[k]
                if met[f] == 0:
                    seen[n_seen] = f
                    n_seen += 1
                met[f] += 1
        if total + n_seen > times.size:
            size = 2 * (total + n_seen)
            times, sources, targets = _larger(times, size), _larger(sources, size), _larger(targets, size)
        for m in range(n_seen):
            f = seen[m]
            times[total + m] = min(met[f], 2)
            sources[total + m] = e
            targets[total + m] = f
            met[f] = total + m
        for o in range(first[e], first[e + 1]):
            r = row[o]
            c = at[r] + (cursor[r] - src.at[r]) * (tgt.at[r + 1] - tgt.at[r])
            for k in range(tgt.at[r], tgt.at[r + 1]):
                entry[c] = met[tgt.ids[k]]
                c += 1
            ids[cursor[r]] = e
            cursor[r] += 1
        for m in range(n_seen):
            met[seen[m]] = 0
        total += n_seen
    order = np.empty(total, np.int32)
    shared = 0
    for k in range(total):
        if times[k] > 1:
            order[k] = shared
            shared += 1
    single = shared
    for k in range(entry.size):
        if times[entry[k]] == 1:
            order[entry[k]] = single
            single += 1
        entry[k] = order[entry[k]]
    of_s, of_t = np.empty(total, np.int32), np.empty(total, np.int32)
    for k in range(total):
        of_s[order[k]], of_t[order[k]] = sources[k], targets[k]
    return Links(of_s, of_t, order, shared, at, entry, Rows(src.at, ids), tgt)


@kernel
def _larger(array: Any, size: int) -> Any:
    out = np.empty(size, array.dtype)
    out[: array.size] = array
    return out


@kernel
def train(links: Links, folds: I64, fold: int, src_share: F32, tgt_share: F32, rounds: int, prob: F32) -> None:
    """EM on the rows outside a fold, in single precision and in the order of the rows.

    Both directions have the same counts, so that a round reads and writes one number a link; the probabilities are these counts
    over their sums by token. What bounds it are the look-ups of entries of several rows; those of one row follow each other in memory.

    Args:
        src_share, tgt_share: unigram probabilities of the tokens, in the rows outside the fold.
        prob: out, (entries, 2), t(target | source) and t(source | target), in `Links.order`.
    """
    src, tgt, entry, shared = links.src, links.tgt, links.entry, np.uint64(links.shared)
    rows = src.at.size - 1
    # The entries of several rows twice, of the round before and of this round, and those of one row, which are replaced in place.
    counts = np.zeros(links.targets.size + links.shared, np.float32)
    now = np.uint64(0)
    of_s, of_t = np.zeros(src_share.size, np.float32), np.zeros(tgt_share.size, np.float32)  # 1 / sum of counts
    new_s, new_t = np.zeros(src_share.size, np.float32), np.zeros(tgt_share.size, np.float32)
    widest = 1
    for r in range(rows):
        widest = max(widest, src.at[r + 1] - src.at[r], tgt.at[r + 1] - tgt.at[r])
    sum_s, sum_t = np.empty(widest, np.float32), np.empty(widest, np.float32)
    row_s, row_t = np.empty(widest, np.float32), np.empty(widest, np.float32)
    for step in range(rounds + 1):
        before, now = now, shared - now
        counts[now : now + shared] = 0
        for r in range(rows):
            s, t, at = src.at[r], tgt.at[r], links.at[r]
            ls, lt = src.at[r + 1] - s, tgt.at[r + 1] - t
            if folds[r] == fold or ls == 0 or lt == 0:
                continue
            if step == 0:  # number of co-occurrences, weighted less in long rows
                weight = np.float32(1.0) / np.sqrt(np.float32(ls * lt))
                for k in range(at, links.at[r + 1]):
                    counts[_place(entry[k], now, shared)] += weight
                sum_s[:ls] = weight * np.float32(lt)
                sum_t[:lt] = weight * np.float32(ls)
            else:
                null_s = np.float32(NULL / (1.0 - NULL)) * np.float32(lt)
                null_t = np.float32(NULL / (1.0 - NULL)) * np.float32(ls)
                for i in range(ls):
                    row_s[i], sum_s[i] = of_s[src.ids[s + i]], null_s * src_share[src.ids[s + i]]
                for j in range(lt):
                    row_t[j], sum_t[j] = of_t[tgt.ids[t + j]], null_t * tgt_share[tgt.ids[t + j]]
                _expect(entry, at, ls, lt, counts, before, shared, row_s, row_t, sum_s, sum_t)
                for i in range(ls):
                    row_s[i] /= max(sum_s[i], _TINY)
                for j in range(lt):
                    row_t[j] /= max(sum_t[j], _TINY)
                _maximise(entry, at, ls, lt, counts, before, now, shared, row_s, row_t, sum_s, sum_t)
            for i in range(ls):
                new_s[src.ids[s + i]] += sum_s[i]
            for j in range(lt):
                new_t[tgt.ids[t + j]] += sum_t[j]
        _invert(new_s, of_s)
        _invert(new_t, of_t)
    for k in range(links.order.size):
        e = links.order[k]
        c = counts[_place(e, now, shared)]
        prob[k, 0] = c * of_s[links.sources[e]]
        prob[k, 1] = c * of_t[links.targets[e]]


@kernel(forceinline=True, leaf=True)
def _place(entry: Integer, begin: np.uint64, shared: np.uint64) -> np.uint64:
    """Where the count of an entry is, with those of several rows from `begin` on. Unsigned indices need no test for negative ones."""
    return np.uint64(entry) + (begin if np.uint64(entry) < shared else shared)


@kernel(leaf=True)
def _expect(
    entry: U32, at: int, ls: int, lt: int, counts: F32, before: np.uint64, shared: np.uint64, row_s: F32, row_t: F32, sum_s: F32, sum_t: F32
) -> None:  # fmt: skip
    """Adds the probabilities of a row's links up, by source and by target token."""
    k = np.uint64(at)
    for i in range(ls):
        of, total = row_s[i], sum_s[i]
        for j in range(lt):
            c = counts[_place(entry[k], before, shared)]
            total += c * row_t[np.uint64(j)]
            sum_t[np.uint64(j)] += c * of
            k += np.uint64(1)
        sum_s[i] = total


@kernel(leaf=True)
def _maximise(
    entry: U32, at: int, ls: int, lt: int, counts: F32, before: np.uint64, now: np.uint64, shared: np.uint64,
    row_s: F32, row_t: F32, sum_s: F32, sum_t: F32,
) -> None:  # fmt: skip
    """Adds the counts of a row's links, the product of both posteriors, to the entries, and up by source and by target token."""
    sum_t[:lt] = 0
    k = np.uint64(at)
    for i in range(ls):
        of, total = row_s[i], np.float32(0)
        for j in range(lt):
            number = entry[k]
            c = counts[_place(number, before, shared)]
            c = c * of * (c * row_t[np.uint64(j)])
            to = _place(number, now, shared)
            counts[to] = c + np.float32(np.uint64(number) < shared) * counts[to]
            total += c
            sum_t[np.uint64(j)] += c
            k += np.uint64(1)
        sum_s[i] = total


@kernel(leaf=True)
def _invert(sums: F32, out: F32) -> None:
    """1 / sum, or 0; the sums become 0."""
    for k in range(sums.size):
        out[k] = np.float32(1.0) / sums[k] if sums[k] > _TINY else np.float32(0)
        sums[k] = np.float32(0)
