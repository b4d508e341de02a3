"""The lexical scorer: is the target a translation of the source, judged by what the corpus itself teaches."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from corpusprep.arrow import hash_strings, mix64, string_buffers
from corpusprep.errors import RunError
from corpusprep.stages import _quality_text as text
from corpusprep.stages._quality_model1 import expect, link_rows

FOLDS = 5
NULL = 0.2
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

_FINE_ROWS = 10_000
_FREQS, _LIFTS = 4, 6
_HIST = 2 * 2 * _FREQS * _LIFTS
_EXTRA = 52
N_FEATURES = _HIST + _EXTRA
_SCALE = np.float32(16.0)  # a probability p is kept as round(-16 ln p), 255 standing for none


@numba.njit(cache=True, nogil=True)
def tokenise(offsets: I64, data: U8, tables: text.Tables, plan: I32) -> tuple[I64, U64, U8, U64]:
    """Distinct tokens of all rows: offsets, hashes ascending in a row, kinds, and a hash of each whole row."""
    rows = offsets.size - 1
    at = np.zeros(rows + 1, np.int64)
    room = 1024
    out = np.empty(room, np.uint64)
    out_kind = np.empty(room, np.uint8)
    whole = np.empty(rows, np.uint64)
    longest = 0
    for r in range(rows):
        longest = max(longest, offsets[r + 1] - offsets[r])
    cut = text.make_cut(longest)
    for r in range(rows):
        n = text.decode(data, offsets[r], offsets[r + 1], cut.points)
        text.scan(cut, n, tables.classes, tables.folded, tables.sounds, plan)
        n = cut.counts[text.N_TOKENS]
        whole[r] = row_hash(cut.tokens, n)
        n = distinct(cut.tokens, cut.kinds, n)
        total = at[r]
        if total + n > room:
            room = 2 * (total + n)
            larger = np.empty(room, np.uint64)
            larger[:total] = out[:total]
            out = larger
            larger_kind = np.empty(room, np.uint8)
            larger_kind[:total] = out_kind[:total]
            out_kind = larger_kind
        out[total : total + n] = cut.tokens[:n]
        out_kind[total : total + n] = cut.kinds[:n]
        at[r + 1] = total + n
    return at, out[: at[rows]].copy(), out_kind[: at[rows]].copy(), whole


@numba.njit(cache=True, nogil=True)
def row_hash(tokens: U64, n: int) -> np.uint64:
    state = np.uint64(0)
    for k in range(n):
        state = mix64(state ^ tokens[k])
    return state


@numba.njit(cache=True, nogil=True)
def distinct(tokens: U64, kinds: U8, n: int) -> int:
    """Sorts the first n tokens in place, each once; returns how many are left."""
    order = np.argsort(tokens[:n], kind="mergesort")
    some = tokens[:n][order]
    kind = kinds[:n][order]
    k = 0
    for i in range(n):
        if i == 0 or some[i] != some[i - 1]:
            tokens[k] = some[i]
            kinds[k] = kind[i]
            k += 1
    return k


@numba.njit(cache=True, nogil=True)
def make_slots(keys: U64) -> I32:
    """An open-addressing table over distinct keys: place of each key, -1 where free."""
    size = 4
    while size < 2 * keys.size:
        size *= 2
    slots = np.full(size, -1, np.int32)
    mask = np.uint64(size - 1)
    for i in range(keys.size):
        p = keys[i] & mask
        while slots[p] >= 0:
            p = (p + np.uint64(1)) & mask
        slots[p] = i
    return slots


@numba.njit(cache=True, nogil=True)
def find(key: np.uint64, keys: U64, slots: I32) -> int:
    mask = np.uint64(slots.size - 1)
    p = key & mask
    while slots[p] >= 0:
        if keys[slots[p]] == key:
            return slots[p]
        p = (p + np.uint64(1)) & mask
    return -1


class Side(NamedTuple):
    """One side's vocabulary: token hashes ascending, kinds, rows of each fold that hold the token (V, FOLDS), open-addressing slots."""

    keys: U64
    kinds: U8
    counts: I32
    slots: I32
    totals: I64
    rows: I64


