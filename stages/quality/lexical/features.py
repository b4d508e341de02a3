"""Features of the lexical scorer: the kernel that computes them from two texts and a model."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from corpusprep.arrow import mix64
from corpusprep.kernels import kernel
from corpusprep.stages.quality.lexical import text, words
from corpusprep.stages.quality.lexical.model1 import NULL
from corpusprep.stages.quality.lexical.table import Table, make_room, translate

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]
Integer = int | np.signedinteger[Any]

N_FEATURES = 52
SRC_LETTERS, TGT_LETTERS = 50, 51  # features that hold ln(1 + letters)
_FREQUENT = 0.03  # a token in more than this share of rows is a function word, and counts half


class Side(NamedTuple):
    """The vocabulary of one side.

    Attributes:
        keys: token hashes, the most frequent first.
        kinds: WORD, PIECE or NUMBER.
        counts: (tokens, folds), number of rows outside each fold that contain the token.
        totals: (folds,), the sums of the counts.
        rows: (folds,), number of rows outside each fold.
        slots: open-addressing table over the keys: the token, or -1.
    """

    keys: U64
    kinds: U8
    counts: I32
    totals: I64
    rows: I64
    slots: I32


class Model(NamedTuple):
    """The model that judges rows of one pair.

    Attributes:
        starts, targets: the entries of source token e are `starts[e]:starts[e + 1]`.
        values: (entries, folds, 2), t(target | source) and t(source | target) as indices into `probabilities()`.
        plans: (2, 7, 3), how each side is split into tokens.
        length: mean, constant variance and variance per 1 / letters of ln(target letters / source letters).
        weights: (2, N_FEATURES + 1), of the logistic regressions against misaligned and against truncated rows, each
            with its constant.
        rows: (1,), number of rows that the model was learned from.
        table: the entries, for look-ups.
    """

    src: Side
    tgt: Side
    starts: I64
    targets: I32
    values: U8
    plans: I32
    length: F64
    weights: F64
    rows: I64
    table: Table


def probabilities() -> F32:
    """The probability for each byte of `Model.values`: exp(-k / 16), and 0 for k = 255."""
    table = np.exp(-np.arange(256) / 16.0)
    table[255] = 0
    return table.astype(np.float32)


@kernel
def quantise(probability: F32, least: float, out: U8) -> None:
    """Probabilities, (n, 2), as bytes of `Model.values`, accurate to 3 %; 0 for those up to `least`."""
    for k in range(probability.shape[0]):
        for side in range(2):
            p = probability[k, side]
            out[k, side] = int(np.round(-16.0 * np.log(p))) if p > least else 255


def make_side(keys: U64, kinds: U8, counts: I32, rows: I64) -> Side:
    """A vocabulary with its hash table."""
    return Side(keys, kinds, counts, np.maximum(counts.sum(0, dtype=np.int64), 1), rows, _slots(keys))


@kernel
def _slots(keys: U64) -> I32:
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


@kernel(leaf=True)
def row_hash(cut: text.Cut) -> np.uint64:
    """A hash of the normalised text: of its tokens in order, before `distinct`."""
    state = np.uint64(0)
    for k in range(cut.counts[text.N_TOKENS]):
        state = mix64(state ^ cut.tokens[k])
    return state


@kernel(leaf=True)
def fold_of(src: np.uint64, tgt: np.uint64, folds: int) -> np.int64:
    """The fold of a row, of so many, from the hashes of its sides."""
    return np.int64(mix64(src ^ mix64(tgt + np.uint64(1))) % np.uint64(folds))


ROOM = 2 * text.MAX_TOKENS


@kernel(leaf=True)
def distinct(cut: text.Cut, room: I32) -> int:
    """Removes repeated tokens in place, and returns the number left. `room` is (ROOM,), all -1 before and after."""
    tokens, kinds = cut.tokens, cut.kinds
    mask = np.uint64(room.size - 1)
    kept = 0
    for i in range(cut.counts[text.N_TOKENS]):
        p = tokens[i] & mask
        while room[p] >= 0 and tokens[room[p]] != tokens[i]:
            p = (p + np.uint64(1)) & mask
        if room[p] < 0:
            tokens[kept], kinds[kept] = tokens[i], kinds[i]
            room[p] = kept
            kept += 1
    room[:] = -1
    return kept


@kernel(leaf=True)
def _look_up(side: Side, cut: text.Cut, n: int, fold: Integer, ids: I32) -> int:
    """Writes to `ids` which of n tokens occur in at least two rows outside the fold, and returns their number."""
    mask = np.uint64(side.slots.size - 1)
    known = 0
    for i in range(n):
        p = cut.tokens[i] & mask
        while side.slots[p] >= 0:
            e = side.slots[p]
            if side.keys[e] == cut.tokens[i]:
                if side.counts[e, fold] > 1:
                    ids[known] = e
                    known += 1
                break
            p = (p + np.uint64(1)) & mask
    return known


@kernel(leaf=True)
def _clip(cut: text.Cut, n: int, share: float) -> int:
    """Truncates n code points to a share of them. A share above 1 means share - 1, with the closing mark kept."""
    closed = share > 1
    kept = min(n, max(1, int(n * (share - 1 if closed else share))))
    if closed and kept > 0:
        cut.points[kept - 1] = cut.points[n - 1]
    return kept


@kernel(leaf=True)
def _likelihood(side: Side, fold: Integer, ids: I32, n: int, others: int, sums: F32, tokens: int, x: F32) -> None:
    """The log-likelihood ratio of one side given the other, against its unigrams. Writes to x[0:2] the mean of words
    and of pieces, to x[2:4] the sum divided by the root of their number, to x[4] the root of the number of words, and
    to x[5] the share of unknown tokens."""
    total_words = total_pieces = 0.0
    pieces: int | np.int64 = np.int64(0)
    for i in range(n):
        e = ids[i]
        count = side.counts[e, fold]
        ratio = sums[i] * side.totals[fold] / (max(others, 1) * count)
        v = np.log(NULL + (1.0 - NULL) * ratio)
        if count > _FREQUENT * side.rows[fold]:
            v *= 0.5
        piece = np.int64(side.kinds[e] == text.PIECE)  # not a branch: words and pieces take turns
        total_pieces += piece * v
        total_words += (1 - piece) * v
        pieces += piece
    words = n - int(pieces)
    x[0] = total_words / max(words, 1)
    x[1] = total_pieces / max(pieces, 1)
    x[2] = total_words / np.sqrt(words + 1.0)
    x[3] = total_pieces / np.sqrt(pieces + 1.0)
    x[4] = np.sqrt(words)
    x[5] = (tokens - n) / max(tokens, 1)


@kernel(leaf=True)
def _length(src: int, tgt: int, length: F64, x: F32) -> None:
    """Deviation of the length ratio from its mean, in standard deviations, with kinks at 0, 1 and 2 on both sides."""
    z = np.log((tgt + 1.0) / (src + 1.0)) - length[0]
    z /= np.sqrt(length[1] + length[2] / (src + tgt + 2.0))
    for k in range(3):
        x[2 * k] = min(max(z - k, 0.0), 6.0)
        x[2 * k + 1] = min(max(-z - k, 0.0), 6.0)


@kernel(forceinline=True, leaf=True)
def _among(value: np.uint64, values: U64, n: int) -> bool:
    """Whether a value is among n. It looks at all of them: that takes less than a branch for each."""
    found = np.int64(0)
    for k in range(n):
        found |= np.int64(values[k] == value)
    return bool(found != 0)


@kernel(leaf=True)
def _matched(a: U64, n_a: int, b: U64, n_b: int, used: U8) -> int:
    """Number of a's values that occur in b; each value of b is used once."""
    used[:n_b] = 0
    hits = 0
    for i in range(n_a):
        if _among(a[i], b, n_b):
            for j in range(n_b):
                if used[j] == 0 and a[i] == b[j]:
                    used[j] = 1
                    hits += 1
                    break
    return hits


