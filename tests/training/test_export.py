"""The stages as LLaMA-Factory's files: what they say, what cannot be said, and that LLaMA-Factory reads them so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import yaml  # noqa: E402
from conftest import sentences  # noqa: E402
from tiny_model import TEMPLATE, save_model, save_tokenizer  # noqa: E402

from corpusprep.errors import InputError, RunError, SettingsError  # noqa: E402
from corpusprep.stages import instruct  # noqa: E402
from corpusprep.training.examples import Encoder, conversations, find_mix, portions  # noqa: E402
from corpusprep.training.export import FORMS, export_llamafactory  # noqa: E402
from corpusprep.training.layers import select  # noqa: E402
from corpusprep.training.plan import open_config, open_tokenizer, skeleton  # noqa: E402
from corpusprep.training.settings import TrainSettings, TrainStage  # noqa: E402

FORMATS = ("messages", "sharegpt", "prompt_completion", "alpaca")
CHATML = TEMPLATE.replace("<think>\\n\\n</think>\\n\\n", "")
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
TEMPLATES = {
    "qwen3": TEMPLATE,
    "chatml": CHATML,
    "qwen": "{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\\n" + QWEN + "<|im_end|>\\n' -}}{%- endif -%}" + CHATML,
    "llama3": (
        "{%- for message in messages -%}{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content "
        "+ '<|eot_id|>' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
    ),
    "other": (
        "{%- for message in messages -%}{{- '[' + message.role + ']' + message.content + '<|im_end|>' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '[assistant]' -}}{%- endif -%}"
    ),
    "open": "{%- for m in messages -%}{{- m.role + ': ' + m.content -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant: <think>' -}}{%- endif -%}",
}  # fmt: skip


def write_mix(
    folder: Path, form: str = "messages", system: str | None = None, container: str = "parquet",
    rows: tuple[int, ...] = (30, 20), held_out: tuple[int, ...] = (12,),
) -> Path:  # fmt: skip
    """A mix as the instruct stage writes it, of so many pairs a file."""
    pairs = iter(sentences(sum(rows) + sum(held_out), 5))
    settings = instruct.InstructSettings(format=form, system=system, directions="forward")
    for name, sizes in (("train", rows), ("validation/validation", held_out)):
        for number, size in enumerate(sizes):
            chosen = [next(pairs) for _ in range(size)]
            table = pa.table(
                {
                    "src": pa.array([english for english, _ in chosen], pa.string()),
                    "tgt": pa.array([german for _, german in chosen], pa.string()),
                    "src_lang": pa.array(["en"] * size, pa.string()),
                    "tgt_lang": pa.array(["deu_Latn"] * size, pa.string()),
                }
            )
            path = folder / f"{name}-{number:05d}-of-{len(sizes):05d}.{container}"
            path.parent.mkdir(parents=True, exist_ok=True)
            instruct.write(instruct.instruct(table, settings, 1).kept, path, container)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a mix and a model of 8 layers."""
    folder = tmp_path_factory.mktemp("export")
    write_mix(folder / "mix")
    texts = [text for pair in sentences(200, 9) for text in pair]
    save_model(folder / "model", len(save_tokenizer(folder / "model", texts, 400)))
    return folder


def settings(model: Path, *stages: TrainStage, **more: Any) -> TrainSettings:
    asked: dict[str, Any] = {
        "model": str(model), "stages": stages or (TrainStage(layers="bottom:2"), TrainStage(layers="top:3")),
        "sequence_length": 256, "batch_tokens": 2048, "processes": 1, "precision": "fp32",
    }  # fmt: skip
    return TrainSettings(**{**asked, **more})


def read(folder: Path, number: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / f"stage-{number}.yaml").read_text(encoding="utf-8"))
    return found


def data_sets(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "dataset_info.json").read_bytes().decode("ascii"))
    return found


