"""The data set that is trained on: the mix as tokens, packed, made by as many processes as it pays."""

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
_WORTH_A_PROCESS = 20_000  # examples: what one tokenises while another starts


@dataclass(frozen=True)
class Tokenised:
    """What became of examples.

    Attributes:
        examples, tokens: how many there are.
        answer_tokens: tokens that bear loss.
        too_long, without_answer: examples left out since they are longer than a sequence, or hold nothing to learn.
        longest: tokens of the longest that was kept.
        sequences: of the data set; fewer than examples where they are packed.
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
    """A stretch of the mix, and the folder that its part of the data set becomes."""

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
    """Writes the tokens of examples: the same, whatever the workers.

    Args:
        files: of a mix.
        model: whose tokenizer and template it is.
        arguments: of the template.
        longest: tokens of an example, at most, and of a sequence; longer ones are left out and counted.
        packing: several examples share a sequence.
        out: the folder to make, of data sets that `open_parts` joins.
        limit: examples to take, from the first.
        workers: processes; by default as many as there are cores, where there is enough to do.
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
    """Makes one part of the data set, unless it is empty."""
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
        if task.packing:  # all at once: the fewer there are to choose from, the more of the last sequences stays empty
            rows = pack_dataset(rows, task.longest, "bfd", {"batch_size": len(rows), "keep_in_memory": True})
        rows.save_to_disk(task.output)
    finally:
        datasets.enable_progress_bars()
    return found + Tokenised(sequences=len(rows) - found.sequences)


def open_parts(folder: str | Path) -> Any:
    """The data set of the folder that `tokenise` made."""
    import datasets

    return datasets.concatenate_datasets(
        [datasets.load_from_disk(str(part)) for part in sorted(Path(folder).iterdir())]
    )
