"""IBM model 1 in both directions by EM, for all folds over one set of links (Brown et al., 1993)."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]


@numba.njit(cache=True, nogil=True)
def link_rows(
    src_at: I64, src_ids: I32, tgt_at: I64, tgt_ids: I32, n_src: int, n_tgt: int, min_links: int
) -> tuple[I64, I32, I32, I64]:
    """The pairs of tokens that stand in one row together.

    Args:
        src_at, src_ids: tokens of row r are `src_ids[src_at[r]:src_at[r + 1]]`, each once.
        tgt_at, tgt_ids: likewise the target side.
        min_links: pairs that meet in fewer rows have no entry.

    Returns:
        starts (n_src + 1): entries of source token e are `starts[e]:starts[e + 1]`; targets: the target token of an entry,
        ascending within e; links: for row r, source i, target j the entry, or -1, at `at[r] + i * len_tgt + j`; at.
    """
    rows = src_at.size - 1
    at = np.zeros(rows + 1, np.int64)
    for r in range(rows):
        at[r + 1] = at[r] + (src_at[r + 1] - src_at[r]) * (tgt_at[r + 1] - tgt_at[r])
    links = np.full(at[rows], -1, np.int32)
    # Where each source token occurs.
    where = np.zeros(n_src + 1, np.int64)
    for k in range(src_ids.size):
        where[src_ids[k] + 1] += 1
    for e in range(n_src):
        where[e + 1] += where[e]
    fill = where[:-1].copy()
    row_of = np.empty(src_ids.size, np.int32)
    place = np.empty(src_ids.size, np.int32)
    for r in range(rows):
        for k in range(src_at[r], src_at[r + 1]):
            e = src_ids[k]
            row_of[fill[e]] = r
            place[fill[e]] = k - src_at[r]
            fill[e] += 1
    starts = np.zeros(n_src + 1, np.int64)
    met = np.zeros(n_tgt, np.int32)
    slot = np.full(n_tgt, -1, np.int32)
    seen = np.empty(n_tgt, np.int32)
    targets = np.empty(1024, np.int32)
    total = 0
    for e in range(n_src):
        n_seen = 0
        for o in range(where[e], where[e + 1]):
            r = row_of[o]
            for k in range(tgt_at[r], tgt_at[r + 1]):
                f = tgt_ids[k]
                if met[f] == 0:
                    seen[n_seen] = f
                    n_seen += 1
                met[f] += 1
        some = np.sort(seen[:n_seen])
        if total + n_seen > targets.size:
            larger = np.empty(max(2 * targets.size, total + n_seen), np.int32)
            larger[:total] = targets[:total]
            targets = larger
        for s in range(n_seen):
            f = some[s]
            if met[f] >= min_links:
                targets[total] = f
                slot[f] = total
                total += 1
        for o in range(where[e], where[e + 1]):
            r = row_of[o]
            base = at[r] + np.int64(place[o]) * (tgt_at[r + 1] - tgt_at[r])
            for k in range(tgt_at[r], tgt_at[r + 1]):
                links[base + k - tgt_at[r]] = slot[tgt_ids[k]]
        for s in range(n_seen):
            met[some[s]] = 0
            slot[some[s]] = -1
        starts[e + 1] = total
    return starts, targets[:total].copy(), links, at


@numba.njit(cache=True, nogil=True)
def expect(
    folds: U8,
    fold: int,
    src_at: I64,
    src_ids: I32,
    tgt_at: I64,
    tgt_ids: I32,
    links: I32,
    at: I64,
    owner: I32,
    targets: I32,
    src_share: F32,
    tgt_share: F32,
    null: float,
    rounds: int,
    agree: bool,
    prior: float,
) -> tuple[F32, F32]:
    """EM on the rows outside `fold`; returns t(target | source) and t(source | target) of every entry."""
    n = targets.size
    forward = np.zeros(n, np.float32)
    back = np.zeros(n, np.float32)
    count_f = np.zeros(n, np.float32)
    count_b = np.zeros(n, np.float32)
    sum_e = np.empty(src_share.size, np.float32)
    sum_f = np.empty(tgt_share.size, np.float32)
    rows = src_at.size - 1
    for step in range(rounds + 1):
        count_f[:] = 0
        count_b[:] = 0
        for r in range(rows):
            if folds[r] == fold:
                continue
            ls = src_at[r + 1] - src_at[r]
            lt = tgt_at[r + 1] - tgt_at[r]
            if ls == 0 or lt == 0:
                continue
            base = at[r]
            if step == 0:  # how often they meet, each row counting one
                for k in range(base, base + ls * lt):
                    if links[k] >= 0:
                        count_f[links[k]] += np.float32(1.0) / np.float32(ls)
                        count_b[links[k]] += np.float32(1.0) / np.float32(lt)
                continue
            wf = np.float32((1.0 - null) / ls)
            wb = np.float32((1.0 - null) / lt)
            den_b = np.empty(ls, np.float32)
            for i in range(ls):
                d = np.float32(0.0)
                for j in range(lt):
                    k = links[base + i * lt + j]
                    if k >= 0:
                        d += back[k]
                den_b[i] = np.float32(null) * src_share[src_ids[src_at[r] + i]] + wb * d
            for j in range(lt):
                d = np.float32(0.0)
                for i in range(ls):
                    k = links[base + i * lt + j]
                    if k >= 0:
                        d += forward[k]
                d = np.float32(null) * tgt_share[tgt_ids[tgt_at[r] + j]] + wf * d
                for i in range(ls):
                    k = links[base + i * lt + j]
                    if k >= 0:
                        pf = wf * forward[k] / d
                        pb = wb * back[k] / den_b[i]
                        if agree:
                            p = pf * pb
                            count_f[k] += p
                            count_b[k] += p
                        else:
                            count_f[k] += pf
                            count_b[k] += pb
        sum_e[:] = prior
        sum_f[:] = prior
        for k in range(n):
            sum_e[owner[k]] += count_f[k]
            sum_f[targets[k]] += count_b[k]
        for k in range(n):
            forward[k] = count_f[k] / max(sum_e[owner[k]], np.float32(1e-20))
            back[k] = count_b[k] / max(sum_f[targets[k]], np.float32(1e-20))
    return forward, back
