"""Runs one stage of the training with TRL's trainer, in the processes that `accelerate launch` starts.

accelerate launch -m corpusprep.training.worker JOB.json
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from corpusprep.errors import CorpusprepError, RunError
from corpusprep.keys import digest
from corpusprep.store import remove, writing
from corpusprep.training import attention
from corpusprep.training.dataset import open_parts
from corpusprep.training.job import COMPLETE, LOST_SIGN, TENSORS, Job, difference, error_file, made_of, send
from corpusprep.training.layers import Selection, drop_input_gradients, freeze, select, two_layers
from corpusprep.training.settings import SCHEDULES
from corpusprep.training.tensors import compare, digests, tensors_of

_TRAINED = "trained.safetensors"
_LOWER = "Lower train.learning_rate, or set train.precision to fp32, and train into another --out."


class Watch(TrainerCallback):  # type: ignore[misc]
    """Reports the progress, checks the first step, and marks complete checkpoints."""

    def __init__(self, job: Job, selection: Selection, started: dict[str, Any]) -> None:
        self.job, self.selection, self.started = job, selection, started
        self.checks: dict[str, Any] = {}
        self.trainer: Any = None
        self._first = True
        self._hook: Any = None
        self._mark = (time.monotonic(), 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        drop_input_gradients(model)
        if self.job.resume is not None and not self.trainer.is_fsdp_enabled:
            self._restore(model, Path(self.job.resume))
        if self.selection.layers:
            first = model.get_submodule(f"{self.selection.stack}.{self.selection.layers[0]}")
            self._hook = first.register_forward_pre_hook(self._look, with_kwargs=True)
        self._mark = (time.monotonic(), 0.0)
        self._tell(state, kind="begin", total=state.max_steps, done=state.global_step)

    def _look(self, module: Any, args: Any, kwargs: Any) -> None:
        """Records whether a gradient flows from the first trained layer to the frozen layers before it."""
        if module.training:
            hidden = args[0] if args else kwargs["hidden_states"]
            self.checks["gradient_before_trained_layers"] = bool(hidden.requires_grad)
            self._hook.remove()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self._first:
            return
        self._first = False
        named = dict(self.trainer.accelerator.unwrap_model(self.trainer.model).named_parameters())
        without = [name for name in self.selection.trained if named[name].grad is None]
        leaked = [name for name in self.selection.frozen if named[name].grad is not None]
        if without:
            raise RunError(
                f"After the first step, {len(without)} trained tensors have no gradient, such as {without[0]}."
            )
        if leaked:
            raise RunError(f"After the first step, {len(leaked)} frozen tensors have a gradient, such as {leaked[0]}.")
        # An embedding row or an expert that no token used has a zero gradient. Tensors that never change fail later.
        zero = [name for name in self.selection.trained if not bool(named[name].grad.any())]
        self.checks["gradients_at_step_1"] = {"trained_with": len(self.selection.trained), "all_zero": zero}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            # No checkpoint of the last step is written: resumed from it, transformers would train one step more.
            control.should_save = False
        self._tell(state, kind="step", done=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not torch.isfinite(torch.tensor(float(loss))):
            raise RunError(f"The loss is {loss} at step {state.global_step}. {_LOWER}")
        now, tokens = time.monotonic(), float(state.num_input_tokens_seen)
        speed = (tokens - self._mark[1]) / max(now - self._mark[0], 1e-9) if self._mark[1] else None
        self._mark = (now, tokens)
        self._tell(state, kind="log", loss=float(loss), speed=speed)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()  # each process writes a file of its own to the checkpoint
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        whole = folder / f"checkpoint-{state.global_step}"
        if not self.trainer.is_fsdp_enabled:
            self._keep(whole)
        for file in whole.rglob("*"):  # these files must be on the disk before the mark
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        with writing(whole / COMPLETE) as scratch, open(scratch, "w") as mark:
            json.dump(self.started, mark)
            mark.flush()
            os.fsync(mark.fileno())
        for other in folder.glob("checkpoint-*"):
            if other != whole:
                (other / COMPLETE).unlink(missing_ok=True)  # first, so that a half-removed checkpoint is not complete
                remove(other)

    def _keep(self, checkpoint: Path) -> None:
        """Saves the trained tensors under their names in the model. transformers may save them under other names, which
        it then ignores on resume."""
        named = dict(self.trainer.accelerator.unwrap_model(self.trainer.model).named_parameters())
        kept = {name: named[name].detach().cpu().contiguous() for name in self.selection.trained}
        wrong = next((name for name, tensor in kept.items() if not bool(torch.isfinite(tensor).all())), None)
        if wrong is not None:
            raise RunError(f"{wrong} has NaN or infinite values. {_LOWER}")
        save_file(kept, checkpoint / _TRAINED)

    def _restore(self, model: Any, checkpoint: Path) -> None:
        named = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in load_file(checkpoint / _TRAINED).items():
                named[name].copy_(tensor)

    def _tell(self, state: Any, **what: Any) -> None:
        if state.is_world_process_zero:
            send(what)


def load(job: Job) -> tuple[Any, Any]:
    """Loads model and tokenizer; each tensor has the type of its file."""
    attention.register()
    asked = {} if job.attention == "auto" else {"attn_implementation": job.attention}
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto", **asked)
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        raise RunError(
            f"{job.model}: generation_config.json is invalid and could not be saved: {str(error).splitlines()[0]}. "
            "Correct it in a copy of the model's folder."
        ) from None
    return model, AutoTokenizer.from_pretrained(job.model)


def configure(job: Job) -> Any:
    """The settings of TRL's trainer."""
    least = {"min_lr": job.min_learning_rate} if job.schedule == "cosine" else {}
    return SFTConfig(
        output_dir=str(Path(job.work) / "checkpoints"),
        per_device_train_batch_size=job.micro_batch,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=job.accumulation,
        learning_rate=job.learning_rate,
        lr_scheduler_type=SCHEDULES[job.schedule],
        lr_scheduler_kwargs=least,
        warmup_steps=job.warmup_steps,
        num_train_epochs=job.epochs,
        max_steps=job.max_steps or -1,
        weight_decay=job.weight_decay,
        max_grad_norm=job.max_grad_norm,
        optim="adamw_torch",
        bf16=job.precision == "bf16",
        fp16=False,
        use_cpu=job.cpu,
        gradient_checkpointing=job.gradient_checkpointing,
        # With reentrant checkpointing, layers after frozen first layers get no gradient.
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=job.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=job.checkpoint_steps,
        eval_strategy="no",
        # Evaluate inside the training, when the model is sharded: an evaluation before it shards the model twice, and
        # all later gradients are wrong.
        eval_on_start=job.validation is not None and job.resume is None,
        seed=job.seed,
        data_seed=job.seed,
        report_to="none",
        include_num_input_tokens_seen="non_padding",  # TRL's own count restarts on resume
        disable_tqdm=True,
        packing=job.packing,
        eval_packing=False,
        max_length=job.sequence_length,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def train(job: Job) -> None:
    """Runs the stage and writes its model to the job's work folder."""
    model, tokenizer = load(job)
    selection = select(model, job.layers, job.modules)
    if list(selection.trained) != job.fingerprint["trained"]:
        raise RunError(f"{job.model}: the loaded model has other parameters than its config.json describes.")
    known = tensors_of(model)
    first = int(os.environ.get("RANK", "0")) == 0  # this process checks and saves; if it ends, so do the others
    loaded = first or (job.launches > 1 and os.environ.get("LOCAL_RANK") == "0")
    at_start = digests(known.items()) if loaded else {}
    if job.packing and not job.attention.startswith("flash"):
        check_attention(model, job)
    started = {**job.fingerprint, "model": digest(at_start)}
    if first:
        _check_start(job, at_start)
        _check_resume(job, started)
    types = {name: tensor.dtype for name, tensor in known.items()}
    before = {name: known[name].detach().cpu().clone() for name in selection.trained} if first else {}
    own = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    freeze(model, selection)
    if job.precision == "fp32":
        model.float()  # without autocast, frozen layers in bf16 and trained ones do not fit together
    arguments = configure(job)  # from here on, the processes are connected
    if job.launches > 1:
        _check_same(job, at_start)
    watch = Watch(job, selection, started)
    rows = open_parts(job.train)
    held_out = open_parts(job.validation) if job.validation else None
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[watch],
    )
    watch.trainer = trainer
    _quieten(trainer)
    wrong = [name for name, p in model.named_parameters() if p.requires_grad != (name in job.fingerprint["trained"])]
    if wrong:
        raise RunError(f"The trainer changed which tensors are trained, such as {wrong[0]}.")
    if trainer.accelerator.num_processes != job.processes:
        raise RunError(f"{trainer.accelerator.num_processes} processes train instead of {job.processes}.")
    begun = time.monotonic()
    trainer.train(resume_from_checkpoint=job.resume)
    seconds = time.monotonic() - begun
    losses = {}
    if held_out is not None:
        told = next((entry for entry in trainer.state.log_history if "eval_loss" in entry), None)
        losses = {"before": told["eval_loss"]} if told is not None and told["step"] == 0 else {}
        losses["after"] = trainer.evaluate()["eval_loss"]
    optimised = _optimised(trainer, selection)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return
    state = {name: state[name] for name in types}
    rounded_state = {name: tensor.detach().cpu().to(types[name]) for name, tensor in state.items()}
    # Frozen tensors are compared in the type of their file, in which they are saved.
    as_saved = {name: tensor if name in before else rounded_state[name] for name, tensor in state.items()}
    changes = compare(as_saved, before, {name: d for name, d in at_start.items() if name not in before}, selection)
    work = Path(job.work)
    saved = work / "model"
    plain = trainer.accelerator.unwrap_model(trainer.model)
    plain.config, plain.generation_config = own  # the trainer changes padding and cache in them
    if job.precision == "fp32":
        for name, parameter in plain.named_parameters():
            if types[name] != parameter.dtype:  # the saved config names the type of the first one
                parameter.data = parameter.data.to(types[name])
    plain.save_pretrained(saved, state_dict=dict(rounded_state))
    AutoTokenizer.from_pretrained(job.model).save_pretrained(
        saved
    )  # the trainer may have added a padding token to its own
    again = AutoModelForCausalLM.from_pretrained(saved, dtype="auto")
    written = digests(tensors_of(again).items())
    rounded = digests(rounded_state.items())
    (saved / TENSORS).write_text(json.dumps(written, indent=0))
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    report = {
        "losses": losses,
        "history": history,
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "tokens": trainer.state.num_input_tokens_seen,
        "attention": plain.config._attn_implementation,
        "checks": {
            **watch.checks,
            "frozen_tensors": len(selection.frozen),
            "frozen_tensors_changed": list(changes.touched),
            "trained_tensors": len(selection.trained),
            "trained_tensors_unmoved": list(changes.unmoved),
            "trained_values": changes.values,
            "trained_values_changed": changes.changed,
            "trained_values_changed_as_saved": changes.survived,
            "optimizer_state_tensors": optimised,
            "saved_as_trained": written == rounded,
        },
    }
    (work / "report.json").write_text(json.dumps(report))
    if changes.touched:
        raise RunError(f"{len(changes.touched)} frozen tensors changed, such as {changes.touched[0]}.")
    if changes.not_finite:
        raise RunError(
            f"{len(changes.not_finite)} tensors have NaN or infinite values, such as {changes.not_finite[0]}. {_LOWER}"
        )
    if changes.unmoved:
        raise RunError(f"{len(changes.unmoved)} trained tensors did not change, such as {changes.unmoved[0]}.")
    if written != rounded:
        raise RunError("The saved model differs from the trained one.")


