"""`corpusprep train`: trains a model on a mix with TRL's trainer and `accelerate launch`, into one folder per stage."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corpusprep.errors import RunError, SettingsError
from corpusprep.keys import digest, large_file_digest
from corpusprep.report.progress import Progress
from corpusprep.store import commit, lock, remove
from corpusprep.training.dataset import Tokenised, tokenise
from corpusprep.training.examples import Encoder, Mix, find_mix
from corpusprep.training.job import ERROR, TENSORS, Job, difference, made_of, received
from corpusprep.training.outcome import write_outcome
from corpusprep.training.plan import (
    StagePlan,
    batches,
    check_length,
    describe,
    devices,
    open_config,
    open_tokenizer,
    plan_stages,
    preview,
)
from corpusprep.training.settings import TrainSettings

_PACKAGES = ("trl", "transformers", "accelerate", "torch")


@dataclass
class TrainResult:
    """The result of a training.

    Attributes:
        folders: one per stage, in order; each is a model that `AutoModelForCausalLM.from_pretrained` opens.
        reports: content of each stage's `training.json`.
        commands: commands that were run.
    """

    folders: list[Path] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


def require() -> None:
    """Raises RunError if packages of the extra `train` are missing."""
    for name in (*_PACKAGES, "matplotlib"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise RunError(f"Training needs {name}. Install it with pip install 'corpusprep[train]'.") from None


def dry_run(settings: TrainSettings, mix: str | Path) -> str:
    """Describes what `train` would do, from the model's config and the first examples of the mix.

    Raises:
        CorpusprepError: the model or the mix cannot be found, or does not fit the settings.
    """
    require()
    found = find_mix(mix)
    config, tokenizer = open_config(settings.model), open_tokenizer(settings.model)
    precision, gpus = _precision(settings), devices()
    stages = plan_stages(settings, config, precision)
    seen = preview(found, Encoder(tokenizer, settings.template_arguments), settings.sequence_length)
    check_length(settings, config)
    shown = batches(settings, seen.sequences(settings), seen.mean, seen.longest, _processes(settings, gpus))
    return describe(settings, stages, shown, precision, seen, gpus)


def train(
    settings: TrainSettings,
    mix: str | Path,
    out: str | Path,
    *,
    seed: int = 1,
    stage: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Trains a model on a mix, stage by stage.

    Args:
        settings: settings of the training.
        mix: folder `mix` of a run.
        out: folder for `stage-1`, `stage-2` and so on.
        seed: seed of the order of examples, if the settings have none.
        stage: train only this stage, from 1; it starts from the previous one, which must be finished.
        resume: continue the training in `out`: finished stages are kept, and an interrupted one continues from its last
            checkpoint.
        progress: receives the progress.

    Raises:
        CorpusprepError: the model or the mix cannot be found, or does not fit the settings; `out` has another training;
            or a check of the result failed.
    """
    require()
    progress = progress or Progress()
    out = Path(out)
    if stage is not None and not 1 <= stage <= len(settings.stages):
        raise SettingsError(f"--stage {stage}: the recipe has stages 1 to {len(settings.stages)}. Choose one of them.")
    found = find_mix(mix)
    config = open_config(settings.model)
    check_length(settings, config)
    with lock(out):
        return _Run(settings, found, out, settings.seed if settings.seed is not None else seed, progress).go(
            config, stage, resume
        )