@kernel(leaf=True)
def _cognates(s: text.Cut, t: text.Cut, used: U8, x: F32) -> None:
    """Words that both sides have: number and share of equal words and of words that begin alike; names by sound."""
    n_s, n_t = s.counts[text.N_WORDS], t.counts[text.N_WORDS]
    fewer = max(min(n_s, n_t), 1)
    equal = _matched(s.words, n_s, t.words, n_t, used)
    alike = 0
    for i in range(n_s):
        if s.sizes[i] >= 4 and _among(s.stems[i], t.stems, n_t):
            for j in range(n_t):
                if s.stems[i] == t.stems[j] and t.sizes[j] >= 4:
                    alike += 1
                    break
    x[0] = min(equal, 6)
    x[1] = equal / fewer
    x[2] = min(alike, 6)
    x[3] = alike / fewer
    # Names are recognised by capitals, so the names of the side with more capitals are searched in the other side.
    if s.counts[text.N_CAPITALS] >= t.counts[text.N_CAPITALS]:
        _heard(s, t, x[4:8])
    else:
        _heard(t, s, x[4:8])


@kernel(leaf=True)
def _heard(a: text.Cut, b: text.Cut, x: F32) -> None:
    """Searches the names of a in b by sound. Counts found names of two consonants in x[0], of three in x[1], of more in
    x[2], and names that are not found in x[3]."""
    for k in range(a.counts[text.N_NAMES]):
        if not a.marks[k] & text.CAPITAL:
            continue
        start, size = a.ends[k], a.ends[k + 1] - a.ends[k]
        found = False
        for m in range(b.counts[text.N_NAMES]):
            lo, hi = b.ends[m], b.ends[m + 1]
            if b.marks[m] & text.RUN:  # anywhere in the run
                if size < 3:
                    continue
                last = hi - size
            else:  # at the beginning: endings may follow
                last = min(lo, hi - size)
            for at in range(lo, last + 1):
                same = True
                for q in range(size):
                    if a.sounds[start + q] != b.sounds[at + q]:
                        same = False
                        break
                if same:
                    found = True
                    break
            if found:
                break
        if found:
            x[min(size, 4) - 2] += 1
        elif not a.marks[k] & text.INITIAL and size >= 3:
            x[3] += 1
    for k in range(4):
        x[k] = min(x[k], 4)