def _check_start(job: Job, at_start: dict[str, str]) -> None:
    if job.previous is None:
        return
    ended = json.loads((Path(job.previous) / TENSORS).read_text())
    differ = [name for name in ended if at_start.get(name) != ended[name]]
    if differ or len(ended) != len(at_start):
        raise RunError(
            f"{job.previous}: {len(differ)} tensors have changed since that stage was trained, such as "
            f"{(differ or ['?'])[0]}. Train it again, or restore its files."
        )


def _check_same(job: Job, at_start: dict[str, str]) -> None:
    """Raises RunError if a machine loaded other weights: only those of the first process are trained further."""
    found: list[Any] = [None] * job.processes
    torch.distributed.all_gather_object(found, at_start)
    for other in filter(None, found[1:]):
        differ = [name for name in found[0] if other.get(name) != found[0][name]]
        if differ or len(other) != len(found[0]):
            raise RunError(
                f"{job.model}: {len(differ)} tensors are not the same on all machines, such as {(differ or ['?'])[0]}. Give "
                "all machines the same files."
            )


def _check_resume(job: Job, started: dict[str, Any]) -> None:
    """Raises RunError if the fingerprint of the checkpoint differs: libraries match tensors only by their number."""
    if job.resume is not None and (told := difference(made_of(Path(job.resume)) or {}, started)):
        raise RunError(f"{job.resume} cannot be resumed: {told}")


