"""The fastText predictor as Numba kernels on Arrow buffers.

The arithmetic is that of fastText, including the order of additions and the width of each number, so that labels and
probabilities agree. Character n-grams of `<word>` are hashed by FNV-1a (with signed bytes), and the rows found are
averaged. The output is a hierarchical softmax, a softmax or one sigmoid per label (Joulin et al. 2017, "Bag of Tricks
for Efficient Text Classification", arXiv:1607.01759). Kernels release the GIL and share the model's arrays.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from corpusprep.kernels import kernel

U8 = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U64 = npt.NDArray[np.uint64]

Int = int | np.int64

HIERARCHICAL, SOFTMAX, ONE_VS_ALL = 0, 1, 2

_FNV_OFFSET, _FNV_PRIME, _LOW = np.uint64(2166136261), np.uint64(16777619), np.uint64(0xFFFFFFFF)
# fastText hashes `int8_t` bytes widened to 32 bits: a byte above 127 sets all the upper bits.
_SIGNED = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.int32).view(np.uint32).astype(np.uint64)
_SPACE = np.zeros(256, np.bool_)
_SPACE[[0x20, 0x0A, 0x0D, 0x09, 0x0B, 0x0C, 0x00]] = True
_LABEL = np.frombuffer(b"__label__", np.uint8).copy()
_END = np.frombuffer(b"</s>", np.uint8).copy()
_END_HASH = np.uint64(0xD79C9359)
_NAME_OFFSET, _NAME_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_END_NAME = np.uint64(0x7BD4011AD427EA99)
# fastText adds this to each probability before it takes the logarithm, so its reported values include it.
_SHIFT = 1e-5
_GRID = np.arange(513, dtype=np.float32) * np.float32(16) / np.float32(512) - np.float32(8)
_SIGMOID = (1.0 / (1.0 + np.exp(-_GRID).astype(np.float64))).astype(np.float32)
_MEMO = 1 << 14  # words cached in one call
_SPARE = 512
_BATCH = 2048  # row numbers gathered before the rows are added


class Arrays(NamedTuple):
    """A model as arrays for the kernels. The dictionary has n words and then m labels; the matrices have d columns.

    Attributes:
        loss: HIERARCHICAL, SOFTMAX or ONE_VS_ALL.
        minn, maxn: shortest and longest character n-gram; `maxn` is 0 if there are none.
        word_ngrams: longest n-gram of words; below 2 if there are none.
        bucket: number of hash buckets of the n-grams.
        words: n.
        pruned: whether n-grams are looked up in `keys`.
        text, starts, ends: the dictionary's entries, `text[starts[i]:ends[i]]`.
        slots: hash table of the entries' numbers, -1 if free.
        keys, rows: hash table from kept buckets to their rows, counted from n; -1 if free.
        seen: one bit per bucket, set if the bucket was kept.
        dense: the input matrix, float32 of shape (rows, d); empty if the next three are used.
        codes, norms, centroids: uint8 (rows, p), float32 (rows,), float32 (p, 256, d / p).
        weights: the output matrix transposed, float32 (d, m), or (d, m - 1) for inner nodes.
        nodes: for HIERARCHICAL, the same as (m - 1, d).
        left, right: children of the m - 1 inner nodes: i < m is a label, else inner node i - m.
    """

    loss: int
    minn: int
    maxn: int
    word_ngrams: int
    bucket: int
    words: int
    pruned: bool
    text: U8
    starts: I64
    ends: I64
    slots: I32
    keys: I32
    rows: I32
    seen: U64
    dense: F32
    codes: U8
    norms: F32
    centroids: F32
    weights: F32
    nodes: F32
    left: I32
    right: I32


@kernel
def scan_entries(raw: U8, position: int, starts: I64, ends: I64, counts: I64, kinds: U8) -> Int:
    """Finds the dictionary's entries from `position` on; returns their end, or -1 if the file ends before."""
    for i in range(starts.size):
        starts[i] = position
        while position < raw.size and raw[position] != 0:
            position += 1
        if position + 10 > raw.size:
            return -1
        ends[i] = position
        count = np.uint64(0)
        for k in range(8):
            count |= np.uint64(raw[position + 1 + k]) << np.uint64(8 * k)
        counts[i] = np.int64(count)
        kinds[i] = raw[position + 9]
        position += 10
    return position


