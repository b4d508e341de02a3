"""Exports the stages to LLaMA-Factory: one YAML file per stage, and the mix as data sets."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from corpusprep.errors import InputError, RunError, SettingsError
from corpusprep.store import writing
from corpusprep.training.examples import Encoder, Mix, conversations, count, find_mix, portions
from corpusprep.training.layers import Selection, select
from corpusprep.training.plan import (
    Batches,
    batches,
    check_length,
    devices,
    open_config,
    open_tokenizer,
    preview,
    skeleton,
)
from corpusprep.training.settings import SCHEDULES, TrainSettings, WholeStage

VERSION = "0.9.5"
"""The version of LLaMA-Factory that defines the keys written here."""

_ATTENTION = {"auto": "auto", "varlen": "sdpa", "sdpa": "sdpa", "eager": "disabled", "flash_attention_2": "fa2"}
_WORDS = ("true", "false", "yes", "no", "on", "off", "y", "n", "null")  # not strings in YAML 1.1
_Section = tuple[str, dict[str, Any]]


def export_llamafactory(settings: TrainSettings, mix: str | Path, out: str | Path, *, seed: int = 1) -> list[Path]:
    """Writes the input of `llamafactory-cli train`: `dataset_info.json`, `stage-1.yaml` and so on, `README.md`.

    Args:
        settings: settings of the training.
        mix: folder `mix` of a run.
        out: folder for the files, and for the stages' models (`stage-1` and so on).
        seed: seed of the order of examples, if the settings have none.

    Returns:
        The files, in the order above.

    Raises:
        CorpusprepError: the model or the mix cannot be found; or LLaMA-Factory has no equivalent of a setting.
    """
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise RunError(f"The export needs {name}. Install it with pip install 'corpusprep[train]'.")
    out = Path(out).resolve()
    found = find_mix(mix)
    sets = _data_sets(found, settings.validation_examples)
    form = _template(settings, any(entry.system for entry in sets))
    config = open_config(settings.model)
    check_length(settings, config)
    model = skeleton(config)
    _check(settings, model)
    load = _batches(settings, found)
    seed = settings.seed if settings.seed is not None else seed
    info = {entry.name: entry.info for entry in sets}
    texts = {"dataset_info.json": json.dumps(info, indent=2) + "\n"}  # ASCII: it is read in the locale's encoding
    start = str(Path(settings.model).resolve()) if os.path.isdir(settings.model) else settings.model
    told = []
    for number, stage in enumerate(settings.stages, start=1):
        whole = settings.of(stage)
        selection = select(model, stage.layers, stage.modules)
        end = str(out / f"stage-{number}")
        sections = [
            ("model", {"model_name_or_path": start, **_model(settings)}),
            ("method", {"stage": "sft", "do_train": True, **_freeze(number, whole, selection)}),
            ("dataset", _dataset(settings, sets, form, out)),
            ("output", _output(settings, end)),
            ("train", _train(settings, whole, load, seed)),
        ]
        if any(entry.split == "validation" for entry in sets):
            measured = {"do_eval": True, "eval_on_start": True, "per_device_eval_batch_size": load.micro_batch}
            sections.append(("eval", measured))
        texts[f"stage-{number}.yaml"] = _yaml(sections, _notes(config, form, load))
        told.append((number, selection, start, end))
        start = end
    texts["README.md"] = _readme(settings, out, load, told)
    for name, text in texts.items():
        with writing(out / name) as scratch:
            scratch.write_text(text, encoding="utf-8")
    return [out / name for name in texts]


def _check(settings: TrainSettings, model: Any) -> None:
    import torch

    if settings.attention not in _ATTENTION:
        raise SettingsError(
            f'train.attention = "{settings.attention}": LLaMA-Factory {VERSION} does not have it. Choose one of '
            f"{', '.join(_ATTENTION)}."
        )
    kept = next(model.parameters()).dtype
    if settings.precision == "fp32" and kept != torch.float32:
        raise SettingsError(
            f'train.precision = "fp32": LLaMA-Factory loads a model in the type of its file, here {kept}, and casts '
            "only trained weights to fp32. Without bf16, the two types cannot be combined. Set train.precision to "
            "bf16, or save the model in fp32 first."
        )


# The mix.


@dataclass(frozen=True)
class _DataSet:
    """A file of the mix as a data set of LLaMA-Factory. `system`: whether its examples have a system prompt."""

    name: str
    split: str
    info: dict[str, Any]
    system: bool


def _data_sets(mix: Mix, validation: int) -> list[_DataSet]:
    """Makes one data set per file: from a folder, LLaMA-Factory would read every file, in directory order."""
    found = []
    left = validation
    for split, files in (("train", mix.train), ("validation", mix.validation)):
        for number, file in enumerate(file for file in files if file.stat().st_size):
            rows = count([file])
            if not rows or (split == "validation" and not left):
                continue
            formatting, system = _formatting(file)
            info: dict[str, Any] = {"file_name": str(file.resolve()), **formatting}
            if split == "validation":
                if left < rows:
                    info["num_samples"] = left
                left -= min(left, rows)
            found.append(_DataSet(f"{split}-{number:05d}", split, info, system))
    if not any(entry.split == "train" for entry in found):
        raise InputError(str(mix.folder), "has no training examples", "Make the mix again")
    return found


def _formatting(file: Path) -> tuple[dict[str, Any], bool]:
    """Format, columns and tags of a file, and whether it has system prompts, from its first example.

    Raises:
        InputError: the file is not in a format of the instruct stage.
    """
    chat = next(chats for _, chats in conversations(portions([file], 1)))[0]
    system = chat[0]["role"] == "system"
    if file.suffix == ".parquet":
        names = set(pq.read_schema(file).names)
    else:
        with open(file, encoding="utf-8") as lines:
            names = set(json.loads(next(lines)))
    if "messages" in names:
        tags = {"role_tag": "role", "content_tag": "content"}
        speakers = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
        return {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags | speakers}, system
    if "conversations" in names:
        tags = {"role_tag": "from", "content_tag": "value"}
        speakers = {"user_tag": "human", "assistant_tag": "gpt", "system_tag": "system"}
        return {"formatting": "sharegpt", "columns": {"messages": "conversations"}, "tags": tags | speakers}, system
    if "instruction" in names:
        columns = {"prompt": "instruction", "query": "input", "response": "output"}
    else:
        columns = {"prompt": "prompt", "response": "completion"}
    if "system" in names:
        columns["system"] = "system"
    return {"formatting": "alpaca", "columns": columns}, system


# The chat template.


@dataclass(frozen=True)
class _Form:
    """The text of a chat template of LLaMA-Factory.

    Attributes:
        thinking: required value of `enable_thinking`; None if it makes no difference.
        asked, answered: text before the answer; `asked` is part of the prompt, `answered` is learned.
        default: system prompt for examples that have none.
    """

    name: str
    system: str
    user: str
    answer: str
    prefix: str = ""
    asked: str = ""
    answered: str = ""
    default: str = ""
    thinking: bool | None = None

    def render(self, system: str, user: str, answer: str, first: str) -> tuple[str, str]:
        """The prompt, and the prompt with its answer; `first` is the token that begins a text."""
        system = system or self.default
        head = self.prefix.replace("{bos}", first) + (self.system.replace("{}", system) if system else "")
        prompt = head + self.user.replace("{}", user)
        return prompt + self.asked, prompt + self.asked + self.answered + self.answer.replace("{}", answer)


_CHATML = _Form(
    "qwen3_nothink",
    system="<|im_start|>system\n{}<|im_end|>\n",
    user="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    answer="{}<|im_end|>\n",
)
_THOUGHT = "<think>\n\n</think>\n\n"
FORMS = (
    replace(_CHATML, name="qwen3", asked=_THOUGHT, thinking=False),
    replace(_CHATML, name="qwen3", answered=_THOUGHT, thinking=True),
    _CHATML,
    replace(_CHATML, name="qwen", default="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    _Form(
        "llama3",
        system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        answer="{}<|eot_id|>",
        prefix="{bos}",
    ),
)
"""The templates of LLaMA-Factory whose exact text is known."""


def _template(settings: TrainSettings, system: bool) -> _Form | bool:
    """The template that renders like the model's own; if none of the known ones does, whether the model should think.

    The type of a model does not determine its template: Qwen3 has been published with three.
    """
    tokenizer = open_tokenizer(settings.model)
    encoder = Encoder(tokenizer, settings.template_arguments)
    user, answer = "Translate: It is raining.", "Es regnet."
    wanted = {}
    for prompt in ("", "You are a translator.") if system else ("",):
        turns = [{"role": "system", "content": prompt}] if prompt else []
        chat = [*turns, {"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        encoder.encode([chat], "a test sentence")  # raises if the template fails
        arguments = {"tokenize": False, **settings.template_arguments}
        asked = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, **arguments)
        wanted[prompt] = (asked, tokenizer.apply_chat_template(chat, add_generation_prompt=False, **arguments))
    first = tokenizer.bos_token or ""
    for form in FORMS:
        if all(form.render(prompt, user, answer, first) == texts for prompt, texts in wanted.items()):
            return form
    return bool(settings.template_arguments.get("enable_thinking", True))


# The keys of a stage.


def _model(settings: TrainSettings) -> dict[str, Any]:
    # LLaMA-Factory's own checkpointing skips frozen layers, even those that gradients pass through to reach trained
    # layers below. Their activations would fill the memory. The trainer's checkpointing covers all layers.
    return {"flash_attn": _ATTENTION[settings.attention], "disable_gradient_checkpointing": True}


def _freeze(number: int, stage: WholeStage, selection: Selection) -> dict[str, Any]:
    """The keys that train the selected parameters.

    Raises:
        SettingsError: LLaMA-Factory would train other parameters.
    """
    chosen, count = selection.layers, len(selection.layers)
    named = f"train.stages: stage {number}: layers = {json.dumps(stage.layers)}"
    if stage.modules:
        named += f", modules = {json.dumps(stage.modules)}"
    if chosen == tuple(range(selection.of - count, selection.of)):
        trainable = count
    elif chosen == tuple(range(count)):
        trainable = -count
    else:
        raise SettingsError(
            f"{named}: LLaMA-Factory trains only the first or the last layers of a model, and of this model's "
            f"{selection.of} layers, these are neither. Write bottom:N or top:N, or train without --export."
        )
    # It matches parts of names (adapter.py of 0.9.5). These must match exactly the selected parameters.
    names = [*selection.trained, *selection.frozen]
    outside = sorted({name.split(".")[-2] for name in names if not re.search(r"\.\d+\.", name)})
    extra = list(dict.fromkeys(name.rpartition(".")[2] for name in stage.modules))
    parts = [f".{layer}." for layer in chosen] + extra
    hit = {name for name in names if any(part in name for part in parts)}
    told = ""
    if inside := [part for part in extra if part not in outside]:
        told = f"LLaMA-Factory cannot train {inside[0]} alone, only {', '.join(outside)}, and whole layers"
    elif more := [name for name in selection.frozen if name in hit]:
        part = next(part for part in parts if part in more[0])
        told = f"LLaMA-Factory matches parts of names: {part!r} would also train {more[0]} (one of {len(more)} frozen)"
    elif less := [name for name in selection.trained if name not in hit]:
        told = f"LLaMA-Factory would leave {less[0]} frozen (one of {len(less)})"
    if told:
        raise SettingsError(f"{named}: {told}. Choose other layers and modules, or train without --export.")
    found = {"finetuning_type": "freeze", "freeze_trainable_layers": trainable, "freeze_trainable_modules": "all"}
    return found | ({"freeze_extra_modules": ",".join(extra)} if extra else {})


def _dataset(settings: TrainSettings, sets: Sequence[_DataSet], form: _Form | bool, out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        "dataset_dir": str(out),
        "dataset": ",".join(entry.name for entry in sets if entry.split == "train"),
    }
    held_out = [entry.name for entry in sets if entry.split == "validation"]
    if held_out:
        found["eval_dataset"] = ",".join(held_out)
    if isinstance(form, _Form):
        found["template"] = form.name
    thinking = form.thinking if isinstance(form, _Form) else form
    if thinking is not None:
        found["enable_thinking"] = thinking
    found |= {"cutoff_len": settings.sequence_length, "packing": settings.packing, "neat_packing": settings.packing}
    if settings.packing:
        found["preprocessing_batch_size"] = 10_000
    return found | {"preprocessing_num_workers": 8, "mask_history": True}


def _output(settings: TrainSettings, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "logging_steps": settings.log_steps,
        "logging_first_step": True,
        "save_strategy": "steps",
        "save_steps": settings.checkpoint_steps,
        "save_total_limit": 1,
        "plot_loss": True,
        "report_to": "none",
    }


def _train(settings: TrainSettings, stage: WholeStage, load: Batches, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "per_device_train_batch_size": load.micro_batch,
        "gradient_accumulation_steps": load.accumulation,
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": SCHEDULES[stage.schedule],
    }
    if stage.schedule == "cosine":
        found["lr_scheduler_kwargs"] = {"min_lr": stage.min_learning_rate}
    found |= {"warmup_ratio": stage.warmup, "num_train_epochs": stage.epochs}
    if settings.max_steps is not None:
        found["max_steps"] = settings.max_steps
    found |= {
        "optim": "adamw_torch",
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": settings.precision != "fp32",
        "pure_bf16": False,
        "gradient_checkpointing": settings.gradient_checkpointing,
    }
    if settings.gradient_checkpointing:
        found["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return found | {"seed": seed, "data_seed": seed, "ddp_timeout": 180_000_000}


def _batches(settings: TrainSettings, mix: Mix) -> Batches:
    processes = (settings.processes or max(1, len(devices()))) * (settings.machines or 1)
    if settings.packing:
        if settings.attention == "flash_attention_2":  # with it, LLaMA-Factory packs for batches of one
            settings = settings.model_copy(update={"micro_batch": 1})
        return batches(settings, 0, 0, 0, processes)
    encoder = Encoder(open_tokenizer(settings.model), settings.template_arguments)
    found = preview(mix, encoder, settings.sequence_length)
    return batches(settings, found.examples, found.mean, found.longest, processes)


# The files.


def _notes(config: Any, form: _Form | bool, load: Batches) -> dict[str, str]:
    """Comments on keys that need an explanation."""
    text = config.get_text_config(decoder=True)
    found = {
        "disable_gradient_checkpointing": "LLaMA-Factory's own, which skips frozen layers; see gradient_checkpointing",
        "freeze_trainable_layers": "the first layers if negative, else the last; all others stay frozen",
        "preprocessing_batch_size": "examples packed at a time; with the default of 1000, up to 3% is padding",
        "gradient_accumulation_steps": f"for {load.processes} {'devices' if load.processes > 1 else 'device'}",
        "warmup_ratio": "share of the steps; later versions of transformers call it warmup_steps",
        "max_steps": "replaces the epochs: a number above theirs makes the stage longer",
        "bf16": "precision of the computation; trained weights and their optimizer are fp32",
    }
    if any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        found["freeze_trainable_layers"] += "; needs transformers 5: older versions number experts like layers"
    if not isinstance(form, _Form):
        known = ", ".join(dict.fromkeys(form.name for form in FORMS))
        found["enable_thinking"] = (
            f"none of LLaMA-Factory's templates {known} renders like this model's own, so none is named, and "
            "LLaMA-Factory derives one from the tokenizer: check the example that it prints, or add template: NAME"
        )
    return found


def _yaml(sections: Sequence[_Section], notes: Mapping[str, str]) -> str:
    lines = []
    for title, keys in sections:
        lines += ["", f"### {title}"]
        for key, value in keys.items():
            if key in notes:
                lines.append(f"# {notes[key]}")
            lines.append(f"{key}: {_scalar(value)}")
    return "\n".join(lines[1:]) + "\n"


def _scalar(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_scalar(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, float):
        digits, mark, power = repr(value).partition("e")  # YAML 1.1 reads 1e-05 as a string
        return f"{digits if '.' in digits else f'{digits}.0'}{mark}{power}"
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w-]*", value, re.ASCII) and value.lower() not in _WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)


def _readme(
    settings: TrainSettings, out: Path, load: Batches, stages: Sequence[tuple[int, Selection, str, str]]
) -> str:
    rows = "\n".join(f"| {number} | {_told(chosen)} | `{start}` | `{end}` |" for number, chosen, start, end in stages)
    commands = "\n".join(f"$ llamafactory-cli train stage-{number}.yaml" for number, *_ in stages)
    sequences = load.micro_batch * load.accumulation * load.processes
    unit = f"packed sequences of {settings.sequence_length:,} tokens" if settings.packing else "examples"
    text = f"""# Stages for LLaMA-Factory

`corpusprep train --export llamafactory` wrote these files, for LLaMA-Factory {VERSION}. Run the stages one after another:

```console
$ cd {shlex.quote(str(out))}
{commands}
```

| stage | trained layers | from | to |
| --- | --- | --- | --- |
{rows}

All paths are absolute: on another machine, export again. A step is {sequences:,} {unit} on {load.processes} \
{"devices" if load.processes > 1 else "device"}; with twice as many devices, halve `gradient_accumulation_steps`.
A stage that is started again continues from its last checkpoint; remove its folder to start over.

Differences from `corpusprep train`:

- An example longer than `cutoff_len` is truncated; `corpusprep train` leaves it out.
- If a template has a line break after the token that ends an answer, the line break is learned too.
- Trained layers are saved in fp32, frozen layers in the model's own type; the next stage loads all in the model's type.
- Nothing checks that frozen weights are unchanged.
"""
    if settings.parallelism == "fsdp":
        text += '- The model is not sharded (`parallelism = "fsdp"`): each device holds all of it.\n'
    return text


def _told(chosen: Selection) -> str:
    if not chosen.layers:
        return f"none of {chosen.of}"
    return f"{chosen.layers[0]} to {chosen.layers[-1]} of {chosen.of}, from 0"