def check_attention(model: Any, job: Job) -> None:
    """Checks that each packed example attends only to itself.

    Raises:
        RunError: the model's attention does not separate packed examples, or does not support the setting.
    """
    if job.attention == attention.VARLEN:
        if (other := attention.unsuited(model.config)) is not None:
            raise RunError(
                f'train.attention = "{attention.VARLEN}" has only plain causal attention, but {job.model} uses '
                f"{other}. Set it to sdpa."
            )
        if not job.cpu and attention.at_hand(model.config, job.precision):
            number = int(os.environ.get("LOCAL_RANK", "0"))
            with torch.random.fork_rng([number]), torch.device("cuda", number):
                torch.manual_seed(1)
                small = AutoModelForCausalLM.from_config(
                    two_layers(model.config), dtype=torch.float32, attn_implementation=attention.VARLEN
                )
            with torch.autocast("cuda", torch.bfloat16):
                check_packing(small.train(), usual="sdpa")
            del small
            torch.cuda.empty_cache()
            return
    check_packing(model)


def check_packing(model: Any, usual: str | None = None) -> None:
    """Checks the outputs of two short examples in one sequence.

    Args:
        usual: an implementation to compare the model's own with, on one example alone; also runs a backward pass.

    Raises:
        RunError: the output of the second example depends on the first, or differs from its output alone.
    """
    device = next(model.parameters()).device
    first, other, second = (torch.arange(*ends, device=device) for ends in ((3, 10), (11, 18), (4, 13)))
    size = model.config.get_text_config(decoder=True).vocab_size
    places = {"position_ids": torch.cat([torch.arange(7, device=device), torch.arange(9, device=device)])[None]}
    bounds = torch.tensor([0, 7, 16], dtype=torch.int32, device=device)  # as TRL passes them
    told = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 9, "max_length_k": 9}

    def run(ids: torch.Tensor, **more: Any) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=ids[None] % size, use_cache=False, **more).logits[0]
        return logits

    with torch.no_grad():
        packed = [run(torch.cat([ids, second]), **places)[7:].float() for ids in (first, other)]
        if usual is not None:
            packed.append(run(torch.cat([first, second]), **places, **told)[7:].float())
            own = model.config._attn_implementation
            model.set_attn_implementation(usual)
            alone = run(second).float()
            model.set_attn_implementation(own)
        else:
            alone = run(second).float()
    if usual is not None:
        run(torch.cat([first, second]), **places, **told).float().square().mean().backward()
    scale = float(alone.abs().max())
    if not math.isfinite(scale):
        raise RunError(
            "The model's outputs are NaN or infinite before training: its weights are damaged. Replace them."
        )
    # A mask adds exact zeros. An example alone has sums of another shape, and bf16 rounds to about 0.01.
    leaked = max(float((found - packed[0]).abs().max()) for found in packed)
    apart = float((packed[0] - alone).abs().max())
    if not (leaked <= 0.01 * scale and apart <= 0.05 * scale):
        raise RunError(
            f"{type(model).__name__} does not separate examples that share a sequence (their outputs differ by "
            f"{max(leaked, apart):.2g} of {scale:.2g}). Set train.packing = false."
        )


