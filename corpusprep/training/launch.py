"""`corpusprep train`: trains a model on a mix with TRL's trainer and `accelerate launch`, into one folder per stage."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import platform
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from corpusprep.errors import RunError, SettingsError
from corpusprep.keys import digest, file_digest, imported_modules, large_file_digest
from corpusprep.report.progress import Progress
from corpusprep.store import commit, lock, remove
from corpusprep.training.dataset import Tokenised, tokenise
from corpusprep.training.examples import Encoder, Mix, find_mix
from corpusprep.training.job import TENSORS, Job, difference, made_of
from corpusprep.training.machines import Place, find_place
from corpusprep.training.meeting import Follower, Leader, StageError, free_port, wait_until_seen
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
from corpusprep.training.processes import prepare, run_stage
from corpusprep.training.settings import TrainSettings

_PACKAGES = ("trl", "transformers", "accelerate", "torch")


@dataclass
class TrainResult:
    """The result of a training.

    Attributes:
        folders: one per stage, in order; each is a model that `AutoModelForCausalLM.from_pretrained` opens.
        reports: content of each stage's `training.json`.
        commands: commands that were run.
        place: where this launch stood among those that trained together; launch 0 wrote the folders.
    """

    folders: list[Path] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    place: Place = field(default_factory=Place)


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
    place = find_place(settings, os.environ, planning=True)
    stages = plan_stages(settings, config, precision)
    seen = preview(found, Encoder(tokenizer, settings.template_arguments), settings.sequence_length)
    check_length(settings, config)
    shown = batches(
        settings, seen.sequences(settings), seen.mean, seen.longest, _processes(settings, gpus, place) * place.launches
    )
    return describe(settings, stages, shown, precision, seen, gpus, place.machines)


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
    """Trains a model on a mix, stage by stage; on several machines, each of which calls it, if `settings` or the environment
    say so.

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
            another machine does not come, was given something else, or fails; or a check of the result failed.
    """
    require()
    progress = progress or Progress()
    out = Path(out)
    if stage is not None and not 1 <= stage <= len(settings.stages):
        raise SettingsError(f"--stage {stage}: the recipe has stages 1 to {len(settings.stages)}. Choose one of them.")
    place = find_place(settings, os.environ)
    if place.note:
        progress.say(place.note)
    found = find_mix(mix)
    config = open_config(settings.model)
    check_length(settings, config)
    seed = settings.seed if settings.seed is not None else seed
    if place.launches == 1:
        with lock(out):
            return _Run(settings, found, out, seed, progress, place).go(config, stage, resume)
    out = out.absolute()
    run = _Run(settings, found, out, seed, progress, place)
    facts = run.facts(config, stage, resume)
    if place.rank:
        with Follower(place, settings.machine_timeout, progress.say, facts) as leader:
            return run.follow(leader)
    with lock(out), Leader(place, settings.machine_timeout, progress.say) as others:
        others.gather(facts)
        others.share(out)
        run.others = others
        return run.go(config, stage, resume)


class _Run:
    def __init__(
        self, settings: TrainSettings, mix: Mix, out: Path, seed: int, progress: Progress, place: Place
    ) -> None:
        self.settings, self.mix, self.out, self.seed, self.progress, self.place = (
            settings, mix, out, seed, progress, place
        )  # fmt: skip
        self.precision, self.devices = _precision(settings), devices()
        self.here = _processes(settings, self.devices, place)
        self.processes = self.here * place.launches
        self.others: Leader | None = None
        self.result = TrainResult(place=place)

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
        if self.others is not None:
            self.others.finish(folders=[str(folder) for folder in self.result.folders], reports=self.result.reports)
        return self.result

    def facts(self, config: Any, only: int | None, resume: bool) -> dict[str, str]:
        """What all launches that train together must have alike, by what messages call it."""
        code = imported_modules("corpusprep.training.launch", "corpusprep.training.worker")
        settings = self.settings.of_the_weights().without("processes").model_dump(mode="json")
        return {
            **{f"the version of {name}": importlib.metadata.version(name) for name in ("corpusprep", *_PACKAGES)},
            "the version of Python": platform.python_version(),
            "the code of corpusprep": digest([file_digest(path) for path in code.values()]),
            "the mix": self.mix.checksum,
            "the model's config.json": digest(config.to_json_string(use_diff=False)),
            **{f"train.{name}": json.dumps(value) for name, value in settings.items()},
            "the number of processes a machine": str(self.here * self.place.local_launches),
            "the kind of device": "GPU" if self.devices else "CPU",
            "the precision": self.precision,
            "the seed": str(self.seed),
            "--stage": str(only),
            "--resume": str(resume),
            "--out": str(self.out),
        }

    def follow(self, leader: Follower) -> TrainResult:
        """Does what launch 0 says, until the training is done."""
        while (message := leader.next())["kind"] != "end":
            if message["kind"] == "folder":
                wait_until_seen([message["mark"]])
                leader.said("seen")
                continue
            stage = message["stage"]
            job = Job(**stage["job"])
            job = replace(job, modules=tuple(job.modules), launch=self.place.rank, launcher=os.getpid())
            wait_until_seen([p for p in (job.work, job.train, job.validation, job.previous, job.resume) if p])
            command = prepare(job, self.place, stage["parallel"], stage["port"], len(self.devices))
            self.result.commands.append(shlex.join(command))
            log = self.out / f"stage-{job.number}.{self.place.name(self.place.rank).replace(' ', '-')}.log"
            self.progress.say(f"{self.place.name(self.place.rank)}: stage {job.number}, log {log}")
            try:
                run_stage(command, job, log, self._threads(), Progress(), leader.trouble)
            except StageError as failed:
                raise leader.verdict(failed) from None
            leader.said("done", job.number)
        self.result.folders = [Path(folder) for folder in message["folders"]]
        self.result.reports = message["reports"]
        return self.result

    def _threads(self) -> int | None:
        """Threads of a process for work on the CPU. With GPUs, accelerate gives it one."""
        here = self.here * self.place.local_launches
        return max(1, len(os.sched_getaffinity(0)) // here) if self.devices else None

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
        for left in (*work.glob("error*.txt"), work / "report.json"):
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
            launches=self.place.launches,
            launch=0,
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
        parallel = settings.parallelism
        if parallel == "auto":
            fits = not self.devices or plan.memory.total is None or plan.memory.total <= min(self.devices)
            parallel = "ddp" if fits else "fsdp"
        port = free_port() if self.others is not None else 0
        command = prepare(job, self.place, parallel, port, len(self.devices))
        self.result.commands.append(shlex.join(command))
        self.progress.say(f"stage {plan.number}: {shlex.join(command)}")
        if self.others is not None:
            self.others.begin({"job": asdict(job), "parallel": parallel, "port": port})
        log = self.out / f"stage-{plan.number}.log"
        try:
            run_stage(
                command,
                job,
                log,
                self._threads(),
                self.progress,
                self.others.trouble if self.others is not None else None,
            )
        except StageError as failed:
            raise (self.others.verdict(failed) if self.others is not None else failed) from None
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
                "machines": list(self.others.hosts.values()) if self.others is not None else [platform.node()],
                "versions": {name: importlib.metadata.version(name) for name in (*_PACKAGES, "corpusprep")},
            },
        )  # fmt: skip
        commit(work / "model", folder)
        if self.others is not None:
            self.others.wait("done", plan.number)
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


def _digest_of(stage: Path) -> str | None:
    """Digest of a stage's tensors; None if the stage is missing."""
    try:
        return digest(json.loads((stage / TENSORS).read_text()))
    except (OSError, ValueError):
        return None


def _processes(settings: TrainSettings, gpus: list[int], place: Place) -> int:
    """Number of processes that this launch starts."""
    if place.local is not None:  # torchrun starts a launch for each process
        if gpus and place.local_launches > len(gpus):
            raise SettingsError(
                f"torchrun starts {place.local_launches} processes on this machine, but only {len(gpus)} GPUs are visible."
            )
        return 1
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
