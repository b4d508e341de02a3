"""The lexical scorer: estimates whether the target translates the source, with a model learned from the corpus itself.

Two sides are a translation if each makes the other likely (IBM model 1, `model1.py`), and if their lengths, numbers,
names and punctuation agree (`features.py`). A row is never judged by a model that learned from it: rows are divided
into folds by a hash of their normalised text, and the model of a fold is trained on the others. The weights of
the features are learned per pair, by logistic regression of its rows against corrupted copies of them: with the target
of another row, or with one side truncated.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from corpusprep.arrow import hash_strings, string_buffers
from corpusprep.errors import RunError
from corpusprep.kernels import kernel
from corpusprep.stage import pairs_of
from corpusprep.stages.quality.lexical import features as evidence
from corpusprep.stages.quality.lexical import text, words
from corpusprep.stages.quality.lexical.features import N_FEATURES, Model, Side
from corpusprep.stages.quality.lexical.model1 import Rows, link, train
from corpusprep.stages.quality.lexical.table import make_table

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]
Text = tuple[I64, U8]  # offsets and bytes

_ROUNDS = 3  # rounds of EM; more do not help
# Maximum number of token pairs within rows, over all rows. It bounds time and memory: where more rows are at hand, three times as
# many found no more misaligned rows.
_PAIRS = 10_000_000
_TRIED = 2000  # rows from which the number of pairs at a level is estimated
_LEAST_PROBABILITY = 1e-3  # of a translation that is kept
_MANY = 8000  # from so many rows on, three folds do: two thirds of them teach as much as four fifths
_FOLDS = (5, 3)  # of few and of many rows
_CONTRASTED = 6000  # rows used by the regressions
# Prior odds of a misaligned and of a truncated row against a good row.
_PRIORS = (0.7, 0.5)
_RIDGE = 3.0
_BLOCK = 4  # rows that are added to a Hessian together
_AT_ONCE = 1 << 14  # rows whose features are in memory
_LEAST = 20  # with fewer rows nothing is learned, and no row is judged


def learn(sample: pa.Table, limit: int, seed: int) -> bytes:
    """The state of one pair; see `corpusprep.stages.quality.prepare`."""
    src, tgt = sample["src"], sample["tgt"]
    keys = hash_strings(tgt, hash_strings(src, seed))
    order = np.argsort(keys, kind="stable")[:limit]
    if order.size < _LEAST:
        return _head(order.size)
    texts = [string_buffers(column.take(pa.array(order, pa.int64()))) for column in (src, tgt)]
    languages = [str(sample[name][0].as_py()) for name in ("src_lang", "tgt_lang")]
    return pack(fit(texts[0], texts[1], keys[order], languages[0], languages[1]))


class LexicalScorer:
    """Scores rows with the models of their pairs. A model is unpacked when its pair first occurs."""

    def __init__(self, states: Mapping[str, bytes]) -> None:
        self._states = states
        self._models: dict[str, Model] = {}

    def score(self, table: pa.Table) -> F32:
        """One score per row in [0, 1]; NaN if the pair has no state, or learned from too few rows."""
        scores = np.full(table.num_rows, np.nan, np.float32)
        names, codes = pairs_of(table)
        for k, name in enumerate(names):
            if rows_of(self._states.get(name, b"")) < _LEAST:
                continue
            if name not in self._models:
                self._models[name] = unpack(self._states[name])
            rows = np.flatnonzero(codes == k)
            part = table if rows.size == table.num_rows else table.take(pa.array(rows, pa.int64()))
            scores[rows] = score(self._models[name], string_buffers(part["src"]), string_buffers(part["tgt"]))
        return scores


def score(model: Model, src: Text, tgt: Text) -> F32:
    """Probabilities that rows are translations, (n,)."""
    n = src[0].size - 1
    out = np.empty(n, np.float32)
    for first in range(0, n, _AT_ONCE):
        rows = np.arange(first, min(first + _AT_ONCE, n))
        evidence.judge(_evidence(model, src, tgt, rows, rows), model.weights, out[first : first + rows.size])
    return out


def fit(src_text: Text, tgt_text: Text, keys: U64, src_lang: str, tgt_lang: str) -> Model:
    """Learns a model from n rows.

    Args:
        keys: (n,), seeded hashes of the rows, ascending; if there are too many rows, the last ones are left out.
    """
    level, plans = 2, np.empty(0, np.int32)
    while True:
        plans = np.stack([text.plan(language, level) for language in (src_lang, tgt_lang)])
        tried = min(_TRIED, keys.size)
        at = [
            _tokenise(*side, tried, text.tables(), plan)[0]
            for side, plan in zip((src_text, tgt_text), plans, strict=True)
        ]
        pairs = int(np.diff(at[0]) @ np.diff(at[1])) * keys.size / tried
        if level == 0 or pairs <= _PAIRS:
            break
        level -= 1
    n = min(keys.size, max(_LEAST, int(keys.size * _PAIRS / max(pairs, 1))))
    src_cut, tgt_cut = (
        _tokenise(*side, n, text.tables(), plan) for side, plan in zip((src_text, tgt_text), plans, strict=True)
    )
    keys = keys[:n]
    many = n >= _MANY
    folds = np.empty(n, np.int64)
    _folds(src_cut[3], tgt_cut[3], _FOLDS[many], folds)
    src, src_rows = _vocabulary(src_cut, folds, _FOLDS[many])
    tgt, tgt_rows = _vocabulary(tgt_cut, folds, _FOLDS[many])
    links = link(src_rows, tgt_rows, src.keys.size, tgt.keys.size)
    prob, values = np.empty((links.order.size, 2), np.float32), np.empty((_FOLDS[many], links.order.size, 2), np.uint8)
    for f in range(_FOLDS[many]):
        src_share, tgt_share = ((side.counts[:, f] / side.totals[f]).astype(np.float32) for side in (src, tgt))
        train(links, folds, f, src_share, tgt_share, _ROUNDS, prob)
        evidence.quantise(prob, _LEAST_PROBABILITY, values[f])
    least = values.min(axis=0)
    live = np.flatnonzero(np.minimum(least[:, 0], least[:, 1]) < 255)
    targets = links.targets[links.order[live]]
    starts = np.searchsorted(links.sources[links.order[live]], np.arange(src.keys.size + 1)).astype(np.int64)
    values = np.ascontiguousarray(values[:, live].transpose(1, 0, 2))
    model = Model(
        src, tgt, starts, targets, values, plans, np.array([0.0, 1.0, 0.0]), np.zeros((2, N_FEATURES + 1)),
        np.array([n]), make_table(starts, targets, values, tgt.keys.size),
    )  # fmt: skip
    return _weigh(model, src_text, tgt_text, keys, folds, src_cut[3], tgt_cut[3])


def _weigh(model: Model, src: Text, tgt: Text, keys: U64, folds: I64, src_rows: U64, tgt_rows: U64) -> Model:
    """Adds the fit of lengths and the weights of the features to a model."""
    n = min(keys.size, _CONTRASTED)
    keys, folds, rows = keys[:n], folds[:n], np.arange(n)
    good = _evidence(model, src, tgt, rows, rows, None, folds)
    model = model._replace(length=_fit_length(good[:, evidence.SRC_LETTERS], good[:, evidence.TGT_LETTERS]))
    good = _evidence(model, src, tgt, rows, rows, None, folds)
    # The target of another row of the fold, of any length or of about the same length.
    letters = good[:, evidence.TGT_LETTERS]
    other = [_others(np.lexsort((keys, by)), folds, shift) for by in (np.zeros(n), letters) for shift in (1, 2)]
    a, b = np.tile(rows, len(other)), np.concatenate(other)
    differ = (src_rows[a] != src_rows[b]) & (tgt_rows[a] != tgt_rows[b])
    a, b = a[differ], b[differ]
    misaligned = _evidence(model, src, tgt, a, b, None, folds[a])
    share = _clips(keys)
    long = rows[good[:, evidence.SRC_LETTERS] > np.log(10)]
    clip = np.concatenate([share[long], -share[long]]).astype(np.float32)
    long = np.tile(long, 2)
    truncated = _evidence(model, src, tgt, long, long, clip, folds[long])
    weight = np.ones(n)
    p = np.empty(n, np.float32)
    for _ in range(2):
        weights = [
            _contrast(good, weight, bad, prior, start)
            for bad, prior, start in zip((misaligned, truncated), _PRIORS, model.weights, strict=True)
        ]
        model = model._replace(weights=np.stack(weights))
        evidence.judge(good, model.weights, p)
        weight = np.where(p < 0.2, 0.0, 1.0)  # a real row that looks corrupted probably is
    return model


def _clips(keys: U64) -> F64:
    """What the truncated copies of rows keep, see `features`: 15 to 50 % of a side; half of them keep its closing mark. By the
    lower bits of the keys, since those that were chosen agree in the upper ones."""
    share = 0.15 + 0.35 * (keys >> np.uint64(8) & np.uint64(0xFFFFFFFF)).astype(np.float64) * 2.0**-32
    return share + (keys >> np.uint64(3) & np.uint64(1)).astype(np.float64)


def _evidence(
    model: Model, src: Text, tgt: Text, a: I64, b: I64, clip: F32 | None = None, folds: I64 | None = None
) -> F32:
    out = np.empty((a.size, N_FEATURES), np.float32)
    clip = np.zeros(a.size, np.float32) if clip is None else clip
    folds = np.full(a.size, -1) if folds is None else folds
    evidence.features(*src, *tgt, a, b, clip, folds, text.tables(), model, evidence.probabilities(), out)
    return out


def _others(order: I64, folds: I64, shift: int) -> I64:
    """For each row, the row `shift` places later in the order of its fold."""
    out = np.empty(folds.size, np.int64)
    for f in range(int(folds.max()) + 1):
        rows = order[folds[order] == f]
        out[rows] = np.roll(rows, -shift)
    return out


def _fit_length(src: F32, tgt: F32) -> F64:
    """`Model.length` from logarithms of lengths; the outermost 2 % are ignored."""
    ratio = (tgt - src).astype(np.float64)
    mean = np.median(ratio)
    v = (ratio - mean) ** 2
    inverse = 1.0 / (np.exp(src.astype(np.float64)) + np.exp(tgt.astype(np.float64)))
    kept = v <= np.quantile(v, 0.98)
    v, inverse = v[kept], inverse[kept]
    spread = inverse - inverse.mean()
    slope = max(float((spread * v).sum() / max((spread**2).sum(), 1e-12)), 0.0)
    return np.array([mean, max(float(v.mean() - slope * inverse.mean()), 0.005), slope])


@kernel
def _tokenise(offsets: I64, data: U8, rows: int, tables: text.Tables, plan: I32) -> tuple[I64, U64, U8, U64]:
    """Distinct tokens of each of the first rows: row r is `[at[r]:at[r + 1]]` of hashes and kinds. Also a hash of each row's text."""
    at = np.zeros(rows + 1, np.int64)
    tokens, kinds = np.empty(1024, np.uint64), np.empty(1024, np.uint8)
    whole = np.empty(rows, np.uint64)
    longest = 0
    for r in range(rows):
        longest = max(longest, offsets[r + 1] - offsets[r])
    cut = text.make_cut(longest, plan)
    room = np.full(evidence.ROOM, -1, np.int32)
    total = 0
    for r in range(rows):
        words.read(cut, data, offsets[r], offsets[r + 1], tables, plan)
        whole[r] = evidence.row_hash(cut)
        n = evidence.distinct(cut, room)
        if total + n > tokens.size:
            more_tokens, more_kinds = np.empty(2 * (total + n), np.uint64), np.empty(2 * (total + n), np.uint8)
            more_tokens[:total], more_kinds[:total] = tokens[:total], kinds[:total]
            tokens, kinds = more_tokens, more_kinds
        tokens[total : total + n] = cut.tokens[:n]
        kinds[total : total + n] = cut.kinds[:n]
        total += n
        at[r + 1] = total
    return at, tokens[:total].copy(), kinds[:total].copy(), whole