def _optimised(trainer: Any, selection: Selection) -> int:
    """Number of tensors with optimizer state; these must be the trained ones."""
    named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    names = {id(parameter): name for name, parameter in named}
    inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    found = {names.get(id(parameter)) for parameter in inner.state}
    if found != set(selection.trained):
        other = sorted(str(name) for name in found.symmetric_difference(selection.trained))
        raise RunError(
            f"The tensors with optimizer state are not the trained ones: {other[0]} is only in one of the two."
        )
    return len(found)


def _quieten(trainer: Any) -> None:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _leave(error: Path, text: str) -> None:
    """Tells the launcher why this process ends. Only the first error is kept: the others are its consequences."""
    with contextlib.suppress(OSError), open(error, "x") as file:
        file.write(text)


def _lost_another(problem: Exception) -> bool:
    """Whether an error only says that another process is gone."""
    text = str(problem).lower()
    told = ("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe", "timed out")
    return isinstance(problem, torch.distributed.DistError) or ("gloo" in text and any(each in text for each in told))


def _die_with(launcher: int) -> None:
    """Ends this process when the launcher or accelerate has ended, because its result would not be used."""
    parent = os.getppid()

    def watch() -> None:
        while True:
            time.sleep(0.5)
            if os.getppid() != parent or _has_ended(launcher):
                os._exit(75)

    threading.Thread(target=watch, daemon=True).start()


def _has_ended(process: int) -> bool:
    """Whether a process has ended, also if its parent has not asked for its exit code yet."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]  # on Linux
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return state in "ZX"


def main(path: str) -> None:
    job = Job.read(path)
    _die_with(job.launcher)
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    error = error_file(job)
    try:
        train(job)
        if job.cpu and torch.distributed.is_initialized():  # else gloo's threads can abort a process that ends
            torch.distributed.destroy_process_group()
    except CorpusprepError as problem:
        _leave(error, str(problem))
        sys.exit(2)
    except torch.OutOfMemoryError as problem:
        _leave(
            error,
            f"out of memory: {str(problem).splitlines()[0]} Set train.gradient_checkpointing = true, or "
            'train.parallelism = "fsdp" to shard the model over the GPUs, and continue with --resume; or lower '
            "train.micro_batch or train.sequence_length and train into another --out. corpusprep train --dry-run "
            "estimates the memory.",
        )
        traceback.print_exc()
        sys.exit(2)
    except Exception as problem:
        if job.processes > 1 and _lost_another(problem):
            _leave(
                error,
                f"{LOST_SIGN}The connection to another process was lost: {str(problem).splitlines()[0]} Finished work is kept: continue with --resume.",
            )
        _leave(error, f"{type(problem).__name__}: {problem} Finished work is kept: continue with --resume.")
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
