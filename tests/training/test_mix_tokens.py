"""From the mix to tokens: formats, templates, and where the loss lies."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny_model import TEMPLATE, save_tokenizer

from corpusprep.errors import InputError, RunError
from corpusprep.report import Progress
from corpusprep.training.examples import IGNORED, Encoder, conversations, find_mix, tokenise

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
    with pytest.raises(InputError, match="holds no train"):
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
    with pytest.raises(RunError, match="makes one token of the end of the prompt"):
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
    encoder = Encoder(tokenizer, {"enable_thinking": False})
    size = len(one(encoder, CHAT)[0])
    found = tokenise([tmp_path / "train.jsonl"], encoder, 200, tmp_path / "out.arrow", Progress())
    assert (found.examples, found.too_long, found.tokens, found.longest) == (2, 1, 2 * size, size)
    with pa.OSFile(str(tmp_path / "out.arrow")) as file:
        table = pa.ipc.open_stream(file).read_all()
    assert table["input_ids"].to_pylist() == [list(map(int, one(encoder, CHAT)[0]))] * 2
    assert found.answer_tokens == 2 * sum(label != IGNORED for label in table["labels"][0].as_py())
