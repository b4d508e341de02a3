"""The fastText predictor as Numba kernels on Arrow buffers.

The arithmetic is that of fastText, including the order of additions and the width of each number, so that labels and
probabilities agree. The output is a hierarchical softmax, a softmax or one sigmoid per label (Joulin et al. 2017, "Bag
of Tricks for Efficient Text Classification", arXiv:1607.01759). Kernels release the GIL and share the model's arrays.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from corpusprep.kernels import kernel
from corpusprep.stages.langid.features import BATCH, HIERARCHICAL, MEMO_BITS, SPARE, Arrays, average
from corpusprep.stages.langid.output import descend, find_path, follow_path, probabilities, products

U8 = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]

_LINES = 32  # lines whose features are averaged before labels are found


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
    tail = np.empty(longest + 16, np.uint8)
    hashes = np.empty(longest // 2 + 4, np.int32)
    batch = np.empty(BATCH + SPARE + model.maxn + 16, np.int32)
    memo = np.zeros((1 << MEMO_BITS, 8 if model.pruned else 32), np.uint64)
    memo_rows = memo.view(np.int32)
    width = model.centroids.shape[0] * model.centroids.shape[2] if model.codes.size else model.dense.shape[1]
    columns = model.weights.shape[0]  # those of a quantised matrix can be more: the last part is padded
    hidden, vector = np.empty(width, np.float32), np.empty(columns, np.float32)
    outputs = model.weights.shape[1]
    x, e = np.empty(outputs, np.float32), np.empty(outputs, np.float32)
    turns, powers = np.empty(outputs, np.float64), np.empty(outputs, np.float64)
    labels = clusters.size
    p = np.zeros(2 * labels, np.float64)
    sums = np.zeros(labels, np.float64)
    tree = model.loss == HIERARCHICAL and labels > 1
    stack = np.empty(2 * labels, np.int32)
    across, counts = np.zeros((columns, _LINES), np.float32), np.zeros(_LINES, np.int64)
    # The path through the tree to the label that was last found, for all lines of a block at once.
    guess, depth = -1, 0
    nodes, rights = np.empty(labels, np.int32), np.empty(labels, np.bool_)
    path_x, path_f = np.empty(labels * _LINES, np.float32), np.empty(labels * _LINES, np.float32)
    path_turns, path_powers = np.empty(labels * _LINES, np.float64), np.empty(labels * _LINES, np.float64)
    chances, side, lead = np.empty(_LINES, np.float64), np.empty(_LINES, np.float64), np.empty(_LINES, np.float64)
    for block in range(0, label.size, _LINES):
        lines = min(_LINES, label.size - block)
        for b in range(lines):
            text, start, end = data, offsets[block + b], offsets[block + b + 1]
            if end + 16 > data.size:  # the scan reads up to 16 bytes after the line
                for k in range(end - start):
                    tail[k] = data[start + k]
                text, start, end = tail, np.int64(0), end - start
            counts[b] = average(model, text, start, end, word, hashes, batch, hidden, memo, memo_rows)
            for j in range(columns):
                across[j, b] = hidden[j]
        if guess >= 0:
            follow_path(
                model.weights,
                nodes,
                rights,
                depth,
                across,
                path_x,
                path_f,
                path_turns,
                path_powers,
                chances,
                side,
                lead,
            )
        found = guess
        for b in range(lines):
            i = block + b
            of_rival[i] = 0
            total = np.float32(0)
            for j in range(columns):
                vector[j] = across[j, b]
                total += vector[j]
            if counts[b] == 0 or not math.isfinite(total):
                label[i] = -1
                probability[i] = of_own[i] = of_other[i] = of_rival[i] = np.nan
                continue
            multiplied = False
            if tree:
                top, chance = guess, chances[b]
                if guess < 0 or chance < 0:
                    products(model.weights, vector, x, outputs)
                    multiplied = True
                    top, chance = descend(model.left, model.right, x, stack, p)
                label[i] = top
                probability[i] = chance
                surely = below[i] <= 0
                for k in range(first[own[i]], first[own[i] + 1]):
                    surely = surely or (members[k] == top and chance >= below[i])
                if surely:
                    of_own[i] = chance
                    of_other[i] = 0
                    found = top
                    continue
            if not multiplied:
                products(model.weights, vector, x, outputs)
            probabilities(model.loss, model.left, model.right, x, e, turns, powers, p)
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
        if found != guess:
            guess = found
            depth = find_path(model.left, model.right, guess, nodes, rights)


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