class Model(NamedTuple):
    """All that a row is judged by: an array each, so that it can be stored."""

    src: Side
    tgt: Side
    starts: I64  # entries of source token e are starts[e] … starts[e + 1] - 1
    targets: I32  # the target token of an entry, ascending
    values: U8  # (entries, FOLDS, 2): t(target | source) and t(source | target), see _SCALE
    plans: I32  # (2, 7, 3): token plan of each side
    length: F64  # mean, and two terms of the variance, of the log ratio of lengths
    weights: F64  # of the logistic regression: N_FEATURES and the constant
    rows: I64  # (1,): rows learned from


@numba.njit(cache=True, nogil=True)
def _bin(llr: float) -> int:
    if llr < -1.0:
        return 0
    if llr < -0.2:
        return 1
    if llr < 0.6:
        return 2
    if llr < 1.6:
        return 3
    if llr < 2.8:
        return 4
    return 5


@numba.njit(cache=True, nogil=True)
def _freq(count: int, rows: int) -> int:
    if count > 0.03 * rows:
        return 3
    if count > 20:
        return 2
    if count > 5:
        return 1
    return 0


@numba.njit(cache=True, nogil=True)
def _matched(a: U64, na: int, b: U64, nb: int, used: U8) -> int:
    """How many of a's values are found in b, each of b's once."""
    used[:nb] = 0
    hits = 0
    for i in range(na):
        for j in range(nb):
            if used[j] == 0 and a[i] == b[j]:
                used[j] = 1
                hits += 1
                break
    return hits


@numba.njit(cache=True, nogil=True)
def _clip(cut: text.Cut, n: int, share: float) -> int:
    """Cuts n code points to a share of them; a share above 1 is that much less 1, the closing mark kept."""
    closed = share > 1
    kept = min(n, max(1, int(n * (share - 1 if closed else share))))
    if closed and kept > 0:
        cut.points[kept - 1] = cut.points[n - 1]
    return kept


@numba.njit(cache=True, nogil=True)
def _spelt_alike(a: text.Cut, b: text.Cut, x: F32) -> None:
    """How many names of a are heard in b: into x[0] those of two consonants, x[1] of three, x[2] of more, x[3] not heard."""
    for k in range(a.counts[text.N_NAMES]):
        if not a.marks[k] & text.CAPITAL:
            continue
        start, size = a.ends[k], a.ends[k + 1] - a.ends[k]
        heard = False
        for m in range(b.counts[text.N_NAMES]):
            lo, hi = b.ends[m], b.ends[m + 1]
            if b.marks[m] & text.RUN:
                if size < 3:
                    continue
                last = hi - size
            else:
                last = min(lo, hi - size)
            for at in range(lo, last + 1):
                same = True
                for q in range(size):
                    if a.sounds[start + q] != b.sounds[at + q]:
                        same = False
                        break
                if same:
                    heard = True
                    break
            if heard:
                break
        if heard:
            x[min(size, 4) - 2] += 1
        elif not a.marks[k] & text.INITIAL and size >= 3:
            x[3] += 1
    for k in range(4):
        x[k] = min(x[k], 4)


@numba.njit(cache=True, nogil=True)
def _look_up(side: Side, cut: text.Cut, n: int, fold: int, ids: I32) -> int:
    """Numbers of the known among n tokens; returns how many."""
    known = 0
    for i in range(n):
        e = find(cut.tokens[i], side.keys, side.slots)
        if e >= 0 and side.counts[e, fold] > 1:
            ids[known] = e
            known += 1
    return known


@numba.njit(cache=True, nogil=True)
def _both(a: int, b: int, x: F32) -> None:
    x[0] = 1.0 if a > 0 and b > 0 else 0.0
    x[1] = 1.0 if a > 0 and b == 0 else 0.0
    x[2] = 1.0 if b > 0 and a == 0 else 0.0