@kernel
def _folds(src: U64, tgt: U64, folds: int, out: I64) -> None:
    for i in range(out.size):
        out[i] = evidence.fold_of(src[i], tgt[i], folds)


def _vocabulary(cut: tuple[I64, U64, U8, U64], folds: I64, n_folds: int) -> tuple[Side, Rows]:
    """The vocabulary of one side, and its rows as token numbers; tokens that occur in only one row are left out."""
    n = folds.size
    at, tokens, kinds, _ = cut
    inverse, first, found = _number(tokens)
    order = np.argsort(-found, kind="stable")[: int((found >= 2).sum())]  # frequent tokens are close together in memory
    number = np.full(first.size, -1, np.int32)
    number[order] = np.arange(order.size, dtype=np.int32)
    ids = number[inverse]
    row = np.repeat(np.arange(n), np.diff(at))
    known = ids >= 0
    ids, row = ids[known], row[known]
    starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=n))]).astype(np.int64)
    inside = np.bincount(ids.astype(np.int64) * n_folds + folds[row], minlength=order.size * n_folds)
    inside = inside.reshape(-1, n_folds)
    counts = (inside.sum(1, keepdims=True) - inside).astype(np.int32)
    rows = (n - np.bincount(folds, minlength=n_folds)).astype(np.int64)
    return evidence.make_side(tokens[first[order]], kinds[first[order]], counts, rows), Rows(starts, ids)


