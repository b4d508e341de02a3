"""From the mix to tokens: formats, templates, and where the loss lies."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_model import TEMPLATE, save_tokenizer

from corpusprep.errors import InputError, RunError
from corpusprep.report.progress import Progress
from corpusprep.training import examples
from corpusprep.training.dataset import open_parts, tokenise
from corpusprep.training.examples import IGNORED, Encoder, count, find_mix, portions

CHAT = [
    {"role": "user", "content": "Translate into German: the old house"},
    {"role": "assistant", "content": "das alte Haus"},
]
FORMATS = {
    "messages": {"messages": CHAT},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": CHAT[0]["content"]},
            {"from": "gpt", "value": CHAT[1]["content"]},
        ]
    },
    "prompt_completion": {"prompt": CHAT[0]["content"], "completion": CHAT[1]["content"]},
    "alpaca": {"instruction": "Translate into German:", "input": "the old house", "output": CHAT[1]["content"]},
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return save_tokenizer(tmp_path / "tokenizer", [m["content"] for m in CHAT] * 3)


def save_untrained(folder: Path) -> str:
    """A model's folder, less its weights, beside its tokenizer."""
    from transformers import Qwen3Config

    Qwen3Config(vocab_size=512, hidden_size=16, num_hidden_layers=1).save_pretrained(folder)
    return str(folder)


def conversations(files: Sequence[Path]) -> Iterator[tuple[str, list[list[dict[str, str]]]]]:
    return examples.conversations(portions(files))


def one(encoder: Encoder, chat: list[dict[str, str]]) -> Any:
    return encoder.encode([chat], "here")[0]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("container", ["parquet", "jsonl"])
def test_every_format_of_the_mix_is_read(tmp_path: Path, name: str, container: str) -> None:
    rows = [FORMATS[name]] * 3
    if container == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train-0.parquet")
    else:
        (tmp_path / "train-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mix = find_mix(tmp_path)
    (where, chats), *rest = conversations(mix.train)
    assert not rest
    assert where.endswith(f"train-0.{container}, row 0")
    assert len(chats) == 3
    wanted = [dict(turn) for turn in CHAT]
    if name == "alpaca":
        wanted[0]["content"] = "Translate into German:\nthe old house"
    assert chats[0] == wanted


def test_a_system_prompt_is_a_turn(tmp_path: Path) -> None:
    row = {"system": "You translate.", **FORMATS["prompt_completion"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    chats = next(conversations([tmp_path / "a.jsonl"]))[1]
    assert [turn["role"] for turn in chats[0]] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "no example"},
        {"messages": CHAT[:1]},
        {"messages": None},
        {"prompt": "a", "completion": 3},
        7,
        "abc",
        {"prompt": "a", "completion": "\ud800"},
    ],
)
def test_a_row_that_is_no_example_is_named(tmp_path: Path, row: Any) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(FORMATS["messages"]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=r"a\.jsonl, row 1: "):
        list(conversations([tmp_path / "a.jsonl"]))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no train"):
        find_mix(tmp_path)
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match=r"train-0\.parquet: cannot be read"):
        list(conversations(find_mix(tmp_path).train))
    (tmp_path / "a.jsonl").write_text('{"messages": \n')
    with pytest.raises(InputError, match=r"a\.jsonl, row 0: is not JSON"):
        list(conversations([tmp_path / "a.jsonl"]))


def test_the_answer_alone_bears_loss(tokenizer: Any) -> None:
    ids, labels = one(Encoder(tokenizer, {"enable_thinking": False}), CHAT)
    assert tokenizer.decode(ids[-1:]) == "\n"
    assert labels[-1] == IGNORED  # the template's
    answer = [int(i) for i, label in zip(ids, labels, strict=True) if label != IGNORED]
    assert tokenizer.decode(answer) == "das alte Haus<|im_end|>"
    assert (labels[labels != IGNORED] == ids[labels != IGNORED]).all()
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert tokenizer.decode(ids[: (labels != IGNORED).argmax()]) == prompt
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_a_template_that_asks_in_another_way_than_it_answers_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE.replace("assistant\\n' -}}{%- if", "assistant: ' -}}{%- if")
    with pytest.raises(RunError, match="enable_thinking = false"):
        one(Encoder(tokenizer, {}), CHAT)


def test_with_thinking_the_empty_thought_is_learned(tokenizer: Any) -> None:
    ids, labels = one(Encoder(tokenizer, {}), CHAT)
    assert tokenizer.decode(ids[labels != IGNORED]) == "<think>\n\n</think>\n\ndas alte Haus<|im_end|>"


