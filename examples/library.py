"""Uses single stages as a library, on a small table in memory: `python examples/library.py`.

Each stage is a function of an Arrow table and its settings. It returns the kept rows and the dropped rows; each dropped
row has a reason. Settings are checked when they are created: `CleanSettings(max_chars=-1)` is an error.
"""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
from build import Corpus, Phrasebook, evaluation_items  # makes the noisy example data; it is beside this script

from corpusprep import Outcome
from corpusprep.stages.balance import BalanceSettings, balance
from corpusprep.stages.clean import CleanSettings, clean
from corpusprep.stages.dedup import DedupSettings, EvaluationIndex, dedup
from corpusprep.stages.instruct import InstructSettings, instruct
from corpusprep.stages.langid import LangidSettings, langid
from corpusprep.stages.quality import QualitySettings, quality

BOOK = Phrasebook.read()
EVALUATION = evaluation_items(BOOK, 20, seed=1)


def example_table(language: str, rows: int) -> pa.Table:
    """Rows of English and another language. A stage needs the first four columns, and keeps all others."""
    made = Corpus(BOOK, language, EVALUATION, seed=1).shard(rows)
    # An Arrow string cannot hold bytes that are not UTF-8. The file readers reject such rows; here we remove them.
    made = [row for row in made if row.label != "malformed"]
    return pa.table(
        {
            "src": [row.english for row in made],
            "tgt": [row.other for row in made],
            "src_lang": ["en"] * len(made),
            "tgt_lang": [language] * len(made),
            "label": [row.label for row in made],
        }
    )


def show(stage: str, outcome: Outcome) -> pa.Table:
    """Prints the result of a stage, with one dropped row for each reason. Returns the kept rows."""
    kept, dropped = outcome
    print(f"\n{stage}: kept {kept.num_rows}, dropped {dropped.num_rows}")
    rows = dropped.to_pylist()
    for reason, count in Counter(row["reason"] for row in rows).most_common():
        row = next(row for row in rows if row["reason"] == reason)
        print(f"  {count:4} {reason:22} {row['label']}: {row['src'][:36]!r} | {row['tgt'][:36]!r}")
    return kept


def main() -> None:
    table = pa.concat_tables([example_table("de", 600), example_table("sw", 600)])
    print(f"{table.num_rows} rows, of which {table['label'].to_pylist().count('clean')} are clean")

    table = show("clean", clean(table, CleanSettings(length_ratio=2.5)))
    table = show("langid", langid(table, LangidSettings(evidence=0.3)))

    settings = DedupSettings(max_distance=3)
    tests = [pa.array([BOOK.text(item, language) for item in EVALUATION]) for language in ("en", "de", "sw")]
    table = show("dedup", dedup(table, settings, index=EvaluationIndex.from_texts(tests, settings)))

    table = show("quality", quality(table, QualitySettings(scorer="lexical", threshold=0.3)))

    how = InstructSettings(format="messages", directions="both")
    table = show("balance", balance(table, BalanceSettings(budget=50_000), instruct=how))
    examples = show("instruct", instruct(table, how))

    print("\nThe first example:")
    for message in examples["messages"][0].as_py():
        print(f"  {message['role']}: {message['content']!r}")


if __name__ == "__main__":
    main()