@kernel(leaf=True)
def _agree(a: int, b: int, x: F32) -> None:
    """Whether both sides have a mark, only the source, or only the target."""
    x[0] = 1.0 if a > 0 and b > 0 else 0.0
    x[1] = 1.0 if a > 0 and b == 0 else 0.0
    x[2] = 1.0 if b > 0 and a == 0 else 0.0


@kernel
def features(
    so: I64, sd: U8, to: I64, td: U8, src_row: I64, tgt_row: I64, clip: F32, folds: I64,
    tables: text.Tables, model: Model, table: F32, out: F32,
) -> None:  # fmt: skip
    """The features of n pairs of a source and a target.

    Args:
        so, sd, to, td: offsets and bytes of the sources and the targets, see `corpusprep.arrow.string_buffers`.
        src_row, tgt_row: (n,), indices of the source and of the target.
        clip: (n,), 0, or the share of the target (positive) or the source (negative) that is kept, see `_clip`.
        folds: (n,), the fold whose model judges; -1 for the row's own.
        tables, table: `text.tables()` and `probabilities()`.
        out: (n, N_FEATURES), filled.
    """
    longest = 0
    for r in range(src_row.size):
        longest = max(longest, so[src_row[r] + 1] - so[src_row[r]], to[tgt_row[r] + 1] - to[tgt_row[r]])
    s, t = text.make_cut(longest, model.plans[0]), text.make_cut(longest, model.plans[1])
    si, ti = np.empty(text.MAX_TOKENS, np.int32), np.empty(text.MAX_TOKENS, np.int32)
    sum_s, sum_t = np.empty(text.MAX_TOKENS, np.float32), np.empty(text.MAX_TOKENS, np.float32)
    used = np.empty(text.MAX_TOKENS, np.uint8)
    room, pairs = np.full(ROOM, -1, np.int32), make_room(text.MAX_TOKENS)
    for r in range(src_row.size):
        if clip[r] == 0:
            words.read(s, sd, so[src_row[r]], so[src_row[r] + 1], tables, model.plans[0])
            words.read(t, td, to[tgt_row[r]], to[tgt_row[r] + 1], tables, model.plans[1])
        else:
            n_s = text.decode(sd, so[src_row[r]], so[src_row[r] + 1], s.points)
            n_t = text.decode(td, to[tgt_row[r]], to[tgt_row[r] + 1], t.points)
            if clip[r] > 0:
                n_t = _clip(t, n_t, clip[r])
            else:
                n_s = _clip(s, n_s, -clip[r])
            text.scan(s, n_s, tables, model.plans[0])
            text.scan(t, n_t, tables, model.plans[1])
        fold = folds[r] if folds[r] >= 0 else fold_of(row_hash(s), row_hash(t), model.values.shape[1])
        m_s, m_t = distinct(s, room), distinct(t, room)
        k_s, k_t = _look_up(model.src, s, m_s, fold, si), _look_up(model.tgt, t, m_t, fold, ti)
        translate(model.table, fold, table, si, k_s, ti, k_t, sum_s, sum_t, pairs)
        x, a, b = out[r], s.counts, t.counts
        x[:] = 0
        _likelihood(model.src, fold, si, k_s, k_t, sum_s, m_s, x[0:6])
        _likelihood(model.tgt, fold, ti, k_t, k_s, sum_t, m_t, x[6:12])
        _length(a[text.N_LETTERS], b[text.N_LETTERS], model.length, x[12:18])
        hits = _matched(s.numbers, a[text.N_NUMBERS], t.numbers, b[text.N_NUMBERS], used)
        x[18] = min(hits, 3)
        x[19] = min(a[text.N_NUMBERS] - hits, 3)
        x[20] = min(b[text.N_NUMBERS] - hits, 3)
        x[21] = 1.0 if a[text.N_NUMBERS] > 0 and b[text.N_NUMBERS] > 0 and hits == 0 else 0.0
        _cognates(s, t, used, x[22:30])
        _agree(a[text.QUESTIONS], b[text.QUESTIONS], x[30:33])
        _agree(a[text.EXCLAMATIONS], b[text.EXCLAMATIONS], x[33:36])
        _agree(a[text.FINAL], b[text.FINAL], x[36:39])
        _agree(a[text.QUOTES], b[text.QUOTES], x[39:42])
        _agree(a[text.BRACKETS], b[text.BRACKETS], x[42:45])
        _agree(a[text.COLONS], b[text.COLONS], x[45:48])
        x[48] = min(abs(a[text.COMMAS] - b[text.COMMAS]), 4)
        x[49] = min(a[text.COMMAS], b[text.COMMAS], 3)
        x[SRC_LETTERS] = np.log(a[text.N_LETTERS] + 1.0)
        x[TGT_LETTERS] = np.log(b[text.N_LETTERS] + 1.0)