@kernel(leaf=True)
def _find(text: U8, starts: I64, ends: I64, slots: I32, word: U8, begin: Int, end: Int, value: np.uint64) -> Int:
    """The slot of the word `word[begin:end]` with this hash, or the free slot for it."""
    mask = slots.size - 1
    slot = np.int64(value) & mask
    while slots[slot] >= 0:
        entry = slots[slot]
        start = starts[entry]
        if ends[entry] - start == end - begin:
            k = 0
            while k < end - begin and text[start + k] == word[begin + k]:
                k += 1
            if k == end - begin:
                return slot
        slot = (slot + 1) & mask
    return slot


@kernel
def index_words(text: U8, starts: I64, ends: I64, slots: I32) -> I32:
    """Fills the hash table of the dictionary's entries."""
    for i in range(starts.size):
        value = _FNV_OFFSET
        for k in range(starts[i], ends[i]):
            value = ((value ^ _SIGNED[text[k]]) * _FNV_PRIME) & _LOW
        slots[_find(text, starts, ends, slots, text, starts[i], ends[i], value)] = i
    return slots


@kernel(leaf=True)
def _key_slot(keys: I32, key: Int) -> Int:
    mask = keys.size - 1
    slot = (key * 0x9E3779B1 >> 15) & mask
    while keys[slot] >= 0 and keys[slot] != key:
        slot = (slot + 1) & mask
    return slot


@kernel
def index_rows(pairs: I32, keys: I32, rows: I32, seen: U64) -> None:
    """Fills the hash table from kept buckets to rows."""
    for i in range(pairs.shape[0]):
        key = np.int64(pairs[i, 0])
        slot = _key_slot(keys, key)
        keys[slot] = key
        rows[slot] = pairs[i, 1]
        seen[key >> 6] |= np.uint64(1) << np.uint64(key & 63)


@kernel(leaf=True)
def _add_rows(dense: F32, codes: U8, norms: F32, centroids: F32, batch: I32, count: int, hidden: F32) -> None:
    if codes.size:
        parts, width = centroids.shape[0], centroids.shape[2]
        for i in range(count):
            row = batch[i]
            norm = norms[row]
            for part in range(parts):
                code = codes[row, part]
                for k in range(width):
                    hidden[part * width + k] += norm * centroids[part, code, k]
    elif dense.shape[1] == 16:  # the size of lid.176: a loop of constant length stays in registers
        for i in range(count):
            row = batch[i]
            for k in range(16):
                hidden[k] += dense[row, k]
    else:
        for i in range(count):
            row = batch[i]
            for k in range(dense.shape[1]):
                hidden[k] += dense[row, k]


@kernel(forceinline=True, leaf=True)
def _row(model: Arrays, key: Int) -> Int:
    """The row of an n-gram's bucket, or -1 if it was pruned."""
    if not model.pruned:
        return model.words + key
    if not (model.seen[key >> 6] >> np.uint64(key & 63)) & np.uint64(1):
        return np.int64(-1)
    return np.int64(model.words + model.rows[_key_slot(model.keys, key)])