@numba.njit(cache=True, nogil=True)
def features(
    so: I64, sd: U8, to: I64, td: U8, src_row: I64, tgt_row: I64, clip: F32, fold: I64,
    tables: text.Tables, model: Model, table: F32, out: F32,
) -> None:  # fmt: skip
    """Evidence for each pair of a source row and a target row, into `out` (n, N_FEATURES)."""
    src, tgt = model.src, model.tgt
    starts, targets, values, length = model.starts, model.targets, model.values, model.length
    longest = 0
    for k in range(src_row.size):
        longest = max(longest, so[src_row[k] + 1] - so[src_row[k]], to[tgt_row[k] + 1] - to[tgt_row[k]])
    s, t = text.make_cut(longest), text.make_cut(longest)
    si, ti = np.empty(text.MAX_TOKENS, np.int32), np.empty(text.MAX_TOKENS, np.int32)
    sum_s, sum_t = np.empty(text.MAX_TOKENS, np.float32), np.empty(text.MAX_TOKENS, np.float32)
    used = np.empty(text.MAX_TOKENS, np.uint8)
    total, number = np.zeros(2), np.zeros(2)
    for r in range(src_row.size):
        ns = text.decode(sd, so[src_row[r]], so[src_row[r] + 1], s.points)
        nt = text.decode(td, to[tgt_row[r]], to[tgt_row[r] + 1], t.points)
        if clip[r] > 0:
            nt = _clip(t, nt, clip[r])
        elif clip[r] < 0:
            ns = _clip(s, ns, -clip[r])
        text.scan(s, ns, tables.classes, tables.folded, tables.sounds, model.plans[0])
        text.scan(t, nt, tables.classes, tables.folded, tables.sounds, model.plans[1])
        sc, tc = s.counts, t.counts
        g = fold[r]
        if g < 0:
            g = fold_of(row_hash(s.tokens, sc[text.N_TOKENS]), row_hash(t.tokens, tc[text.N_TOKENS]))
        ms = distinct(s.tokens, s.kinds, sc[text.N_TOKENS])
        mt = distinct(t.tokens, t.kinds, tc[text.N_TOKENS])
        ks, kt = _look_up(src, s, ms, g, si), _look_up(tgt, t, mt, g, ti)
        x = out[r]
        x[:] = 0
        sum_s[:ks] = 0
        sum_t[:kt] = 0
        for i in range(ks):
            lo0, hi0 = starts[si[i]], starts[si[i] + 1]
            for j in range(kt):
                f = ti[j]
                lo, hi = lo0, hi0
                while lo < hi:
                    mid = (lo + hi) >> 1
                    if targets[mid] < f:
                        lo = mid + 1
                    else:
                        hi = mid
                if lo < hi0 and targets[lo] == f:
                    sum_t[j] += table[values[lo, g, 0]]
                    sum_s[i] += table[values[lo, g, 1]]
        for d in range(2):
            n = ks if d == 0 else kt
            other = kt if d == 0 else ks
            ids = si if d == 0 else ti
            sums = sum_s if d == 0 else sum_t
            side = src if d == 0 else tgt
            total[:] = 0
            number[:] = 0
            for i in range(n):
                e = ids[i]
                kind = 0 if side.kinds[e] != text.PIECE else 1
                c = side.counts[e, g]
                p0 = c / side.totals[g]
                v = np.log(NULL + (1.0 - NULL) * sums[i] / (max(other, 1) * p0))
                q = _freq(c, side.rows[g])
                x[((d * 2 + kind) * _FREQS + q) * _LIFTS + _bin(v)] += 1
                total[kind] += v * (0.5 if q == 3 else 1.0)
                number[kind] += 1
            base = _HIST + 6 * d
            for kind in range(2):
                x[base + kind] = total[kind] / max(number[kind], 1.0)
                x[base + 2 + kind] = total[kind] / np.sqrt(number[kind] + 1.0)
            x[base + 4] = np.sqrt(number[0])
            x[base + 5] = (ms - ks) / max(ms, 1) if d == 0 else (mt - kt) / max(mt, 1)
        m = _HIST + 12
        # Length.
        z = np.log((tc[text.N_LETTERS] + 1.0) / (sc[text.N_LETTERS] + 1.0)) - length[0]
        z /= np.sqrt(length[1] + length[2] / (sc[text.N_LETTERS] + tc[text.N_LETTERS] + 2.0))
        x[m] = min(max(z, 0.0), 6.0)
        x[m + 1] = min(max(-z, 0.0), 6.0)
        x[m + 2] = min(max(z - 1.0, 0.0), 6.0)
        x[m + 3] = min(max(-z - 1.0, 0.0), 6.0)
        x[m + 4] = min(max(z - 2.0, 0.0), 6.0)
        x[m + 5] = min(max(-z - 2.0, 0.0), 6.0)
        m += 6
        # Numbers.
        hits = _matched(s.numbers, sc[text.N_NUMBERS], t.numbers, tc[text.N_NUMBERS], used)
        x[m] = min(hits, 3)
        x[m + 1] = min(sc[text.N_NUMBERS] - hits, 3)
        x[m + 2] = min(tc[text.N_NUMBERS] - hits, 3)
        x[m + 3] = 1.0 if sc[text.N_NUMBERS] > 0 and tc[text.N_NUMBERS] > 0 and hits == 0 else 0.0
        m += 4
        # Cognates and copies.
        nws, nwt = sc[text.N_WORDS], tc[text.N_WORDS]
        hits = _matched(s.words, nws, t.words, nwt, used)
        x[m] = min(hits, 6)
        x[m + 1] = hits / max(min(nws, nwt), 1)
        long = 0
        for i in range(nws):
            if s.sizes[i] >= 4:
                for j in range(nwt):
                    if s.stems[i] == t.stems[j] and t.sizes[j] >= 4:
                        long += 1
                        break
        x[m + 2] = min(long, 6)
        x[m + 3] = long / max(min(nws, nwt), 1)
        m += 4
        if sc[text.N_CAPITALS] >= tc[text.N_CAPITALS]:
            _spelt_alike(s, t, x[m : m + 4])
        else:
            _spelt_alike(t, s, x[m : m + 4])
        m += 4
        # Punctuation.
        _both(sc[text.QUESTIONS], tc[text.QUESTIONS], x[m : m + 3])
        _both(sc[text.EXCLAMATIONS], tc[text.EXCLAMATIONS], x[m + 3 : m + 6])
        _both(sc[text.FINAL], tc[text.FINAL], x[m + 6 : m + 9])
        _both(sc[text.QUOTES], tc[text.QUOTES], x[m + 9 : m + 12])
        _both(sc[text.BRACKETS], tc[text.BRACKETS], x[m + 12 : m + 15])
        _both(sc[text.COLONS], tc[text.COLONS], x[m + 15 : m + 18])
        x[m + 18] = min(abs(sc[text.COMMAS] - tc[text.COMMAS]), 4)
        x[m + 19] = min(sc[text.COMMAS], tc[text.COMMAS], 3)
        x[m + 20] = np.log(sc[text.N_LETTERS] + 1.0)
        x[m + 21] = np.log(tc[text.N_LETTERS] + 1.0)