def with_template(place: Path, folder: Path, name: str) -> Path:
    """The model with another chat template."""
    shutil.copytree(place / "model", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    return folder


def test_each_stage_has_its_keys_and_starts_from_the_one_before(place: Path, tmp_path: Path) -> None:
    first = TrainStage(layers="bottom:2", learning_rate=3e-5, min_learning_rate=1e-6, epochs=2)
    second = TrainStage(layers="top:3", schedule="linear", warmup=0.1)
    third = TrainStage(layers="all", schedule="constant")
    asked = settings(
        place / "model", first, second, third, precision="auto", max_steps=7, weight_decay=0.01, max_grad_norm=0.5,
        checkpoint_steps=40, log_steps=5, validation_examples=9,
    )  # fmt: skip
    files = export_llamafactory(asked, place / "mix", tmp_path / "lf", seed=11)
    assert [file.name for file in files] == [
        "dataset_info.json", "stage-1.yaml", "stage-2.yaml", "stage-3.yaml", "README.md",
    ]  # fmt: skip
    assert sorted(files) == sorted((tmp_path / "lf").iterdir())
    one, two, three = (read(tmp_path / "lf", number) for number in (1, 2, 3))
    assert one == {
        "model_name_or_path": str(place / "model"),
        "flash_attn": "auto",
        "disable_gradient_checkpointing": True,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "freeze",
        "freeze_trainable_layers": -2,
        "freeze_trainable_modules": "all",
        "dataset_dir": str(tmp_path / "lf"),
        "dataset": "train-00000,train-00001",
        "eval_dataset": "validation-00000",
        "template": "qwen3",
        "enable_thinking": False,
        "cutoff_len": 256,
        "packing": True,
        "neat_packing": True,
        "preprocessing_batch_size": 10_000,
        "preprocessing_num_workers": 8,
        "mask_history": True,
        "output_dir": str(tmp_path / "lf" / "stage-1"),
        "logging_steps": 5,
        "logging_first_step": True,
        "save_strategy": "steps",
        "save_steps": 40,
        "save_total_limit": 1,
        "plot_loss": True,
        "report_to": "none",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "learning_rate": 3e-5,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-6},
        "warmup_ratio": 0.03,
        "num_train_epochs": 2.0,
        "max_steps": 7,
        "optim": "adamw_torch",
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        "bf16": True,
        "pure_bf16": False,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "seed": 11,
        "data_seed": 11,
        "ddp_timeout": 180_000_000,
        "do_eval": True,
        "eval_on_start": True,
        "per_device_eval_batch_size": 1,
    }
    own = {
        "model_name_or_path": str(tmp_path / "lf" / "stage-1"), "output_dir": str(tmp_path / "lf" / "stage-2"),
        "freeze_trainable_layers": 3, "learning_rate": 1e-5, "lr_scheduler_type": "linear", "warmup_ratio": 0.1,
        "num_train_epochs": 1.0,
    }  # fmt: skip
    assert two == {key: value for key, value in one.items() if key != "lr_scheduler_kwargs"} | own
    assert three["model_name_or_path"] == two["output_dir"]
    assert (three["freeze_trainable_layers"], three["lr_scheduler_type"]) == (8, "constant_with_warmup")
    told = (tmp_path / "lf" / "README.md").read_text()
    assert f"cd {tmp_path / 'lf'}\n" in told
    assert [line for line in told.splitlines() if line.startswith("$ llamafactory-cli")] == [
        f"$ llamafactory-cli train stage-{number}.yaml" for number in (1, 2, 3)
    ]
    assert f"| 2 | 5 to 7 of 8, from 0 | `{tmp_path / 'lf' / 'stage-1'}` |" in told


def test_what_is_left_out_has_no_key(place: Path, tmp_path: Path) -> None:
    asked = settings(
        place / "model", validation_examples=0, gradient_checkpointing=False, attention="eager", seed=3, precision="bf16"
    )  # fmt: skip
    export_llamafactory(asked, place / "mix", tmp_path, seed=11)
    keys = read(tmp_path)
    assert {"eval_dataset", "do_eval", "max_steps", "gradient_checkpointing_kwargs"}.isdisjoint(keys)
    assert sorted(data_sets(tmp_path)) == ["train-00000", "train-00001"]
    assert (keys["disable_gradient_checkpointing"], keys["gradient_checkpointing"]) == (True, False)
    assert (keys["flash_attn"], keys["seed"], keys["data_seed"], keys["bf16"]) == ("disabled", 3, 3, True)