@kernel
def _number(tokens: U64) -> tuple[I32, I64, I64]:
    """Numbers n tokens in the order in which they are met. Returns the number of each, (n,), and of each number the first place and how
    often it occurs."""
    numbers = np.empty(tokens.size, np.int32)
    first, found = np.empty(tokens.size, np.int64), np.zeros(tokens.size, np.int64)
    slots = np.full(1 << 12, -1, np.int32)
    n = 0
    for i in range(tokens.size):
        if 2 * n >= slots.size:
            slots = np.full(4 * slots.size, -1, np.int32)
            for k in range(n):
                slots[_slot(slots, tokens, first, tokens[first[k]])] = k
        slot = _slot(slots, tokens, first, tokens[i])
        if slots[slot] < 0:
            slots[slot], first[n] = n, i
            n += 1
        numbers[i] = slots[slot]
        found[numbers[i]] += 1
    return numbers, first[:n].copy(), found[:n].copy()


@kernel(leaf=True)
def _slot(slots: I32, tokens: U64, first: I64, token: np.uint64) -> np.uint64:
    """The slot of a token, or the free one for it. Tokens are hashes."""
    last = np.uint64(slots.size - 1)
    slot = token & last
    while slots[slot] >= 0 and tokens[first[slots[slot]]] != token:
        slot = (slot + np.uint64(1)) & last
    return slot


