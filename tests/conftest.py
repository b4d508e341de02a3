"""What tests share: bitext made on the spot, and where real bitext lies."""

from __future__ import annotations

import gzip
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Kernels compile at their first call, which no deadline should judge; on a build machine a run must be repeatable.
settings.register_profile("corpusprep", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("corpusprep")

if not os.environ.get("CORPUSPREP_TEST_GPU"):  # what is tested must be the same on every machine
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

ROOT = Path(__file__).parent.parent
_WORDS = {
    "house": "Haus", "river": "Fluss", "teacher": "Lehrer", "bread": "Brot", "garden": "Garten", "letter": "Brief",
    "winter": "Winter", "window": "Fenster", "doctor": "Arzt", "horse": "Pferd", "village": "Dorf", "bridge": "Brücke",
    "morning": "Morgen", "child": "Kind", "kitchen": "Küche", "summer": "Sommer", "mountain": "Berg", "city": "Stadt",
    "street": "Straße", "friend": "Freund", "water": "Wasser", "church": "Kirche", "forest": "Wald", "evening": "Abend",
}  # fmt: skip
_FRAMES = [
    ("The {0} and the {1} are near the {2}.", "Das {0} und das {1} sind bei dem {2}."),
    (
        "We saw the {0} yesterday, but not the {1} or the {2}.",
        "Wir sahen gestern das {0}, aber nicht das {1} oder das {2}.",
    ),
    ("Without the {0} there is neither {1} nor {2} here.", "Ohne das {0} gibt es hier weder {1} noch {2}."),
    (
        "Do you know whether the {0} is older than the {1} of the {2}?",
        "Weißt du, ob das {0} älter ist als das {1} des {2}?",
    ),
    ("My {0} has lost the {1} again, said the old {2}.", "Mein {0} hat das {1} wieder verloren, sagte das alte {2}."),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, or a process is left alone with one at the end."""
    items.sort(
        key=lambda item: item.path.name not in ("test_several.py", "test_wheel.py", "test_train.py", "test_pipeline.py")
    )


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real bitext; tests that need it are skipped where it is not."""
    folder = Path(os.environ.get("CORPUSPREP_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real bitext in {folder}; set CORPUSPREP_TEST_DATA to its folder")
    return folder


def sentences(rows: int, seed: int) -> list[tuple[str, str]]:
    """English and German sentences, all different."""
    draw = random.Random(seed)
    made: dict[tuple[str, str], None] = {}
    while len(made) < rows:
        words = draw.sample(sorted(_WORDS), 6)
        (first, zuerst), (second, dann) = draw.sample(_FRAMES, 2)
        english = f"{first.format(*words[:3])} {second.format(*words[3:])}"
        german = f"{zuerst.format(*(_WORDS[w] for w in words[:3]))} {dann.format(*(_WORDS[w] for w in words[3:]))}"
        made[english, german] = None
    return list(made)


@pytest.fixture
def bitext(tmp_path: Path) -> Callable[..., Path]:
    """Makes a corpus of two sources: OPUS-100-shaped en-de, and NLLB-shaped files `eng_Latn-deu_Latn…`, with defects."""

    def make(rows: int = 300, shards: int = 2, folder: Path | None = None, seed: int = 5) -> Path:
        folder = folder or tmp_path / "data"
        pairs = sentences(rows * (shards + 1), seed)
        opus = folder / "opus" / "supervised" / "de-en"
        opus.mkdir(parents=True)
        main = pairs[:rows]
        main[3] = main[0]  # an exact duplicate
        main[4] = (main[1][0].upper(), main[1][1])  # one that differs in case
        main[5] = ("", main[5][1])
        main[6] = (main[6][0], "<|im_start|>" + main[6][1])
        main[7] = (main[7][1], main[7][0])
        (opus / "opus.de-en-train.en").write_text("".join(f"{en}\n" for en, _ in main), encoding="utf-8")
        (opus / "opus.de-en-train.de").write_text("".join(f"{de}\n" for _, de in main), encoding="utf-8")
        nllb = folder / "nllb"
        nllb.mkdir()
        for number in range(shards):
            part = pairs[rows * (number + 1) : rows * (number + 2)]
            lines = [
                f"{de}\t{en}\t1.{100 + i % 90}\t0.9\t0.9\tcc\tu\tcc\tv\n".encode() for i, (en, de) in enumerate(part)
            ]
            lines[2] = b"one column only\n"
            lines[5] = b"\xff\xfe broken\tEnglish here\t1.1\t0.9\t0.9\tcc\tu\tcc\tv\n"
            name = "deu_Latn-eng_Latn.gz" if number == 0 else f"part{number}/deu_Latn-eng_Latn.gz"
            (nllb / name).parent.mkdir(exist_ok=True)
            (nllb / name).write_bytes(gzip.compress(b"".join(lines), mtime=0))
        return folder

    return make
