"""The training data set: the mix, tokenised and packed by several processes."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from corpusprep.engines.local import LocalEngine
from corpusprep.report.progress import Progress
from corpusprep.training.examples import IGNORED, Encoder, Portion, conversations, portions

_SCHEMA: Any = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
_WORTH_A_PROCESS = 20_000  # examples that one process tokenises while another starts


@dataclass(frozen=True)
class Tokenised:
    """Counts of tokenised examples.

    Attributes:
        examples, tokens: number of examples kept, and of their tokens.
        answer_tokens: tokens with a loss.
        too_long, without_answer: examples left out because they exceed a sequence, or have no token with a loss.
        longest: tokens of the longest example kept.
        sequences: sequences of the data set; fewer than examples if they are packed.
    """

    examples: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    too_long: int = 0
    without_answer: int = 0
    longest: int = 0
    sequences: int = 0

    def __add__(self, other: Tokenised) -> Tokenised:
        sums = {name: value + vars(other)[name] for name, value in vars(self).items()}
        return Tokenised(**sums | {"longest": max(self.longest, other.longest)})


@dataclass(frozen=True)
class TokeniseTask:
    """A portion of the mix, and the folder for its part of the data set."""

    portion: Portion
    longest: int
    packing: bool
    output: str


def tokenise(
    files: Sequence[Path],
    model: str,
    arguments: Mapping[str, Any],
    longest: int,
    packing: bool,
    out: Path,
    progress: Progress,
    limit: int | None = None,
    workers: int | None = None,
) -> Tokenised:
    """Tokenises examples into a data set. The result does not depend on the number of workers.

    Args:
        files: files of a mix.
        model: the model whose tokenizer and chat template are used.
        arguments: arguments of the chat template.
        longest: tokens per sequence; longer examples are left out and counted.
        packing: whether several examples share a sequence.
        out: folder to create, with data sets that `open_parts` joins.
        limit: number of examples to take, from the first.
        workers: processes; by default one per core, fewer for a small mix.
    """
    stretches = list(portions(files, limit))
    total = sum(portion.rows for portion in stretches)
    if workers is None:
        workers = min(os.cpu_count() or 1, len(stretches), 1 + total // _WORTH_A_PROCESS)
    tasks = [TokeniseTask(p, longest, packing, str(out / f"{k:05}")) for k, p in enumerate(stretches)]
    out.mkdir(parents=True)
    found = Tokenised()
    progress.start("tokenise", total, "examples")
    with LocalEngine(max(workers, 1)) as engine:
        opened = functools.partial(open_encoder, model, dict(arguments))
        for task, part in zip(tasks, engine.map(run_tokenise, tasks, setup=opened, ordered=True), strict=True):
            found += part
            progress.advance(task.portion.rows)
    progress.end()
    return found


def open_encoder(model: str, arguments: Mapping[str, Any]) -> Encoder:
    from corpusprep.training.plan import open_tokenizer

    return Encoder(open_tokenizer(model), arguments)


def run_tokenise(encoder: Encoder, task: TokeniseTask) -> Tokenised:
    """Writes one part of the data set, unless it is empty."""
    import datasets
    from trl.data_utils import pack_dataset

    found, batches = Tokenised(), []
    for where, chats in conversations([task.portion]):
        encoded = encoder.encode(chats, where)
        short = [pair for pair in encoded if len(pair[0]) <= task.longest]
        kept = [pair for pair in short if (pair[1] != IGNORED).any()]
        sizes = np.array([len(ids) for ids, _ in kept], np.int64)
        found += Tokenised(
            examples=len(kept),
            tokens=int(sizes.sum()),
            answer_tokens=sum(int((labels != IGNORED).sum()) for _, labels in kept),
            too_long=len(encoded) - len(short),
            without_answer=len(short) - len(kept),
            longest=int(sizes.max(initial=0)),
            sequences=len(kept),
        )
        if kept:
            offsets: Any = pa.array(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))
            columns: list[Any] = [
                pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([pair[side] for pair in kept])))
                for side in (0, 1)
            ]
            batches.append(pa.record_batch(columns, schema=_SCHEMA))
    if not batches:
        return found
    rows: Any = datasets.Dataset(pa.Table.from_batches(batches))
    datasets.disable_progress_bars()
    try:
        if task.packing:  # all in one batch: smaller batches leave more empty space in their last sequences
            rows = pack_dataset(rows, task.longest, "bfd", {"batch_size": len(rows), "keep_in_memory": True})
        rows.save_to_disk(task.output)
    finally:
        datasets.enable_progress_bars()
    return found + Tokenised(sequences=len(rows) - found.sequences)


def open_parts(folder: str | Path) -> Any:
    """Opens the data set that `tokenise` wrote."""
    import datasets

    return datasets.concatenate_datasets(
        [datasets.load_from_disk(str(part)) for part in sorted(Path(folder).iterdir())]
    )