@kernel(leaf=True)
def odds(score: float) -> float:
    """exp(-score), with the score clipped so that the result does not overflow."""
    return float(np.exp(-min(max(score, -30.0), 30.0)))


_CUT = 4.0  # the odds against a row at which the scale changes; they give a score of 0.2
_STEEP = 3.0  # exponent of the evidence that a side is truncated
_FLAT = 0.25  # exponent of the scale above the cut


@kernel
def judge(x: F32, weights: F64, out: F32) -> None:
    """Writes how likely each row is a translation, (n,), from 0 to 1. A score of 0.2 means odds of 4 to 1 against it.

    The odds of the two regressions are added in a fixed order. Truncation is a yes-or-no question: above the cut, its
    evidence fades fast. So good rows are ordered by how well their words translate each other (Spearman with human
    scores of machine translations, mean of the seven pairs of MLQE-PE: 0.22; without this, 0.10). The scale is also
    flattened above the cut, because otherwise scores in float32 could not distinguish good rows.
    """
    k = x.shape[1]
    for r in range(x.shape[0]):
        against = 0.0
        for m in range(weights.shape[0]):
            s = weights[m, k]
            for c in range(k):
                s += weights[m, c] * x[r, c]
            share = odds(s) / _CUT
            against += share if m == 0 else share**_STEEP
        if against < 1:
            against = against**_FLAT
        out[r] = 1.0 / (1.0 + _CUT * against)