def test_paths_are_absolute(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    export_llamafactory(settings(Path("model")), "mix", os.path.relpath(tmp_path / "a é ${b}"))
    keys = read(tmp_path / "a é ${b}")
    assert keys["model_name_or_path"] == str(place / "model")
    assert keys["dataset_dir"] == str(tmp_path / "a é ${b}")
    assert data_sets(tmp_path / "a é ${b}")["train-00001"]["file_name"] == str(
        place / "mix" / "train-00001-of-00002.parquet"
    )


@pytest.mark.parametrize(
    ("layers", "modules", "trainable", "extra"),
    [
        ("bottom:2", (), -2, None),
        ("top:3", (), 3, None),
        ("0-2", (), -3, None),
        ("5-7", (), 3, None),
        ((7, 6), (), 2, None),
        ("bottom:8", (), 8, None),
        ("all", ("lm_head",), 8, "lm_head"),
        ("none", ("lm_head", "model.embed_tokens"), 0, "lm_head,embed_tokens"),
    ],
)
def test_layers_at_an_end_and_modules_that_a_name_tells(
    place: Path, tmp_path: Path, layers: Any, modules: tuple[str, ...], trainable: int, extra: str | None
) -> None:
    export_llamafactory(settings(place / "model", TrainStage(layers=layers, modules=modules)), place / "mix", tmp_path)
    keys = read(tmp_path)
    assert (keys["freeze_trainable_layers"], keys.get("freeze_extra_modules")) == (trainable, extra)


@pytest.mark.parametrize(
    ("layers", "modules", "told"),
    [
        ("2-4", (), 'stage 2: layers = "2-4": .* first or the last layers of a model, and of this model\'s 8'),
        ((0, 7), (), r"stage 2: layers = \[0, 7\]: "),
        (
            "top:2",
            ("model.norm",),
            r"stage 2: .*\[\"model.norm\"\]: .*'norm' would also train model.layers.0.self_attn.q_norm",
        ),
        ("none", ("model.layers.3.mlp",), "stage 2: .*cannot train mlp alone, only embed_tokens, lm_head, norm"),
        ("top:9", (), "the model has only 8 layers"),
        ("top:2", ("lm_haed",), "Did you mean 'lm_head'"),
    ],
)
def test_what_cannot_be_frozen_so_is_refused_and_nothing_written(
    place: Path, tmp_path: Path, layers: Any, modules: tuple[str, ...], told: str
) -> None:
    asked = settings(place / "model", TrainStage(layers="bottom:1"), TrainStage(layers=layers, modules=modules))
    with pytest.raises(SettingsError, match=told):
        export_llamafactory(asked, place / "mix", tmp_path / "lf")
    assert not (tmp_path / "lf").exists()


def test_other_settings_that_cannot_be_said(place: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="attention"):
        export_llamafactory(settings(place / "model", attention="flash_attention_3"), place / "mix", tmp_path / "lf")
    half = tmp_path / "half"
    shutil.copytree(place / "model", half)
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    with pytest.raises(SettingsError, match=r"precision = \"fp32\".*bfloat16"):
        export_llamafactory(settings(half), place / "mix", tmp_path / "lf")
    export_llamafactory(settings(half, precision="auto"), place / "mix", tmp_path / "lf")
    assert read(tmp_path / "lf")["bf16"] is True


COLUMNS = {
    "messages": {"messages": "messages"},
    "sharegpt": {"messages": "conversations"},
    "prompt_completion": {"prompt": "prompt", "response": "completion"},
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
}
TAGS = {
    "messages": ["role", "content", "user", "assistant", "system"],
    "sharegpt": ["from", "value", "human", "gpt", "system"],
}


@pytest.mark.parametrize("container", ["parquet", "jsonl"])
@pytest.mark.parametrize("system", [None, "You translate."])
@pytest.mark.parametrize("form", FORMATS)
def test_a_data_set_for_each_file(place: Path, tmp_path: Path, form: str, system: str | None, container: str) -> None:
    mix = write_mix(tmp_path / "mix", form, system, container, (4, 3), (2,))
    export_llamafactory(settings(place / "model"), mix, tmp_path / "lf")
    found = data_sets(tmp_path / "lf")
    assert {name: entry.pop("file_name") for name, entry in found.items()} == {
        "train-00000": str(mix / f"train-00000-of-00002.{container}"),
        "train-00001": str(mix / f"train-00001-of-00002.{container}"),
        "validation-00000": str(mix / "validation" / f"validation-00000-of-00001.{container}"),
    }
    columns = COLUMNS[form] | ({"system": "system"} if system and form not in TAGS else {})
    wanted: dict[str, Any] = {"formatting": "sharegpt" if form in TAGS else "alpaca", "columns": columns}
    if form in TAGS:
        names = ("role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag")
        wanted["tags"] = dict(zip(names, TAGS[form], strict=True))
    assert list(found.values()) == [wanted] * 3


def test_validation_is_limited_over_its_files_and_empty_files_are_no_data_sets(place: Path, tmp_path: Path) -> None:
    mix = write_mix(tmp_path / "mix", container="jsonl", rows=(0, 5), held_out=(4, 5, 6))
    assert (mix / "train-00000-of-00002.jsonl").stat().st_size == 0
    export_llamafactory(settings(place / "model", validation_examples=7), mix, tmp_path / "lf")
    found = data_sets(tmp_path / "lf")
    assert [(name, entry.get("num_samples")) for name, entry in found.items()] == [
        ("train-00000", None), ("validation-00000", None), ("validation-00001", 3),
    ]  # fmt: skip
    assert read(tmp_path / "lf")["eval_dataset"] == "validation-00000,validation-00001"


def test_a_mix_without_examples_or_of_another_format_is_refused(place: Path, tmp_path: Path) -> None:
    empty = write_mix(tmp_path / "empty", rows=(0,))
    with pytest.raises(InputError, match="no training examples"):
        export_llamafactory(settings(place / "model"), empty, tmp_path / "lf")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "train-0.jsonl").write_text('{"text": "It rains."}\n')
    with pytest.raises(InputError, match="is not an example in the format"):
        export_llamafactory(settings(place / "model"), tmp_path / "odd", tmp_path / "lf")