@numba.njit(cache=True, nogil=True)
def fold_of(src: np.uint64, tgt: np.uint64) -> int:
    return np.int64(mix64(src ^ mix64(tgt + np.uint64(1))) % np.uint64(FOLDS))


@numba.njit(cache=True, nogil=True)
def apply(x: F32, weights: F64, out: F32) -> None:
    """Probabilities of the rows of `x`, summed in a fixed order."""
    k = x.shape[1]
    for r in range(x.shape[0]):
        odds = 1.0
        for m in range(weights.shape[0]):
            s = weights[m, k]
            for c in range(k):
                s += weights[m, c] * x[r, c]
            odds += np.exp(-min(max(s, -30.0), 30.0))
        out[r] = 1.0 / odds


@numba.njit(cache=True, nogil=True)
def _folds(a: U64, b: U64, out: I64) -> None:
    for i in range(out.size):
        out[i] = fold_of(a[i], b[i])


def _vocabulary(at: I64, hashes: U64, kinds: U8, folds: I64) -> tuple[Side, I64, I32]:
    """Vocabulary of one side, and its rows with token numbers in place of hashes, tokens seen once left out."""
    keys, first, inverse, found = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    keep = found >= 2
    ids = np.where(keep, np.cumsum(keep) - 1, -1)[inverse].astype(np.int32)
    row = np.repeat(np.arange(at.size - 1), np.diff(at))
    known = ids >= 0
    ids, row = ids[known], row[known]
    new_at = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=at.size - 1))]).astype(np.int64)
    v = int(keep.sum())
    inside = np.bincount(ids.astype(np.int64) * FOLDS + folds[row], minlength=v * FOLDS).reshape(v, FOLDS)
    counts = (inside.sum(1, keepdims=True) - inside).astype(np.int32)
    keys = np.ascontiguousarray(keys[keep])
    return _make_side(keys, np.ascontiguousarray(kinds[first][keep]), counts, folds.size - np.bincount(folds, minlength=FOLDS)), new_at, ids