def test_a_prompt_that_ends_within_a_token_is_refused(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(
        tmp_path / "t",
        [" das alte Haus"] * 9,
        template="{% for m in messages %}{{ m.role }}: {% if "
        "m.role == 'user' or true %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    )
    with pytest.raises(RunError, match="merges the end of the prompt"):
        one(Encoder(tokenizer, {}), CHAT)


def test_a_tokenizer_without_template_is_refused(tmp_path: Path) -> None:
    plain = save_tokenizer(tmp_path / "plain", ["a b c"], template=None)
    with pytest.raises(RunError, match="has no chat template"):
        Encoder(plain, {})


def test_a_template_that_fails_is_named(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system prompt here') }}"
    with pytest.raises(RunError, match=r"here: the chat template of .* fails: no system prompt here"):
        one(Encoder(tokenizer, {}), CHAT)


def test_examples_that_are_too_long_are_left_out_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    long = [CHAT[0], {"role": "assistant", "content": "das alte Haus " * 60}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in [CHAT, long, CHAT]))
    arguments = {"enable_thinking": False}
    encoder = Encoder(tokenizer, arguments)
    size = len(one(encoder, CHAT)[0])
    model = save_untrained(tmp_path / "tokenizer")
    for packing in (False, True):
        out = tmp_path / f"packed-{packing}"
        found = tokenise([tmp_path / "train.jsonl"], model, arguments, 200, packing, out, Progress())
        assert (found.examples, found.too_long, found.tokens, found.longest) == (2, 1, 2 * size, size)
        assert found.answer_tokens == 2 * sum(label != IGNORED for label in one(encoder, CHAT)[1])
        rows = open_parts(out)
        assert len(rows) == found.sequences == (1 if packing else 2)
        ids = list(map(int, one(encoder, CHAT)[0]))
        assert rows["input_ids"][:] == ([ids * 2] if packing else [ids] * 2)
        if packing:
            assert rows["seq_lengths"][:] == [[size, size]]


@pytest.mark.parametrize("container", ["parquet", "jsonl"])
def test_files_are_cut_into_stretches(
    tmp_path: Path, tokenizer: Any, container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of processes, the same tokens come in the same order."""
    monkeypatch.setattr(examples, "_PORTION_ROWS", 30)
    monkeypatch.setattr(examples, "_PORTION_BYTES", 6000)
    rows = [
        {"messages": [CHAT[0], {"role": "assistant", "content": "das alte Haus " * (k % 7 + 1) + str(k)}]}
        for k in range(400)
    ]
    files = [tmp_path / f"train-{number}.{container}" for number in (0, 1)]
    for file, part in zip(files, (rows[:250], rows[250:]), strict=True):
        if container == "parquet":
            pq.write_table(pa.Table.from_pylist(part), file, row_group_size=20)
        else:  # the last line has no end
            file.write_text("\n".join(json.dumps(row) for row in part))
    cut = list(portions(files))
    assert len(cut) > 8
    assert sum(portion.rows for portion in cut) == count(files) == 400
    assert next(portion.row for portion in cut if portion.file == files[1]) == 0
    found = [chat for _, chats in conversations(files) for chat in chats]
    assert found == [row["messages"] for row in rows]
    few = list(portions(files, 263))
    assert sum(portion.rows for portion in few) == 263
    assert [chat for _, chats in examples.conversations(few) for chat in chats] == found[:263]
    model = save_untrained(tmp_path / "tokenizer")
    made = []
    for workers in (1, 2):
        out = tmp_path / f"by-{workers}"
        counts = tokenise(files, model, {"enable_thinking": False}, 128, True, out, Progress(), workers=workers)
        made.append((counts, open_parts(out)["input_ids"][:]))
    assert made[0] == made[1]
    assert made[0][0].examples == 400
    assert sum(map(len, made[0][1])) == made[0][0].tokens


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("normalizer", [None, "NFC"])
def test_the_prompt_has_the_tokens_that_it_has_alone(tmp_path: Path, trim: bool, normalizer: str | None) -> None:
    """Held against the tokenizer itself, for text of every kind."""
    from tokenizers import normalizers, processors

    draw = random.Random(1)
    pieces = [
        "das",
        " Haus",
        "  ",
        "\n",
        "\n\n",
        "ü",
        "u\u0308",
        "日本",
        "🙂",
        "\u0301e",
        "<think>",
        "1984",
        "\t",
        "ß. ",
        "'s",
    ]
    texts = ["".join(draw.choices(pieces, k=draw.randint(1, 8))) for _ in range(600)]
    tokenizer = save_tokenizer(tmp_path / "tokenizer", texts, 500)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    encoder = Encoder(tokenizer, {"enable_thinking": False})
    for k in range(0, 600, 2):
        chat = [{"role": "user", "content": texts[k]}, {"role": "assistant", "content": texts[k + 1]}]
        asked, full = (
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=begin, enable_thinking=False)
            for turns, begin in ((chat[:1], True), (chat, False))
        )
        alone, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, full))
        if whole[: len(alone)] != alone:  # the answer begins with what joins the end of the prompt
            with pytest.raises(RunError, match="merges the end of the prompt"):
                encoder.encode([chat], "here")
            continue
        [(ids, labels)] = encoder.encode([chat], "here")
        assert ids.tolist() == whole
        assert labels[: len(alone)].tolist() == [IGNORED] * len(alone)
        assert labels[len(alone) : -1].tolist() == whole[len(alone) : -1]  # up to the mark of its end
        assert labels[-1] == IGNORED  # the line's end behind it


def test_an_error_names_the_row_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "_PORTION_BYTES", 500)
    lines = [json.dumps({"messages": CHAT}) for _ in range(50)]
    lines[33] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    assert len(list(portions([tmp_path / "a.jsonl"]))) > 5
    with pytest.raises(InputError, match="is not JSON") as raised:
        list(conversations([tmp_path / "a.jsonl"]))
    assert raised.value.row == 33