class _Run:
    def __init__(self, settings: TrainSettings, mix: Mix, out: Path, seed: int, progress: Progress) -> None:
        self.settings, self.mix, self.out, self.seed, self.progress = settings, mix, out, seed, progress
        self.precision, self.devices = _precision(settings), devices()
        self.processes = _processes(settings, self.devices)
        self.result = TrainResult()

    def go(self, config: Any, only: int | None, resume: bool) -> TrainResult:
        plans = plan_stages(self.settings, config, self.precision)
        wanted = [only] if only is not None else list(range(1, len(plans) + 1))
        self._check_folder([plans[number - 1] for number in wanted], resume)
        data = None
        for number in wanted:
            plan = plans[number - 1]
            folder = self.out / f"stage-{number}"
            previous = self.out / f"stage-{number - 1}" if number > 1 else None
            if not folder.exists():
                data = data or self._tokenise()
                self._train(plan, data, folder, previous)
            else:
                self._check_done(plan, folder)
            self.result.folders.append(folder)
            self.result.reports.append(json.loads((folder / "training.json").read_text()))
        return self.result

    def _check_folder(self, plans: list[StagePlan], resume: bool) -> None:
        """Checks that the folder's content can be continued, before any work is done or lost."""
        wanted = [plan.number for plan in plans]
        there = [n for n in wanted if (self.out / f"stage-{n}").exists()]
        begun = [n for n in wanted if n not in there and self._checkpoint(n) is not None]
        if not resume and (there or begun):
            what = f"stage-{there[0]}" if there else f"an interrupted stage {begun[0]}"
            raise RunError(f"{self.out}: already has {what}. Continue with --resume, or choose another --out.")
        for plan in plans:
            if plan.number in there:
                self._check_done(plan, self.out / f"stage-{plan.number}")
            elif (checkpoint := self._checkpoint(plan.number)) is not None and (
                told := difference(made_of(checkpoint) or {}, self._fingerprint(plan))
            ):
                raise RunError(f"{self.out}: stage {plan.number} cannot be resumed: {told}")
        before = wanted[0] - 1
        if before and not (self.out / f"stage-{before}" / TENSORS).is_file():
            raise RunError(
                f"{self.out / f'stage-{before}'}: is missing, and stage {before + 1} starts from it. Train it first."
            )

    def _tokenise(self) -> tuple[Tokenised, str, Tokenised | None]:
        """Makes the data set. Returns the training counts, its folder, and the validation counts."""
        settings = self.settings
        tokenizer = open_tokenizer(settings.model)
        key = digest(
            self.mix.checksum, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template,
            settings.template_arguments, settings.sequence_length, settings.packing, settings.validation_examples,
            importlib.metadata.version("trl"), [large_file_digest(file) for file in self.mix.validation],
        )  # fmt: skip
        folder = self.out / ".work" / "data" / key
        if not folder.exists():
            scratch = folder.with_name(f"{key}.tmp")
            remove(scratch)
            scratch.mkdir(parents=True)
            made = functools.partial(
                tokenise, model=settings.model, arguments=settings.template_arguments, longest=settings.sequence_length,
                progress=self.progress,
            )  # fmt: skip
            rows = made(self.mix.train, packing=settings.packing, out=scratch / "train")
            if not rows.examples:
                raise RunError(
                    f"{self.mix.folder}: no training example is left; {rows.too_long:,} are too long. Check the mix, "
                    "or raise train.sequence_length."
                )
            held: Tokenised | None = None
            if self.mix.validation and settings.validation_examples:
                limit = settings.validation_examples
                held = made(self.mix.validation, packing=False, out=scratch / "validation", limit=limit)
            facts = {"train": vars(rows), "validation": vars(held) if held else None}
            (scratch / "facts.json").write_text(json.dumps(facts))
            commit(scratch, folder)
            for other in folder.parent.iterdir():
                if other != folder:
                    remove(other)
        facts = json.loads((folder / "facts.json").read_text())
        train, held_out = (Tokenised(**facts[name]) if facts[name] else None for name in ("train", "validation"))
        assert train is not None
        if held_out is not None and not held_out.examples:
            held_out = None
        return train, str(folder), held_out

    def _train(
        self, plan: StagePlan, data: tuple[Tokenised, str, Tokenised | None], folder: Path, previous: Path | None
    ) -> None:
        rows, source, held_out = data
        settings, stage = self.settings, plan.stage
        load = batches(settings, rows.sequences, rows.tokens / rows.examples, rows.longest, self.processes)
        steps = load.steps(stage.epochs, settings.max_steps)
        work = self.out / ".work" / f"stage-{plan.number}"
        work.mkdir(parents=True, exist_ok=True)
        for left in (work / ERROR, work / "report.json"):
            left.unlink(missing_ok=True)
        remove(work / "model")
        checkpoint = self._checkpoint(plan.number)
        job = Job(
            number=plan.number,
            model=str(previous) if previous is not None else settings.model,
            previous=str(previous) if previous is not None else None,
            work=str(work),
            train=str(Path(source) / "train"),
            validation=str(Path(source) / "validation") if held_out is not None else None,
            layers=stage.layers,
            modules=stage.modules,
            precision=self.precision,
            cpu=not self.devices,
            processes=self.processes,
            attention=settings.attention,
            gradient_checkpointing=settings.gradient_checkpointing,
            packing=settings.packing,
            sequence_length=settings.sequence_length,
            micro_batch=load.micro_batch,
            accumulation=load.accumulation,
            learning_rate=stage.learning_rate,
            min_learning_rate=stage.min_learning_rate,
            schedule=stage.schedule,
            warmup_steps=min(math.ceil(stage.warmup * steps), steps - 1),  # warmup starts at rate 0
            epochs=stage.epochs,
            # with a larger one, transformers would train beyond the epochs
            max_steps=steps if settings.max_steps is not None else None,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            seed=self.seed,
            log_steps=settings.log_steps,
            checkpoint_steps=settings.checkpoint_steps,
            fingerprint=self._fingerprint(plan),
            resume=str(checkpoint) if checkpoint is not None else None,
            launcher=os.getpid(),
        )
        job.write(work / "job.json")
        command = self._command(plan, work)
        self.result.commands.append(shlex.join(command))
        self.progress.say(f"stage {plan.number}: {shlex.join(command)}")
        self._run(command, plan, work)
        report = json.loads((work / "report.json").read_text())
        write_outcome(
            work / "model", settings, plan, report, command,
            facts={
                "seed": self.seed,
                "mix": {"folder": str(self.mix.folder), "checksum": self.mix.checksum, **_counts(rows)},
                "batches": vars(load),
                "precision": self.precision,
                "fingerprint": job.fingerprint,
                "started_from": _digest_of(previous) if previous is not None else settings.model,
                "versions": {name: importlib.metadata.version(name) for name in (*_PACKAGES, "corpusprep")},
            },
        )  # fmt: skip
        commit(work / "model", folder)
        remove(work)

    def _fingerprint(self, plan: StagePlan) -> dict[str, Any]:
        """All settings and inputs that determine the result of a stage."""
        settings, stage = self.settings, plan.stage
        own = stage.model_dump(mode="json", exclude={"layers", "modules"})
        shared = settings.model_dump(
            mode="json",
            include={
                "max_steps", "weight_decay", "max_grad_norm", "sequence_length", "batch_tokens", "micro_batch", "packing",
                "attention", "template_arguments",
            },
        )  # fmt: skip
        return {
            "trained": list(plan.selection.trained), "mix": self.mix.checksum, "seed": self.seed,
            "precision": self.precision, "processes": self.processes, **shared, **own,
        }  # fmt: skip

    def _check_done(self, plan: StagePlan, folder: Path) -> None:
        try:
            report = json.loads((folder / "training.json").read_text())
            before = {**report["fingerprint"], "start": report["started_from"]}
        except (OSError, ValueError, KeyError):
            raise RunError(f"{folder}: is not a stage of corpusprep train. Choose another --out.") from None
        previous = self.out / f"stage-{plan.number - 1}"
        # If the previous stage has been removed, its tensors cannot be compared. It is not trained again for that.
        start = self.settings.model if plan.number == 1 else _digest_of(previous) or before["start"]
        if told := difference(before, {**self._fingerprint(plan), "start": start}):
            raise RunError(f"{folder}: was trained with other settings: {told}")

    def _checkpoint(self, number: int) -> Path | None:
        """The last complete checkpoint of a stage; ignores those that a killed run left incomplete."""
        folder = self.out / ".work" / f"stage-{number}" / "checkpoints"
        whole = [path for path in folder.glob("checkpoint-*") if made_of(path) is not None]
        return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def _command(self, plan: StagePlan, work: Path) -> list[str]:
        parallel = self.settings.parallelism
        if parallel == "auto":
            fits = not self.devices or plan.memory.total is None or plan.memory.total <= min(self.devices)
            parallel = "ddp" if fits else "fsdp"
        config: dict[str, Any] = {
            "compute_environment": "LOCAL_MACHINE",
            "distributed_type": "NO",
            "mixed_precision": "bf16" if self.precision == "bf16" else "no",
            "num_machines": 1,
            "num_processes": self.processes,
            "machine_rank": 0,
            "use_cpu": not self.devices,
            "main_process_port": 0,
        }
        if self.processes == 1 and len(self.devices) > 1:
            config["gpu_ids"] = "0"
        if self.processes > 1:
            config["distributed_type"] = "MULTI_GPU"  # this starts several processes, on CPUs too
            if parallel == "fsdp":
                config["distributed_type"] = "FSDP"
                config["fsdp_config"] = {
                    "fsdp_version": 2,
                    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                    "fsdp_state_dict_type": "FULL_STATE_DICT",
                    "fsdp_reshard_after_forward": True,
                    "fsdp_cpu_ram_efficient_loading": False,
                }
        file = work / "accelerate.json"  # a separate file, because the user's own config may differ
        file.write_text(json.dumps(config, indent=1))
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
        return [*launch, "-m", "corpusprep.training.worker", str(work / "job.json")]

    def _run(self, command: list[str], plan: StagePlan, work: Path) -> None:
        """Runs a stage, reports its progress, and writes its other output to a log."""
        log = self.out / f"stage-{plan.number}.log"
        # Threads that spin while they wait take CPU time from those that work.
        environment = {"OMP_WAIT_POLICY": "PASSIVE"}
        if self.devices:  # with GPUs, accelerate gives the CPU work one thread
            environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // self.processes))
        environment |= {
            **os.environ,
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        with open(log, "a", encoding="utf-8") as kept:
            kept.write(f"$ {shlex.join(command)}\n")
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, errors="replace",
                start_new_session=True,
            )  # fmt: skip
            assert process.stdout is not None
            note = ""
            begun = False
            try:
                for line in process.stdout:
                    said = received(line)
                    if said is None:
                        kept.write(line)
                        kept.flush()
                    elif said["kind"] == "begin":
                        self.progress.start(f"stage {plan.number}", said["total"], "steps")
                        begun, done = True, said["done"]
                        self.progress.advance(done)
                    elif said["kind"] == "step":
                        self.progress.advance(said["done"] - done, note)
                        done = said["done"]
                    elif said["kind"] == "log":
                        speed = f", {said['speed']:,.0f} tokens/s" if said["speed"] else ""
                        note = f"loss {said['loss']:.4f}{speed}"
                code = process.wait()
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)  # accelerate would leave its child processes running
                process.wait()
                raise
            finally:
                process.stdout.close()
                if begun:
                    self.progress.end()
        if code == 0 and (work / "report.json").is_file():
            return
        error = work / ERROR
        if error.is_file() and (told := error.read_text()):
            raise RunError(f"stage {plan.number}: {told}\nThe full output is in {log}.")
        raise RunError(
            f"stage {plan.number}: the training processes ended with exit code {code}. The full output is in {log}. "
            "Finished work is kept: continue with --resume."
        )


def _digest_of(stage: Path) -> str | None:
    """Digest of a stage's tensors; None if the stage is missing."""
    try:
        return digest(json.loads((stage / TENSORS).read_text()))
    except (OSError, ValueError):
        return None


def _processes(settings: TrainSettings, gpus: list[int]) -> int:
    if settings.processes is not None and gpus and settings.processes > len(gpus):
        raise SettingsError(f"train.processes = {settings.processes}, but only {len(gpus)} GPUs are visible. Lower it.")
    return settings.processes or max(1, len(gpus))


def _counts(rows: Tokenised) -> Mapping[str, int]:
    names = ("examples", "tokens", "answer_tokens", "too_long", "without_answer", "longest")
    return {name: getattr(rows, name) for name in names}


def _precision(settings: TrainSettings) -> str:
    import torch

    if settings.precision != "auto":
        return settings.precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