def _contrast(good: F32, weight: F64, bad: F32, prior: float, start: F64) -> F64:
    """Weights that separate good rows from bad rows, searched from `start`. The bad rows together weigh `prior` times the good rows."""
    x = np.concatenate([good, bad])
    y = np.concatenate([np.ones(len(good)), np.zeros(len(bad))])
    w = np.concatenate([weight, np.full(len(bad), prior * len(good) / max(len(bad), 1))])
    weights: F64 = _regress(x, y, w, _RIDGE, 12, start)
    return weights


@kernel
def _regress(x: F32, y: F64, w: F64, ridge: float, rounds: int, start: F64) -> F64:
    """Logistic regression by Newton steps, from the weights `start` on. The ridge applies to standardised features, not to the constant.

    It is written as loops so that the order of all sums is fixed, which a linear algebra library does not guarantee.
    """
    n, k = x.shape
    mean, scale = np.zeros(k), np.zeros(k)
    for r in range(n):
        for c in range(k):
            mean[c] += x[r, c]
    mean /= max(n, 1)
    for r in range(n):
        for c in range(k):
            scale[c] += (x[r, c] - mean[c]) ** 2
    for c in range(k):
        scale[c] = 1.0 / np.sqrt(scale[c] / n) if scale[c] > 1e-9 * n else 0.0
    m = k + 1
    beta, z, lever = start.copy(), np.zeros((_BLOCK, m)), np.zeros(_BLOCK)
    for c in range(k):
        beta[k] += beta[c] * mean[c]
        beta[c] = beta[c] / scale[c] if scale[c] > 0 else 0.0
    for _ in range(rounds):
        step = np.zeros(m)
        hessian = np.zeros((m, m))
        for c in range(k):
            step[c] = -ridge * beta[c]
            hessian[c, c] = ridge
        hessian[k, k] = 1e-6
        filled = 0
        for r in range(n):
            if w[r] > 0:
                s, row = float(beta[k]), z[filled]
                for c in range(k):
                    row[c] = (x[r, c] - mean[c]) * scale[c]
                    s += beta[c] * row[c]
                row[k] = 1.0
                p = 1.0 / (1.0 + evidence.odds(s))
                for c in range(m):
                    step[c] += w[r] * (y[r] - p) * row[c]
                lever[filled] = w[r] * p * (1.0 - p)
                filled += 1
            if filled == _BLOCK or r == n - 1:
                lever[filled:] = 0
                _add_block(hessian, z, lever)
                filled = 0
        _solve(hessian, step)
        largest = np.abs(step).max()
        beta += step * min(1.0, 4.0 / max(largest, 4.0))  # a Newton step may overshoot
        if largest < 1e-3:
            break
    for c in range(k):
        beta[c] *= scale[c]
        beta[k] -= beta[c] * mean[c]
    return beta