@kernel(forceinline=True, leaf=True)
def _word_rows(
    model: Arrays, word: U8, length: int, value: np.uint64, batch: I32, filled: int, hidden: F32
) -> tuple[int, int]:
    """Appends the rows of `<word>`, whose last letter is at `length - 1`, to the `filled` ones in `batch`.

    Returns the new number of rows in `batch`, and the number added to `hidden` to make room; both are -1 for a label.
    """
    bucket, maxn = model.bucket, model.maxn
    entry = model.slots[_find(model.text, model.starts, model.ends, model.slots, word, 1, length, value)]
    if entry >= model.words:
        return -1, -1
    if entry < 0 and length >= 10:
        k = 0
        while k < 9 and word[1 + k] == _LABEL[k]:
            k += 1
        if k == 9:
            return -1, -1
    if entry >= 0:
        batch[filled] = entry
        filled += 1
    added = 0
    if maxn <= 0 or (value == _END_HASH and _is_end(word, 1, length)):
        return filled, added
    # h % bucket without a division, for h < 2**32: the quotient is exact or one too small.
    shift = 32
    while bucket >> (shift - 31):
        shift += 1
    reciprocal, turn, modulus = np.uint64((1 << shift) // bucket), np.uint64(shift), np.uint64(bucket)
    word[length] = 62
    for i in range(length + 1):
        if word[i] & 0xC0 == 0x80:
            continue
        gram = _FNV_OFFSET
        j = i
        for n in range(1, maxn + 1):
            if j > length:
                break
            gram = ((gram ^ _SIGNED[word[j]]) * _FNV_PRIME) & _LOW
            j += 1
            while j <= length and word[j] & 0xC0 == 0x80:
                gram = ((gram ^ _SIGNED[word[j]]) * _FNV_PRIME) & _LOW
                j += 1
            if n < model.minn or (n == 1 and (i == 0 or j == length + 1)):
                continue
            key = np.int64(gram - ((gram * reciprocal) >> turn) * modulus)
            if key >= bucket:
                key -= bucket
            row = _row(model, key)
            if row >= 0:
                batch[filled] = row
                filled += 1
        if filled >= _BATCH + _SPARE:
            _add_rows(model.dense, model.codes, model.norms, model.centroids, batch, filled, hidden)
            added += filled
            filled = 0
    return filled, added


@kernel(leaf=True)
def _is_end(data: U8, start: Int, end: Int) -> bool:
    same = end - start == 4
    for k in range(4):
        same = same and data[start + k] == _END[k]
    return same


@kernel(forceinline=True, leaf=True)
def _average(
    model: Arrays,
    data: U8,
    start: Int,
    end: Int,
    word: U8,
    hashes: I32,
    batch: I32,
    hidden: F32,
    memo: U64,
    memo_rows: I32,
) -> int:
    """Sets `hidden` to the mean of the rows of the line's features and returns their number.

    `memo` caches words and their rows across lines. Each slot has one word: a 64-bit hash of the word (two words
    collide once in 2**64), fastText's own hash, the number of rows, and then the rows, two per 64-bit number.
    """
    dense, codes, norms, centroids = model.dense, model.codes, model.norms, model.centroids
    room = memo_rows.shape[1] - 4
    for k in range(hidden.size):
        hidden[k] = 0
    features, filled, tokens = 0, 0, 0
    position = start
    last = False
    while not last:
        while position < end and _SPACE[data[position]]:
            position += 1
        begin = position
        name = _NAME_OFFSET
        while position < end:
            byte = data[position]
            if _SPACE[byte]:
                break
            name = (name ^ np.uint64(byte)) * _NAME_PRIME
            position += 1
        if position == begin:  # the line's end is the token </s>; the same word in the text also ends the line
            last, name = True, _END_NAME
        elif name == _END_NAME:
            last = _is_end(data, begin, position)
        slot = np.int64((name ^ (name >> np.uint64(29))) & np.uint64(memo.shape[0] - 1))
        if memo[slot, 0] == name:
            count = memo_rows[slot, 3]
            if room == 12:  # copied whole, without a branch
                for k in range(12):
                    batch[filled + k] = memo_rows[slot, 4 + k]
            else:
                for k in range(count):
                    batch[filled + k] = memo_rows[slot, 4 + k]
            filled += count
            hashes[tokens] = memo_rows[slot, 2]
            tokens += 1
        else:
            length = 1
            value = _FNV_OFFSET
            for k in range(begin, position):
                word[length] = data[k]
                value = ((value ^ _SIGNED[data[k]]) * _FNV_PRIME) & _LOW
                length += 1
            if length == 1:
                for k in range(4):
                    word[1 + k] = _END[k]
                value, length = _END_HASH, 5
            word[0] = 60
            before = filled
            filled, added = _word_rows(model, word, length, value, batch, filled, hidden)
            if filled < 0:
                filled = before
                continue
            features += added
            hashes[tokens] = np.int32(np.uint32(value))
            if not added and filled - before <= room:
                memo[slot, 0] = name
                memo_rows[slot, 2] = hashes[tokens]
                memo_rows[slot, 3] = filled - before
                for k in range(filled - before):
                    memo_rows[slot, 4 + k] = batch[before + k]
            tokens += 1
        if filled >= _BATCH:
            _add_rows(dense, codes, norms, centroids, batch, filled, hidden)
            features += filled
            filled = 0
    if model.word_ngrams > 1:
        for i in range(tokens):
            chain = np.uint64(np.int64(hashes[i]))
            for j in range(i + 1, min(tokens, i + model.word_ngrams)):
                chain = chain * np.uint64(116049371) + np.uint64(np.int64(hashes[j]))
                row = _row(model, np.int64(chain % np.uint64(model.bucket)))
                if row >= 0:
                    batch[filled] = row
                    filled += 1
                if filled >= _BATCH:
                    _add_rows(dense, codes, norms, centroids, batch, filled, hidden)
                    features += filled
                    filled = 0
    _add_rows(dense, codes, norms, centroids, batch, filled, hidden)
    features += filled
    if features:
        scale = np.float32(1.0 / features)
        for k in range(hidden.size):
            hidden[k] *= scale
    return features


@kernel(leaf=True)
def _exponentials(x: F32, turns: F64, powers: F64, out: F32) -> None:
    """out = exp(x), correctly rounded except in rare cases; written so that it compiles to vector instructions."""
    magic = 6755399441055744.0  # 1.5 * 2**52: adding it rounds to an integer in the low bits
    turn_bits, power_bits = turns.view(np.int64), powers.view(np.int64)
    for k in range(x.size):
        v = min(max(np.float64(x[k]), np.float64(-104)), np.float64(89))
        turns[k] = v * 1.4426950408889634 + magic
    for k in range(x.size):
        power_bits[k] = (turn_bits[k] + 1023) << 52
    for k in range(x.size):
        v = min(max(np.float64(x[k]), np.float64(-104)), np.float64(89))
        r = v - (turns[k] - magic) * 0.6931471805599453
        s = 1.0 + r / 9.0
        s = 1.0 + r * s / 8.0
        s = 1.0 + r * s / 7.0
        s = 1.0 + r * s / 6.0
        s = 1.0 + r * s / 5.0
        s = 1.0 + r * s / 4.0
        s = 1.0 + r * s / 3.0
        s = 1.0 + r * s / 2.0
        out[k] = (1.0 + r * s) * powers[k]


@kernel(leaf=True)
def _probabilities(
    loss: int, weights: F32, left: I32, right: I32, hidden: F32, x: F32, e: F32, turns: F64, powers: F64, out: F64
) -> None:
    """out[i] = the probability of label i as fastText reports it. The second half of `out` is room for the inner nodes
    of the tree."""
    for k in range(x.size):
        x[k] = 0
    for j in range(weights.shape[0]):
        h = hidden[j]
        for k in range(x.size):
            x[k] += weights[j, k] * h
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


@kernel(leaf=True)
def _descend(nodes: F32, left: I32, right: I32, hidden: F32, stack: I32, stack_p: F64) -> tuple[int, float]:
    """The most probable label of the tree and its probability. Branches that cannot contain it are skipped."""
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
        x = np.float32(0)
        for k in range(hidden.size):
            x += nodes[node - labels, k] * hidden[k]
        f = np.float32(1.0 / (1.0 + np.float64(np.float32(math.exp(-np.float64(x))))))
        p_left = p * (np.float64(np.float32(1.0 - np.float64(f))) + _SHIFT)
        p_right = p * (np.float64(f) + _SHIFT)
        second = 1 if p_left > p_right else 0  # the more probable one is popped first
        stack[depth + second], stack_p[depth + second] = left[node - labels], p_left
        stack[depth + 1 - second], stack_p[depth + 1 - second] = right[node - labels], p_right
        depth += 2
    return best, best_p


@kernel
def predict_rows(
    model: Arrays,
    offsets: I64,
    data: U8,
    own: I32,
    other: I32,
    first: I64,
    members: I32,
    clusters: I32,
    below: F32,
    label: I32,
    probability: F32,
    of_own: F32,
    of_other: F32,
    of_rival: F32,
    letters: I32,
) -> None:
    """Predicts labels of n lines, `data[offsets[i]:offsets[i + 1]]`, and the probabilities of their expected languages.

    Args:
        own, other: for each line, the index of a set of labels: for its own language, and for that of the other side.
            Set s is `members[first[s]:first[s + 1]]`.
        clusters: for each label, the index of its cluster; the probabilities of a cluster are summed.
        below: for each line, the rival is searched only if the probability of the own set is below this.
        label: out, the index of the most probable label; -1 if the line has no feature.
        probability: out, its probability; NaN if the line has no feature, as in the next three.
        of_own, of_other: out, the probability of the two sets.
        of_rival: out, the probability of the most probable cluster, without labels of the own set; 0 if it was not
            searched or the line has no letters.
        letters: out, if the rival was searched, the number of bytes in ASCII letters and non-ASCII characters.
    """
    longest = 0
    for i in range(label.size):
        longest = max(longest, offsets[i + 1] - offsets[i])
    word = np.empty(longest + 40, np.uint8)
    hashes = np.empty(longest // 2 + 4, np.int32)
    batch = np.empty(_BATCH + _SPARE + model.maxn + 16, np.int32)
    memo = np.zeros((_MEMO, 8 if model.pruned else 32), np.uint64)
    memo_rows = memo.view(np.int32)
    width = model.centroids.shape[0] * model.centroids.shape[2] if model.codes.size else model.dense.shape[1]
    hidden = np.empty(width, np.float32)
    outputs = model.weights.shape[1]
    x, e = np.empty(outputs, np.float32), np.empty(outputs, np.float32)
    turns, powers = np.empty(outputs, np.float64), np.empty(outputs, np.float64)
    labels = clusters.size
    p = np.zeros(2 * labels, np.float64)
    sums = np.zeros(labels, np.float64)
    tree = model.loss == HIERARCHICAL and labels > 1
    stack = np.empty(2 * labels, np.int32)
    for i in range(label.size):
        features = _average(model, data, offsets[i], offsets[i + 1], word, hashes, batch, hidden, memo, memo_rows)
        of_rival[i] = 0
        total = np.float32(0)
        for k in range(hidden.size):
            total += hidden[k]
        if features == 0 or not math.isfinite(total):
            label[i] = -1
            probability[i] = of_own[i] = of_other[i] = of_rival[i] = np.nan
            continue
        if tree:
            top, chance = _descend(model.nodes, model.left, model.right, hidden, stack, p)
            label[i] = top
            probability[i] = chance
            surely = below[i] <= 0
            for k in range(first[own[i]], first[own[i] + 1]):
                surely = surely or (members[k] == top and chance >= below[i])
            if surely:
                of_own[i] = chance
                of_other[i] = 0
                continue
        _probabilities(model.loss, model.weights, model.left, model.right, hidden, x, e, turns, powers, p)
        top = 0
        for k in range(labels):
            if p[k] >= p[top]:  # fastText returns the last of equal labels
                top = k
        label[i] = top
        probability[i] = p[top]
        mine = 0.0
        for k in range(first[own[i]], first[own[i] + 1]):
            mine += p[members[k]]
        theirs = 0.0
        for k in range(first[other[i]], first[other[i] + 1]):
            theirs += p[members[k]]
        of_own[i] = mine
        of_other[i] = theirs
        if mine < below[i]:
            for k in range(labels):
                sums[k] = 0
            for k in range(labels):
                sums[clusters[k]] += p[k]
            for k in range(first[own[i]], first[own[i] + 1]):
                sums[clusters[members[k]]] -= p[members[k]]
            best = 0.0
            for k in range(labels):
                best = max(best, sums[k])
            count = 0
            for k in range(offsets[i], offsets[i + 1]):
                byte = data[k]
                count += byte >= 128 or 97 <= (byte | 32) <= 122
            letters[i] = count
            of_rival[i] = best if count else 0.0


@kernel
def find_capitals(offsets: I64, data: U8, out: npt.NDArray[np.bool_]) -> int:
    """Marks lines that may be all in capitals, and returns their number. They have no lower-case letter of ASCII or
    basic Cyrillic, and have a byte of a script with case. The caller checks the few marked lines by Unicode's rules."""
    count = 0
    for i in range(out.size):
        cased, small = False, False
        before = np.uint8(0)
        for k in range(offsets[i], offsets[i + 1]):
            byte = data[k]
            if 97 <= byte <= 122 or (before == 0xD0 and byte >= 0xB0) or (before == 0xD1 and byte < 0xA0):
                small = True
                break
            cased = cased or 65 <= byte <= 90 or 0xC3 <= byte <= 0xD5
            before = byte
        out[i] = cased and not small
        count += out[i]
    return count
