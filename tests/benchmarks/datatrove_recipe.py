"""A recipe of datatrove for each side of pairs: rules, language, near duplicates. Run by its own environment, for `recipes.py`.

    python datatrove_recipe.py INPUT OUTPUT MODEL SIDE ...

INPUT/SIDE/*.jsonl has documents of one language; what is left of them is in OUTPUT/SIDE/good.
"""

from __future__ import annotations

import sys
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import FastTextClassifierFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

PROCESSES = 2


def done(folder: str, name: str, tasks: int, *steps: Any) -> None:
    logs = f"{folder}/logs/{name}"
    LocalPipelineExecutor(list(steps), tasks=tasks, workers=PROCESSES, logging_dir=logs, skip_completed=False).run()


def one_side(source: str, folder: str, model: str, side: str) -> None:
    config = MinhashConfig()
    done(
        folder, "clean", PROCESSES,
        JsonlReader(source),
        # A sentence has so few words that two of them are always a large share.
        GopherRepetitionFilter(top_n_grams=(), language=side),
        GopherQualityFilter(min_doc_words=1, max_doc_words=400, min_avg_word_length=2, max_avg_word_length=15,
                            min_stop_words=None, language=side),
        FastTextClassifierFilter(model, keep_labels=[(side, 0.2)], save_labels_in_metadata=False),
        JsonlWriter(f"{folder}/clean", compression=None),
    )  # fmt: skip
    done(folder, "signatures", PROCESSES, JsonlReader(f"{folder}/clean"),
         MinhashDedupSignature(f"{folder}/signatures", config, language=side))  # fmt: skip
    done(folder, "buckets", config.num_buckets,
         MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config))  # fmt: skip
    done(folder, "clusters", 1, MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove", config=config))
    done(folder, "good", PROCESSES, JsonlReader(f"{folder}/clean"), MinhashDedupFilter(f"{folder}/remove"),
         JsonlWriter(f"{folder}/good", compression=None))  # fmt: skip


if __name__ == "__main__":
    source, output, model, *sides = sys.argv[1:]
    for side in sides:
        one_side(f"{source}/{side}", f"{output}/{side}", model, side)