def _make_side(keys: U64, kinds: U8, counts: I32, rows: npt.NDArray[np.integer]) -> Side:
    return Side(keys, kinds, counts, make_slots(keys), np.maximum(counts.sum(0), 1).astype(np.int64), rows.astype(np.int64))


def _quantise(p: F32) -> U8:
    with np.errstate(divide="ignore"):
        q = np.round(-_SCALE * np.log(p))
    return np.where(q < 255, q, 255).astype(np.uint8)


def _probabilities() -> F32:
    table = np.exp(-np.arange(256, dtype=np.float32) / _SCALE)
    table[255] = 0
    return table.astype(np.float32)


def learn(sample: pa.Table, limit: int, seed: int) -> bytes:
    """Learns from rows of one pair; see `corpusprep.stages.quality.prepare`."""
    columns = [sample[name] for name in ("src", "tgt")]
    keys = hash_strings(columns[1], hash_strings(columns[0], seed))
    order = np.argsort(keys, kind="stable")[:limit]
    src, tgt = (column.take(pa.array(order)) for column in columns)
    names = [sample[name][0].as_py() if sample.num_rows else "" for name in ("src_lang", "tgt_lang")]
    return pack(fit(string_buffers(src), string_buffers(tgt), names[0], names[1], keys[order]))


class Options(NamedTuple):
    rounds: int = 3
    agree: bool = True
    prior: float = 0.0
    min_links: int = 1
    mis: float = 0.7
    cut: float = 0.3


