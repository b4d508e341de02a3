"""IBM model 1 in both directions, trained by EM, one fold at a time over the same links.

Brown et al., "The Mathematics of Statistical Machine Translation", 1993. The two directions are trained to agree: the
count of a link is the product of its two posteriors (Liang, Taskar and Klein, "Alignment by Agreement", 2006), which
sharpens the model without more text. The empty word is the unigram distribution with a fixed share of the probability.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from corpusprep.kernels import kernel

U16 = npt.NDArray[np.uint16]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]

NULL = 0.2  # the share of the empty word


class Rows(NamedTuple):
    """Rows of token numbers, without repeats: row r is `ids[at[r]:at[r + 1]]`."""

    at: I64
    ids: I32


class Links(NamedTuple):
    """Candidate translations of tokens, and the rows in which they occur.

    An entry is a pair of a source and a target token. The entries of source token e are `starts[e]:starts[e + 1]`, by
    ascending target token. A link is an entry in a row. The links of row r are `at[r]:at[r + 1]`, with their places in
    the two sides of the row.
    """

    starts: I64
    targets: I32
    at: I64
    entry: I32
    src_place: U16
    tgt_place: U16


@kernel
def link(src: Rows, tgt: Rows, n_src: int, n_tgt: int, least: int) -> Links:
    """All pairs of tokens that occur together in at least `least` rows."""
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
    for r in range(rows):
        for k in range(src.at[r], src.at[r + 1]):
            e = src.ids[k]
            row[fill[e]] = r
            place[fill[e]] = k - src.at[r]
            fill[e] += 1
    starts = np.zeros(n_src + 1, np.int64)
    targets = np.empty(1024, np.int32)
    met = np.zeros(n_tgt, np.int32)
    seen = np.empty(n_tgt, np.int32)
    at = np.zeros(rows + 1, np.int64)
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
        kept = 0
        for s in range(n_seen):
            if met[seen[s]] >= least:
                kept += 1
        if total + kept > targets.size:
            larger = np.empty(2 * (total + kept), np.int32)
            larger[:total] = targets[:total]
            targets = larger
        for s in range(n_seen):
            if met[seen[s]] >= least:
                targets[total] = seen[s]
                total += 1
        targets[starts[e] : total].sort()
        for o in range(first[e], first[e + 1]):
            for k in range(tgt.at[row[o]], tgt.at[row[o] + 1]):
                if met[tgt.ids[k]] >= least:
                    at[row[o] + 1] += 1
        for s in range(n_seen):
            met[seen[s]] = 0
        starts[e + 1] = total
    for r in range(rows):
        at[r + 1] += at[r]
    entry = np.empty(at[rows], np.int32)
    src_place = np.empty(at[rows], np.uint16)
    tgt_place = np.empty(at[rows], np.uint16)
    cursor = at[:-1].copy()
    slot = np.full(n_tgt, -1, np.int32)
    for e in range(n_src):
        for k in range(starts[e], starts[e + 1]):
            slot[targets[k]] = k
        for o in range(first[e], first[e + 1]):
            r = row[o]
            c = cursor[r]
            for k in range(tgt.at[r], tgt.at[r + 1]):
                s = slot[tgt.ids[k]]
                if s >= 0:
                    entry[c] = s
                    src_place[c] = place[o]
                    tgt_place[c] = k - tgt.at[r]
                    c += 1
            cursor[r] = c
        for k in range(starts[e], starts[e + 1]):
            slot[targets[k]] = -1
    return Links(starts, targets[:total].copy(), at, entry, src_place, tgt_place)


@kernel
def train(
    links: Links, src: Rows, tgt: Rows, folds: I64, fold: int, src_share: F32, tgt_share: F32, rounds: int
) -> F32:
    """EM on the rows outside a fold, in single precision and in the order of the rows.

    Args:
        src_share, tgt_share: unigram probabilities of the tokens, in the rows outside the fold.

    Returns:
        float32 of shape (entries, 2): t(target | source) and t(source | target).
    """
    n = links.targets.size
    prob = np.zeros((n, 2), np.float32)
    count = np.zeros((n, 2), np.float32)
    rows = src.at.size - 1
    widest = 1
    for r in range(rows):
        widest = max(widest, src.at[r + 1] - src.at[r], tgt.at[r + 1] - tgt.at[r])
    sum_s, sum_t = np.empty(widest, np.float32), np.empty(widest, np.float32)
    one = np.float32(1.0)
    for step in range(rounds + 1):
        count[:] = 0
        for r in range(rows):
            if folds[r] == fold:
                continue
            ls, lt = src.at[r + 1] - src.at[r], tgt.at[r + 1] - tgt.at[r]
            if ls == 0 or lt == 0:
                continue
            lo, hi = links.at[r], links.at[r + 1]
            if step == 0:  # number of co-occurrences, weighted less in long rows
                for k in range(lo, hi):
                    count[links.entry[k], 0] += one / np.float32(ls)
                    count[links.entry[k], 1] += one / np.float32(lt)
                continue
            to_t, to_s = np.float32((1.0 - NULL) / ls), np.float32((1.0 - NULL) / lt)
            for i in range(ls):
                sum_s[i] = np.float32(NULL) * src_share[src.ids[src.at[r] + i]] / to_s
            for j in range(lt):
                sum_t[j] = np.float32(NULL) * tgt_share[tgt.ids[tgt.at[r] + j]] / to_t
            for k in range(lo, hi):
                e = links.entry[k]
                sum_t[links.tgt_place[k]] += prob[e, 0]
                sum_s[links.src_place[k]] += prob[e, 1]
            for i in range(ls):
                sum_s[i] = one / max(sum_s[i], np.float32(1e-30))
            for j in range(lt):
                sum_t[j] = one / max(sum_t[j], np.float32(1e-30))
            for k in range(lo, hi):
                e = links.entry[k]
                count[e, 0] += prob[e, 0] * sum_t[links.tgt_place[k]] * prob[e, 1] * sum_s[links.src_place[k]]
        all_s = np.zeros(src_share.size, np.float32)
        all_t = np.zeros(tgt_share.size, np.float32)
        for e in range(src_share.size):
            for k in range(links.starts[e], links.starts[e + 1]):
                if step > 0:
                    count[k, 1] = count[k, 0]
                all_s[e] += count[k, 0]
                all_t[links.targets[k]] += count[k, 1]
        for e in range(src_share.size):
            for k in range(links.starts[e], links.starts[e + 1]):
                prob[k, 0] = count[k, 0] / max(all_s[e], np.float32(1e-20))
                prob[k, 1] = count[k, 1] / max(all_t[links.targets[k]], np.float32(1e-20))
    return prob
