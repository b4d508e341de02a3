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

U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]

NULL = 0.2  # the share of the empty word
_TINY = np.float32(1e-12)


class Rows(NamedTuple):
    """Rows of token numbers, without repeats: row r is `ids[at[r]:at[r + 1]]`."""

    at: I64
    ids: I32


class Links(NamedTuple):
    """Candidate translations of tokens, and the rows in which they occur.

    An entry is a pair of a source and a target token that occur together. Entries of more than one row come first, by ascending
    source and then target token, and then those of one row, in the order of the rows, so that look-ups at random stay in a small part of memory. A
    link is an entry in a row. The links of row r are `at[r]:at[r + 1]`, with their places in the two sides of the row.

    Attributes:
        sources, targets: tokens of each entry.
        order: entries by ascending source and then target token.
    """

    sources: I32
    targets: I32
    order: I32
    at: I64
    entry: U32
    src_place: U16
    tgt_place: U16


@kernel
def link(src: Rows, tgt: Rows, n_src: int, n_tgt: int) -> Links:
    """Numbers all pairs of tokens that occur together, and finds their rows."""
    rows = src.at.size - 1
    # The rows of each source token, and its place in them.
    first = np.zeros(n_src + 1, np.int64)
    for k in range(src.ids.size):
        first[src.ids[k] + 1] += 1
    for e in range(n_src):
        first[e + 1] += first[e]
    fill = first[:-1].copy()
    row = np.empty(src.ids.size, np.int32)
    place = np.empty(src.ids.size, np.uint16)
    at = np.zeros(rows + 1, np.int64)
    for r in range(rows):
        for k in range(src.at[r], src.at[r + 1]):
            e = src.ids[k]
            row[fill[e]] = r
            place[fill[e]] = k - src.at[r]
            fill[e] += 1
        at[r + 1] = at[r] + (src.at[r + 1] - src.at[r]) * (tgt.at[r + 1] - tgt.at[r])
    entry = np.empty(at[rows], np.uint32)
    src_place, tgt_place = np.empty(at[rows], np.uint16), np.empty(at[rows], np.uint16)
    # Entries are numbered by source and target token first. A source token's links follow those of lower tokens in each row.
    times = np.empty(1 << 16, np.uint8)
    sources, targets = np.empty(times.size, np.int32), np.empty(times.size, np.int32)
    cursor = at[:-1].copy()
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
        seen[:n_seen].sort()
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
            c = cursor[row[o]]
            for k in range(tgt.at[row[o]], tgt.at[row[o] + 1]):
                entry[c] = met[tgt.ids[k]]
                src_place[c] = place[o]
                tgt_place[c] = k - tgt.at[row[o]]
                c += 1
            cursor[row[o]] = c
        for m in range(n_seen):
            met[seen[m]] = 0
        total += n_seen
    order = np.empty(total, np.int32)
    single = 0
    for k in range(total):
        if times[k] > 1:
            order[k] = single
            single += 1
    for k in range(entry.size):
        if times[entry[k]] == 1:
            order[entry[k]] = single
            single += 1
        entry[k] = order[entry[k]]
    of_s, of_t = np.empty(total, np.int32), np.empty(total, np.int32)
    for k in range(total):
        of_s[order[k]], of_t[order[k]] = sources[k], targets[k]
    return Links(of_s, of_t, order, at, entry, src_place, tgt_place)


@kernel
def _larger(array: Any, size: int) -> Any:
    out = np.empty(size, array.dtype)
    out[: array.size] = array
    return out


@kernel
def train(
    links: Links, src: Rows, tgt: Rows, folds: I64, fold: int, src_share: F32, tgt_share: F32, rounds: int, prob: F32
) -> None:
    """EM on the rows outside a fold, in single precision and in the order of the rows.

    Both directions have the same counts, so that a round reads and writes one number a link; the probabilities are these counts
    over their sums by token.

    Args:
        src_share, tgt_share: unigram probabilities of the tokens, in the rows outside the fold.
        prob: out, (entries, 2), t(target | source) and t(source | target), by ascending source and then target token.
    """
    n, rows = links.targets.size, src.at.size - 1
    count, found = np.zeros(n, np.float32), np.zeros(n, np.float32)
    of_s, of_t = np.zeros(src_share.size, np.float32), np.zeros(tgt_share.size, np.float32)  # 1 / sum of counts
    widest = 1
    for r in range(rows):
        widest = max(widest, src.at[r + 1] - src.at[r], tgt.at[r + 1] - tgt.at[r])
    sum_s, sum_t = np.empty(widest, np.float32), np.empty(widest, np.float32)
    row_s, row_t = np.empty(widest, np.float32), np.empty(widest, np.float32)
    one = np.float32(1.0)
    for step in range(rounds + 1):
        found[:] = 0
        for r in range(rows):
            if folds[r] == fold:
                continue
            s, t = src.at[r], tgt.at[r]
            ls, lt = src.at[r + 1] - s, tgt.at[r + 1] - t
            if ls == 0 or lt == 0:
                continue
            lo, hi = links.at[r], links.at[r + 1]
            if step == 0:  # number of co-occurrences, weighted less in long rows
                weight = one / np.sqrt(np.float32(ls * lt))
                for k in range(lo, hi):
                    found[links.entry[k]] += weight
                continue
            null_s = np.float32(NULL / (1.0 - NULL)) * np.float32(lt)
            null_t = np.float32(NULL / (1.0 - NULL)) * np.float32(ls)
            for i in range(ls):
                row_s[i] = of_s[src.ids[s + i]]
                sum_s[i] = null_s * src_share[src.ids[s + i]]
            for j in range(lt):
                row_t[j] = of_t[tgt.ids[t + j]]
                sum_t[j] = null_t * tgt_share[tgt.ids[t + j]]
            for k in range(lo, hi):
                c = count[links.entry[k]]
                sum_t[links.tgt_place[k]] += c * row_s[links.src_place[k]]
                sum_s[links.src_place[k]] += c * row_t[links.tgt_place[k]]
            for i in range(ls):
                row_s[i] /= max(sum_s[i], _TINY)
            for j in range(lt):
                row_t[j] /= max(sum_t[j], _TINY)
            for k in range(lo, hi):
                c = count[links.entry[k]]
                found[links.entry[k]] += c * row_s[links.src_place[k]] * (c * row_t[links.tgt_place[k]])
        of_s[:] = 0
        of_t[:] = 0
        for k in range(n):
            of_s[links.sources[k]] += found[k]
            of_t[links.targets[k]] += found[k]
        for e in range(of_s.size):
            of_s[e] = one / of_s[e] if of_s[e] > _TINY else np.float32(0)
        for f in range(of_t.size):
            of_t[f] = one / of_t[f] if of_t[f] > _TINY else np.float32(0)
        count, found = found, count
    for k in range(n):
        c = count[links.order[k]]
        prob[k, 0] = c * of_s[links.sources[links.order[k]]]
        prob[k, 1] = c * of_t[links.targets[links.order[k]]]