def fit(src_text: tuple[I64, U8], tgt_text: tuple[I64, U8], src_lang: str, tgt_lang: str, keys: U64, options: Options = Options()) -> Model:
    n = keys.size
    tables = text.tables()
    plans = np.stack([text.plan(language, n <= _FINE_ROWS) for language in (src_lang, tgt_lang)])
    src_at, src_hashes, src_kinds, src_rows = tokenise(*src_text, tables, plans[0])
    tgt_at, tgt_hashes, tgt_kinds, tgt_rows = tokenise(*tgt_text, tables, plans[1])
    folds = np.empty(n, np.int64)
    _folds(src_rows, tgt_rows, folds)
    src, src_at, src_ids = _vocabulary(src_at, src_hashes, src_kinds, folds)
    tgt, tgt_at, tgt_ids = _vocabulary(tgt_at, tgt_hashes, tgt_kinds, folds)
    starts, targets, links, at = link_rows(src_at, src_ids, tgt_at, tgt_ids, src.keys.size, tgt.keys.size, options.min_links)
    owner = np.repeat(np.arange(src.keys.size, dtype=np.int32), np.diff(starts))
    values = np.full((targets.size, FOLDS, 2), 255, np.uint8)
    for f in range(FOLDS):
        shares = [(side.counts[:, f] / side.totals[f]).astype(np.float32) for side in (src, tgt)]
        forward, back = expect(
            folds.astype(np.uint8), f, src_at, src_ids, tgt_at, tgt_ids, links, at, owner, targets, shares[0], shares[1],
            NULL, options.rounds, options.agree, options.prior,
        )  # fmt: skip
        values[:, f, 0] = _quantise(np.where(forward > 1e-4, forward, 0))
        values[:, f, 1] = _quantise(np.where(back > 1e-4, back, 0))
    live = (values < 255).any(axis=(1, 2))
    targets, values, owner = targets[live], values[live], owner[live]
    starts = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=src.keys.size))]).astype(np.int64)
    lengths = [np.diff(t[0]) for t in (src_text, tgt_text)]
    model = Model(src, tgt, starts, targets, values, plans, np.array([0.0, 1.0, 0.0]), np.zeros((2, N_FEATURES + 1)), np.array([n]))
    judge = Judge(model)
    rows = np.arange(n)
    none = np.zeros(n, np.float32)
    x = judge.features(src_text, tgt_text, rows, rows, none, folds)
    length = _fit_length(x[:, -1], x[:, -2])
    model = model._replace(length=length)
    judge = Judge(model)
    # Three kinds of row: real ones; ones against others of their fold; ones with a side cut short.
    none_wrong = [(rows, rows, none)]
    shuffled = [(rows, _others(folds, keys, by, shift), none) for by in (None, lengths[1]) for shift in (1, 2)]
    shuffled = [(p[0][p[0] != p[1]], p[1][p[0] != p[1]], p[2][p[0] != p[1]]) for p in shuffled]
    share = ((keys >> np.uint64(11)).astype(np.float64) * 2.0**-53 * 0.35 + 0.15).astype(np.float32)
    closed = share + ((keys >> np.uint64(3)) & np.uint64(1)).astype(np.float32)
    long = rows[x[:, -2] > np.log(10)]
    short = [(long, long, closed[long]), (long, long, -closed[long])]
    x0, x1, x2 = (
        judge.features(src_text, tgt_text, *(np.concatenate([p[k] for p in part]) for k in range(3)),
                       folds[np.concatenate([p[0] for p in part])])
        for part in (none_wrong, shuffled, short)
    )
    w0 = np.ones(n)
    for _ in range(2):
        weights = np.stack([_contrast(x0, w0, bad, prior) for bad, prior in ((x1, options.mis), (x2, options.cut))])
        p = np.empty(n, np.float32)
        apply(x0, weights, p)
        w0 = np.where(p < 0.1, 0.0, 1.0)
    return model._replace(weights=weights)


def _others(folds: I64, keys: U64, length: I64 | None, shift: int) -> I64:
    """For each row another of its fold: `shift` places further in the order of keys, or of lengths."""
    order = np.argsort(keys, kind="stable") if length is None else np.lexsort((keys, length))
    out = np.arange(folds.size)
    for f in range(FOLDS):
        rows = order[folds[order] == f]
        out[rows] = np.roll(rows, -shift)
    return out


def _fit_length(tgt: F32, src: F32) -> F64:
    """Mean and variance of tgt - src, both logarithms; the variance is a + b / (letters of both sides)."""
    if src.size == 0:
        return np.array([0.0, 0.1, 1.0])
    ratio = (tgt - src).astype(np.float64)
    mean = float(np.median(ratio))
    v = (ratio - mean) ** 2
    inverse = 1.0 / (np.exp(src.astype(np.float64)) + np.exp(tgt.astype(np.float64)))
    keep = v <= np.quantile(v, 0.98)
    v, inverse = v[keep], inverse[keep]
    centre = inverse.mean()
    spread = ((inverse - centre) ** 2).sum()
    slope = max(((inverse - centre) * v).sum() / spread, 0.0) if spread > 0 else 0.0
    return np.array([mean, max(v.mean() - slope * centre, 0.005), slope])