@pytest.mark.parametrize(
    ("name", "arguments", "template", "thinking"),
    [
        ("qwen3", {"enable_thinking": False}, "qwen3", False),
        ("qwen3", {}, "qwen3", True),
        ("chatml", {"enable_thinking": False}, "qwen3_nothink", None),
        ("qwen", {"enable_thinking": False}, "qwen", None),
        ("llama3", {}, "llama3", None),
        ("other", {"enable_thinking": False}, None, False),
        ("other", {}, None, True),
    ],
)
def test_the_template_that_renders_as_the_models_own(
    place: Path, tmp_path: Path, name: str, arguments: dict[str, Any], template: str | None, thinking: bool | None
) -> None:
    model = with_template(place, tmp_path / "model", name)
    for system in (None, "You translate."):
        mix = write_mix(tmp_path / f"mix {system}", system=system, rows=(3,))
        export_llamafactory(settings(model, template_arguments=arguments), mix, tmp_path / "lf")
        keys = read(tmp_path / "lf")
        assert (keys.get("template"), keys.get("enable_thinking")) == (template, thinking)
        assert ("add template: NAME" in (tmp_path / "lf" / "stage-1.yaml").read_text()) == (template is None)


def test_a_template_that_asks_otherwise_than_it_answers_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="renders the prompt differently"):
        export_llamafactory(settings(with_template(place, tmp_path / "m", "open")), place / "mix", tmp_path / "lf")


@pytest.mark.parametrize(
    ("more", "rows", "accumulation"),
    [
        ({}, 1, 8),
        ({"micro_batch": 4}, 4, 2),
        ({"micro_batch": 4, "processes": 2}, 4, 1),
        ({"processes": None, "batch_tokens": 2048 * max(1, torch.cuda.device_count())}, 1, 8),
        ({"micro_batch": 4, "attention": "flash_attention_2"}, 1, 8),  # LLaMA-Factory asserts batches of one there
    ],
)
def test_a_step_of_packed_sequences(
    place: Path, tmp_path: Path, more: dict[str, Any], rows: int, accumulation: int
) -> None:
    export_llamafactory(settings(place / "model", **more), place / "mix", tmp_path)
    keys = read(tmp_path)
    assert (keys["per_device_train_batch_size"], keys["gradient_accumulation_steps"]) == (rows, accumulation)
    assert keys["per_device_eval_batch_size"] == rows