@kernel(leaf=True)
def _add_block(hessian: F64, z: F64, lever: F64) -> None:
    """Adds `_BLOCK` rows z, weighed by their levers, to the lower half of a Hessian."""
    a, b, c, d = z[0], z[1], z[2], z[3]
    for i in range(z.shape[1]):
        p, q, r, s = a[i] * lever[0], b[i] * lever[1], c[i] * lever[2], d[i] * lever[3]
        row = hessian[i]
        for j in range(i + 1):
            row[j] += (p * a[j] + q * b[j]) + (r * c[j] + s * d[j])


@kernel
def _solve(a: F64, b: F64) -> None:
    """Solves a x = b in place by Cholesky's method, for a positive definite a; only the lower half of a is read."""
    m = b.size
    for c in range(m):
        for e in range(c + 1):
            s = a[c, e]
            for q in range(e):
                s -= a[c, q] * a[e, q]
            a[c, e] = np.sqrt(max(s, 1e-12)) if c == e else s / a[e, e]
    for c in range(m):
        for q in range(c):
            b[c] -= a[c, q] * b[q]
        b[c] /= a[c, c]
    for c in range(m - 1, -1, -1):
        for q in range(c + 1, m):
            b[c] -= a[q, c] * b[q]
        b[c] /= a[c, c]


_MAGIC = b"corpusprep lexical 2\n"
_BY_FOLD = 0  # in a shape, the number of folds
_FIELDS: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("src.keys", "<u8", (-1,)), ("src.kinds", "|u1", (-1,)), ("src.counts", "<i4", (-1, _BY_FOLD)), ("src.rows", "<i8", (-1,)),
    ("tgt.keys", "<u8", (-1,)), ("tgt.kinds", "|u1", (-1,)), ("tgt.counts", "<i4", (-1, _BY_FOLD)), ("tgt.rows", "<i8", (-1,)),
    ("starts", "<i8", (-1,)), ("targets", "<i4", (-1,)), ("values", "|u1", (-1, _BY_FOLD, 2)), ("plans", "<i4", (2, -1, 3)),
    ("length", "<f8", (-1,)), ("weights", "<f8", (2, -1)), ("rows", "<i8", (-1,)),
)  # fmt: skip


def _head(rows: int) -> bytes:
    return _MAGIC + np.array([rows], "<i8").tobytes()


def rows_of(state: bytes) -> int:
    """Number of rows that a state was learned from; 0 if it is empty.

    Raises:
        RunError: the state is of another version.
    """
    if not state:
        return 0
    if not state.startswith(_MAGIC):
        raise RunError("The state of the lexical scorer is from another version. Learn it again.")
    return int(np.frombuffer(state, "<i8", 1, len(_MAGIC))[0])


def pack(model: Model) -> bytes:
    """A model as bytes: rows, the size of each array, and the compressed arrays; hash tables are left out."""
    arrays = []
    for name, dtype, _ in _FIELDS:
        value: object = model
        for part in name.split("."):
            value = getattr(value, part)
        arrays.append(np.ascontiguousarray(value, dtype))
    sizes = np.array([a.size for a in arrays], "<i8").tobytes()
    return _head(int(model.rows[0])) + sizes + zlib.compress(b"".join(a.tobytes() for a in arrays), 1)


def unpack(state: bytes) -> Model:
    """The model that `pack` stored."""
    start = len(_head(rows_of(state)))
    sizes = np.frombuffer(state, "<i8", len(_FIELDS), start)
    body = zlib.decompress(memoryview(state)[start + 8 * len(_FIELDS) :])
    found: dict[str, Any] = {}
    at, folds = 0, int(sizes[[name for name, *_ in _FIELDS].index("src.rows")])
    for (name, dtype, shape), size in zip(_FIELDS, sizes.tolist(), strict=True):
        # Copied, because the kernels need aligned arrays that own their data.
        shape = tuple(folds if length == _BY_FOLD else length for length in shape)
        found[name] = np.frombuffer(body, dtype, size, at).reshape(shape).astype(np.dtype(dtype).newbyteorder("="))
        at += size * np.dtype(dtype).itemsize
    for side in ("src", "tgt"):
        found[side] = evidence.make_side(*(found.pop(f"{side}.{part}") for part in ("keys", "kinds", "counts", "rows")))
    found["table"] = make_table(found["starts"], found["targets"], found["values"], found["tgt"].keys.size)
    return Model(**found)