@numba.njit(cache=True, nogil=True)
def _newton(x: F32, y: F64, w: F64, ridge: float, rounds: int) -> F64:
    """Weights of a logistic regression with an unpenalised constant, by Newton steps; sums in a fixed order."""
    n, k = x.shape
    mean = np.zeros(k)
    scale = np.zeros(k)
    for r in range(n):
        for c in range(k):
            mean[c] += x[r, c]
    mean /= max(n, 1)
    for r in range(n):
        for c in range(k):
            d = x[r, c] - mean[c]
            scale[c] += d * d
    for c in range(k):
        scale[c] = 1.0 / np.sqrt(scale[c] / max(n, 1)) if scale[c] > 1e-9 * n else 0.0
    m = k + 1
    beta = np.zeros(m)
    z = np.ones(m)
    for _ in range(rounds):
        grad = np.zeros(m)
        hess = np.zeros((m, m))
        for c in range(k):
            grad[c] = -ridge * beta[c]
            hess[c, c] = ridge
        hess[k, k] = 1e-6
        for r in range(n):
            if w[r] == 0:
                continue
            s = beta[k]
            for c in range(k):
                z[c] = (x[r, c] - mean[c]) * scale[c]
                s += beta[c] * z[c]
            p = 1.0 / (1.0 + np.exp(-min(max(s, -30.0), 30.0)))
            g = w[r] * (y[r] - p)
            h = w[r] * p * (1.0 - p)
            for c in range(m):
                grad[c] += g * z[c]
                hz = h * z[c]
                if hz != 0.0:
                    for e in range(c + 1):
                        hess[c, e] += hz * z[e]
        # Cholesky, in place.
        for c in range(m):
            for e in range(c + 1):
                s = hess[c, e]
                for q in range(e):
                    s -= hess[c, q] * hess[e, q]
                hess[c, e] = np.sqrt(max(s, 1e-12)) if c == e else s / hess[e, e]
        for c in range(m):
            s = grad[c]
            for q in range(c):
                s -= hess[c, q] * grad[q]
            grad[c] = s / hess[c, c]
        for c in range(m - 1, -1, -1):
            s = grad[c]
            for q in range(c + 1, m):
                s -= hess[q, c] * grad[q]
            grad[c] = s / hess[c, c]
        step = 0.0
        for c in range(m):
            beta[c] += grad[c]
            step = max(step, abs(grad[c]))
        if step < 1e-4:
            break
    for c in range(k):
        beta[c] *= scale[c]
        beta[k] -= beta[c] * mean[c]
    return beta


def _regress(x: F32, y: F64, w: F64, ridge: float) -> F64:
    weights: F64 = _newton(x, y, w, ridge, 12)
    return weights


def _contrast(good: F32, weight: F64, bad: F32, prior: float) -> F64:
    x = np.concatenate([good, bad])
    y = np.concatenate([np.ones(len(good)), np.zeros(len(bad))])
    w = np.concatenate([weight, np.full(len(bad), prior * len(good) / max(len(bad), 1))])
    return _regress(x, y, w, 1.0)