def test_a_step_of_examples_has_the_tokens_that_are_asked(place: Path, tmp_path: Path) -> None:
    asked = settings(place / "model", packing=False, sequence_length=1024, batch_tokens=4096)
    export_llamafactory(asked, place / "mix", tmp_path)
    keys = read(tmp_path)
    assert (keys["packing"], keys["neat_packing"]) == (False, False)
    assert "preprocessing_batch_size" not in keys
    encoder = Encoder(open_tokenizer(asked.model), asked.template_arguments)
    chats = conversations(portions(find_mix(place / "mix").train))
    sizes = [len(ids) for where, some in chats for ids, _ in encoder.encode(some, where)]
    rows, accumulation = keys["per_device_train_batch_size"], keys["gradient_accumulation_steps"]
    assert rows > 1
    assert rows * max(sizes) <= asked.sequence_length
    assert rows * accumulation * sum(sizes) / len(sizes) == pytest.approx(asked.batch_tokens, rel=0.1)


def test_experts_need_a_transformers_in_which_they_have_no_numbers(place: Path, tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig

    shutil.copytree(place / "model", tmp_path / "model")
    size = json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"]
    Qwen3MoeConfig(
        vocab_size=size, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    for model, told in ((tmp_path / "model", True), (place / "model", False)):
        export_llamafactory(settings(model), place / "mix", tmp_path / "lf")
        assert ("needs transformers 5" in (tmp_path / "lf" / "stage-1.yaml").read_text()) == told


# LLaMA-Factory changes its process for good (logging, how datasets writes integers), so that it gets one of its own.
SCRIPT = """
import json, sys
from omegaconf import OmegaConf
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.data.template import TEMPLATES
from llamafactory.hparams import get_train_args
from llamafactory.model import load_model, load_tokenizer

asked = json.load(open(sys.argv[1]))
told = {"stages": {}, "examples": {}, "forms": []}
for file in asked["stages"]:
    keys = OmegaConf.to_container(OmegaConf.load(file))
    model, data, training, tuning, _ = get_train_args({**keys, "use_cpu": True})  # bf16 is refused without a GPU else
    plain = {key: value for key, value in keys.items() if getattr(training, key, None) == value}
    schedule = training.lr_scheduler_type.value, training.lr_scheduler_kwargs
    model.model_name_or_path = asked["model"]
    module = load_tokenizer(model)
    trained = load_model(module["tokenizer"], model, tuning, True)
    told["stages"][file] = {
        "same": sorted(plain), "schedule": schedule, "warm": training.get_warmup_steps(100),
        "trained": {name: str(p.dtype) for name, p in trained.named_parameters() if p.requires_grad},
    }
for file in asked["data"]:
    keys = OmegaConf.to_container(OmegaConf.load(file))
    model, data, training, tuning, _ = get_train_args({**keys, "preprocessing_num_workers": None})
    module = load_tokenizer(model)
    tokenizer = module["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data)
    sets = get_dataset(template, model, data, training, stage="sft", **module)
    found = {}
    for name in ("train_dataset", "eval_dataset"):
        found[name] = []
        for row in sets[name]:
            for number in range(1, max(row["attention_mask"]) + 1):
                at = [k for k, other in enumerate(row["attention_mask"]) if other == number]
                learned = [row["labels"][k] for k in at if row["labels"][k] != -100]
                found[name].append((tokenizer.decode([row["input_ids"][k] for k in at]), tokenizer.decode(learned)))
    told["examples"][file] = found
for name, thinking, system, user, answer in asked["forms"]:
    template = TEMPLATES[name]
    template.enable_thinking = thinking
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    told["forms"].append([tokenizer.decode(ids) for ids in template.encode_multiturn(tokenizer, turns, system)[0]])
json.dump(told, open(sys.argv[2], "w"))
"""


def ours(asked: TrainSettings, files: tuple[Path, ...]) -> list[tuple[str, str]]:
    """The examples as `corpusprep train` has them: all, and what is learned of it."""
    tokenizer = open_tokenizer(asked.model)
    encoder = Encoder(tokenizer, asked.template_arguments)
    encoded = [pair for where, chats in conversations(portions(files)) for pair in encoder.encode(chats, where)]
    return [(tokenizer.decode(ids), tokenizer.decode(labels[labels >= 0])) for ids, labels in encoded]


def test_llamafactory_itself_reads_all_that_and_trains_the_same(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("llamafactory")
    from transformers import AutoModelForCausalLM

    stages = (
        TrainStage(layers="bottom:2", warmup=0.1), TrainStage(layers="5-7", schedule="linear"),
        TrainStage(layers="all", schedule="constant"), TrainStage(layers="none", modules=("lm_head", "model.embed_tokens")),
        TrainStage(layers="top:1", modules=("model.embed_tokens",), learning_rate=1e-5, min_learning_rate=2e-6),
    )  # fmt: skip
    half = tmp_path / "half"
    shutil.copytree(place / "model", half)
    AutoModelForCausalLM.from_pretrained(half).to(torch.bfloat16).save_pretrained(half)
    asked = settings(half, *stages, precision="auto", max_steps=5, micro_batch=2)
    training = export_llamafactory(asked, place / "mix", tmp_path / "a é ${b}")[1:-1]
    exports: dict[str, tuple[TrainSettings, Path]] = {}
    for form in FORMATS:
        for system, container in ((None, "parquet"), ("You translate.", "jsonl"), ("Übersetze: 'so'", "parquet")):
            mix = write_mix(tmp_path / f"mix-{form}-{system}-{container}", form, system, container, (9, 5), (4,))
            out = tmp_path / f"lf-{form}-{len(exports)}"
            exports[str(out / "stage-1.yaml")] = settings(place / "model", packing=container == "parquet"), mix
            export_llamafactory(exports[str(out / "stage-1.yaml")][0], mix, out)
    mix = write_mix(tmp_path / "mix", rows=(9,), held_out=(4,))
    for name in ("chatml", "llama3", "other"):
        chosen = settings(with_template(place, tmp_path / f"model-{name}", name), template_arguments={})
        exports[str(tmp_path / f"lf-{name}" / "stage-1.yaml")] = chosen, mix
        export_llamafactory(chosen, mix, tmp_path / f"lf-{name}")
    probes = [(form, system) for form in FORMS for system in ("", "You translate.")]
    talk = ("Translate: It rains.", "Es regnet.")
    (tmp_path / "asked.json").write_text(
        json.dumps(
            {
                "model": asked.model, "stages": [str(file) for file in training], "data": list(exports),
                "forms": [(form.name, form.thinking, system, *talk) for form, system in probes],
            }
        )
    )  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "asked.json"), str(tmp_path / "told.json")],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    told = json.loads((tmp_path / "told.json").read_text())

    model = skeleton(open_config(asked.model))
    for file, stage in zip(training, stages, strict=True):
        found = told["stages"][str(file)]
        assert found["trained"] == dict.fromkeys(select(model, stage.layers, stage.modules).trained, "torch.float32")
        assert {"learning_rate", "bf16", "max_steps", "weight_decay", "save_steps", "eval_on_start"} <= set(
            found["same"]
        )
    parsed = [told["stages"][str(file)] for file in training]
    assert [found["schedule"] for found in parsed] == [
        ["cosine_with_min_lr", {"min_lr": 2e-6}], ["linear", None], ["constant_with_warmup", None],
        ["cosine_with_min_lr", {"min_lr": 2e-6}], ["cosine_with_min_lr", {"min_lr": 2e-6}],
    ]  # fmt: skip
    assert [found["warm"] for found in parsed] == [10, 3, 3, 3, 3]

    for file, (chosen, folder) in exports.items():
        found, known = told["examples"][file], find_mix(folder)
        for name, files in (("train_dataset", known.train), ("eval_dataset", known.validation)):
            wanted = ours(chosen, files)
            # What a template has behind the token that ends an answer bears loss there, and none here.
            assert sorted((text, learned.rstrip("\n")) for text, learned in found[name]) == sorted(wanted)
    for (form, system), texts in zip(probes, told["forms"], strict=True):
        prompt, full = form.render(system, *talk, first="")
        assert texts == [prompt, full[len(prompt) :]]
