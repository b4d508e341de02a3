"""Which of several duplicates stays: the best-formed, then the earliest."""

from __future__ import annotations

import pyarrow as pa
import pytest

from corpusprep.stages.dedup import DedupSettings, dedup, flaws


def table(*rows: tuple[str, str]) -> pa.Table:
    return pa.table(
        {
            "src": [src for src, _ in rows],
            "tgt": [tgt for _, tgt in rows],
            "src_lang": ["en"] * len(rows),
            "tgt_lang": ["de"] * len(rows),
        }
    )


@pytest.mark.parametrize(
    ("src", "tgt", "expected"),
    [
        ("I see.", "Ich sehe.", 0),
        ("I see", "Ich sehe.", 1),
        ("I SEE IT.", "Ich sehe es.", 1),
        ("- I see.", "Ich sehe.", 1),
        ("I see .", "Ich sehe.", 1),
        ("I see!", "Ich sehe.", 1),
        ("I see...", "Ich sehe.", 1),
        ("I see…", "Ich sehe...", 0),
        ("- I SEE", "ICH SEHE ES", 5),
        ("She asked: “Why?”", "Sie fragte: „Warum?“", 0),
        ("Do you see?", "你看见了吗？", 0),
        ("I see.", "मैं देखता हूँ।", 0),
        ("I see.", "أرى.", 0),
        ("", "", 2),
        ("😀", "Я", 2),
    ],
)
def test_flaws(src: str, tgt: str, expected: int) -> None:
    assert flaws(table((src, tgt))).tolist() == [expected]


def test_the_original_outranks_a_damaged_copy_that_comes_first() -> None:
    rows = table(
        ("- WHERE IS THE OLD STATION", "Wo ist der alte Bahnhof?"),
        ("Where is the old station?", "Wo ist der alte Bahnhof?"),
        ("Where is the old station?", "Wo ist der alte Bahnhof?"),
    )
    kept, dropped = dedup(rows)
    assert kept["src"].to_pylist() == ["Where is the old station?"]
    assert dropped["reason"].to_pylist() == ["dedup.exact", "dedup.exact"]
    first, _ = dedup(rows, DedupSettings(keep="first"))
    assert first["src"].to_pylist() == ["- WHERE IS THE OLD STATION"]


def test_every_length_of_character_is_read() -> None:
    texts = ["é", "ह", "𝄞", "a" * 10_000 + ".", "𝄞" * 999 + "。", "\U0010ffff!"]
    assert flaws(table(*[(text, text) for text in texts])).shape == (6,)