class Judge:
    """Scores rows of one pair by a model."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._tables = text.tables()
        self._probabilities = _probabilities()

    def features(self, src: tuple[I64, U8], tgt: tuple[I64, U8], a: I64, b: I64, cut: F32, folds: I64) -> F32:
        out = np.zeros((a.size, N_FEATURES), np.float32)
        features(
            *src, *tgt, a, b, cut, folds, self._tables, self._model, self._probabilities, out,
        )  # fmt: skip
        return out

    def score(self, src: tuple[I64, U8], tgt: tuple[I64, U8]) -> F32:
        n = src[0].size - 1
        out = np.empty(n, np.float32)
        for first in range(0, n, 4096):
            rows = np.arange(first, min(first + 4096, n))
            x = self.features(src, tgt, rows, rows, np.zeros(rows.size, np.float32), np.full(rows.size, -1))
            apply(x, self._model.weights, out[first : first + rows.size])
        return out


class LexicalScorer:
    """Scores rows by what was learned of their pairs."""

    def __init__(self, states: Mapping[str, bytes]) -> None:
        self._states = states
        self._judges: dict[str, Judge] = {}

    def score(self, table: pa.Table) -> F32:
        from corpusprep.stages.quality import _pairs_of

        scores = np.full(table.num_rows, np.nan, np.float32)
        names, codes = _pairs_of(table)
        for k, name in enumerate(names):
            if not self._states.get(name):
                continue
            if name not in self._judges:
                self._judges[name] = Judge(unpack(self._states[name]))
            rows = np.flatnonzero(codes == k)
            part = table if rows.size == table.num_rows else table.take(pa.array(rows))
            scores[rows] = self._judges[name].score(string_buffers(part["src"]), string_buffers(part["tgt"]))
        return scores


_FIELDS: tuple[tuple[str, type, int], ...] = (
    ("src.keys", np.uint64, 1), ("src.kinds", np.uint8, 1), ("src.counts", np.int32, FOLDS), ("src.rows", np.int64, 1),
    ("tgt.keys", np.uint64, 1), ("tgt.kinds", np.uint8, 1), ("tgt.counts", np.int32, FOLDS), ("tgt.rows", np.int64, 1),
    ("starts", np.int64, 1), ("targets", np.int32, 1), ("values", np.uint8, 2 * FOLDS), ("plans", np.int32, 3), ("length", np.float64, 1),
    ("weights", np.float64, N_FEATURES + 1), ("rows", np.int64, 1),
)  # fmt: skip
_MAGIC = b"corpusprep lexical 1\n"


def pack(model: Model) -> bytes:
    """A model as bytes: its rows and the length of each array, then the arrays, compressed."""
    arrays = []
    for name, dtype, _ in _FIELDS:
        value: object = model
        for part in name.split("."):
            value = getattr(value, part)
        arrays.append(np.ascontiguousarray(value, np.dtype(dtype).newbyteorder("<")))
    head = np.array([int(model.rows[0]), *(a.size for a in arrays)], "<i8").tobytes()
    return _MAGIC + head + zlib.compress(b"".join(a.tobytes() for a in arrays), 1)


def rows_of(state: bytes) -> int:
    """How many rows a state was learned from; 0 for an empty one."""
    return int(np.frombuffer(state, "<i8", 1, len(_MAGIC))[0]) if state else 0


def unpack(state: bytes) -> Model:
    """The model that `pack` stored."""
    if not state.startswith(_MAGIC):
        raise RunError("A state of the lexical scorer is of another version. Delete the states, so that they are learned again.")
    sizes = np.frombuffer(state, "<i8", 1 + len(_FIELDS), len(_MAGIC))[1:]
    body = zlib.decompress(state[len(_MAGIC) + 8 * (1 + len(_FIELDS)) :])
    found = {}
    at = 0
    for (name, dtype, _), size in zip(_FIELDS, sizes, strict=True):
        found[name] = np.frombuffer(body, np.dtype(dtype).newbyteorder("<"), int(size), at).astype(dtype)
        at += int(size) * np.dtype(dtype).itemsize
    sides = [
        _make_side(found[f"{s}.keys"], found[f"{s}.kinds"], found[f"{s}.counts"].reshape(-1, FOLDS), found[f"{s}.rows"])
        for s in ("src", "tgt")
    ]
    return Model(
        sides[0], sides[1], found["starts"], found["targets"], found["values"].reshape(-1, FOLDS, 2),
        found["plans"].reshape(2, -1, 3), found["length"],
        found["weights"].reshape(2, -1), found["rows"],
    )  # fmt: skip
