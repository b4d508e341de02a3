"""The files that a stage writes beside the weights: a model card, the loss curve, and a report."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corpusprep.training.plan import StagePlan
from corpusprep.training.settings import TrainSettings

_CURVE = ("step", "epoch", "loss", "learning_rate", "grad_norm", "mean_token_accuracy", "num_input_tokens_seen")


def write_outcome(
    folder: Path,
    settings: TrainSettings,
    plan: StagePlan,
    report: Mapping[str, Any],
    command: Sequence[str],
    facts: Mapping[str, Any],
) -> None:
    """Writes `training.json`, `loss.csv`, `loss.png` and the model card into the model's folder."""
    history = report["history"]
    with open(folder / "loss.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _CURVE, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(history)
    _draw(history, report["losses"], plan, folder / "loss.png")
    stage = plan.stage.model_dump(mode="json")
    told = {
        "stage": plan.number,
        "base_model": settings.model,
        "settings": {**settings.model_dump(mode="json", exclude={"stages", "machine_rank", "main_address"}), **stage},
        "parameters": {"trained": plan.trained, "frozen": plan.frozen},
        "layers": list(plan.selection.layers),
        **facts,
        "steps": report["steps"],
        "tokens_seen": report["tokens"],
        "seconds": report["seconds"],
        "losses": report["losses"],
        "attention": report["attention"],
        "checks": report["checks"],
        "command": shlex.join(command),
    }
    (folder / "training.json").write_text(json.dumps(told, indent=1, sort_keys=True), encoding="utf-8")
    (folder / "README.md").write_text(_card(settings, plan, report, facts), encoding="utf-8")


def _draw(history: Sequence[Mapping[str, Any]], losses: Mapping[str, float], plan: StagePlan, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([h["step"] for h in history], [h["loss"] for h in history], linewidth=1.2, label="training")
    last = history[-1]["step"] if history else 0
    held_out = [(step, losses[name]) for step, name in ((0, "before"), (last, "after")) if name in losses]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o--", color="tab:orange", label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(f"stage {plan.number}: {_name(plan)}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _name(plan: StagePlan) -> str:
    layers = plan.stage.layers
    what = f"layers {layers}" if isinstance(layers, str) else f"layers {', '.join(map(str, layers))}"
    return ", ".join([what, *plan.stage.modules])


def _card(settings: TrainSettings, plan: StagePlan, report: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    checks, mix, losses = report["checks"], facts["mix"], report["losses"]
    stages = "\n".join(
        f"{number}. {stage.layers}{' and ' + ', '.join(stage.modules) if stage.modules else ''}"
        + (" (this model)" if number == plan.number else "")
        for number, stage in enumerate(settings.stages, start=1)
    )
    changed, survived = (
        checks[name] / max(checks["trained_values"], 1)
        for name in ("trained_values_changed", "trained_values_changed_as_saved")
    )
    measured = "".join(
        f"| validation loss {name} the stage | {losses[name]:.4f} |\n" for name in ("before", "after") if name in losses
    )
    base = "" if Path(settings.model).exists() else f"base_model: {settings.model}\n"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{base}tags: [translation, corpusprep]
---

# {Path(settings.model).name}, stage {plan.number} of {len(settings.stages)}

`{Path(settings.model).name}` with some layers trained on a translation mix by
`corpusprep train` ({facts["versions"]["corpusprep"]}), following LLaMAX2 / Qwen3-XPlus ([arXiv 2510.09189](https://arxiv.org/abs/2510.09189)).
Stages:

{stages}

| | |
|---|---|
| layers trained, from 0 | {", ".join(map(str, plan.selection.layers)) or "none"} of {plan.selection.of} |
| parameters trained | {plan.trained:,} of {plan.trained + plan.frozen:,} |
| mix | {mix["examples"]:,} examples, {mix["tokens"]:,} tokens, checksum `{mix["checksum"]}` |
| steps | {report["steps"]:,} |
{measured}| frozen tensors that changed | {len(checks["frozen_tensors_changed"])} of {checks["frozen_tensors"]} |
| trained tensors that did not change | {len(checks["trained_tensors_unmoved"])} of {checks["trained_tensors"]} |
| trained values that changed, in fp32 | {changed:.1%} |
| trained values that changed, as saved | {survived:.1%} |

`training.json` has all settings, versions and checks; `loss.csv` and `loss.png` have the loss curve; `tensors.json` has
a digest of each tensor.
"""
