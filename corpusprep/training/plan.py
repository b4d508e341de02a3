"""Plans a training: parameters, steps, tokens and memory, from only the model's config and the mix."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from corpusprep.errors import RunError, SettingsError
from corpusprep.report.tables import columns
from corpusprep.training.examples import Encoder, Mix, conversations, count, portions
from corpusprep.training.layers import Selection, find_layers, select, two_layers
from corpusprep.training.settings import TrainSettings, WholeStage

_SAMPLE = 2048  # examples whose tokens are counted for a dry run
_PACKED = 0.98  # share of a packed sequence that examples fill, measured on mixes of sentence pairs
_SIZES = (16, 24, 32, 40, 48, 64, 80, 96, 141, 192)  # GiB of existing GPUs
_RESERVED = 1 << 30  # bytes that a GPU's driver, the allocator and the kernels use
_HEAD_ROWS = 1024  # rows of logits that TRL's loss keeps at a time


@dataclass(frozen=True)
class Memory:
    """Estimated memory of one device without sharding, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int | None

    @property
    def total(self) -> int | None:
        if self.activations is None:
            return None
        return self.weights + self.gradients + self.optimizer + self.activations + _RESERVED


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage."""

    number: int
    stage: WholeStage
    selection: Selection
    trained: int
    frozen: int
    memory: Memory


@dataclass(frozen=True)
class Batches:
    """How sequences are grouped into steps.

    Attributes:
        sequences: sequences of the data set: packed ones, or examples.
        micro_batch: sequences per device and forward pass.
        accumulation: forward passes per step.
        processes: number of devices.
    """

    sequences: int
    micro_batch: int
    accumulation: int
    processes: int

    def steps(self, epochs: float, limit: int | None) -> int:
        """Optimizer steps, as transformers counts them."""
        loads = math.ceil(self.sequences / (self.micro_batch * self.processes))
        steps = math.ceil(epochs * max(1, math.ceil(loads / self.accumulation)))
        return min(steps, limit) if limit is not None else steps


def batches(settings: TrainSettings, sequences: int, mean: float, longest: int, processes: int) -> Batches:
    """Divides the tokens of a step into batches.

    Args:
        sequences: sequences of the data set.
        mean, longest: mean and maximum tokens of an example.
    """
    if settings.packing:
        rows, tokens = settings.micro_batch, float(settings.sequence_length)
    else:
        rows, tokens = settings.micro_batch * max(1, settings.sequence_length // max(longest, 1)), mean
        rows = max(1, min(rows, round(settings.batch_tokens / max(tokens, 1) / processes)))
    accumulation = max(1, round(settings.batch_tokens / max(tokens * rows * processes, 1)))
    return Batches(sequences, rows, accumulation, processes)


def open_config(model: str) -> Any:
    """A model's config.

    Raises:
        RunError: the config cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(
            f"{model}: cannot be opened as a model: {reason} Give a folder with config.json, weights and tokenizer, or "
            "a model of the hub. If the model is gated, accept its licence on its page and log in with hf auth login."
        ) from None


def open_tokenizer(model: str) -> Any:
    """A model's tokenizer.

    Raises:
        RunError: the tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # an unknown tokenizer can fail in any way
        raise RunError(f"{model}: the tokenizer cannot be opened: {str(error).strip().splitlines()[0]}") from None


def skeleton(config: Any) -> Any:
    """The model without its weights.

    Raises:
        RunError: the config is not that of a causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=_dtype(config))
    except ValueError as error:
        raise RunError(f"{config.name_or_path}: is not a causal language model: {str(error).splitlines()[0]}") from None


def _dtype(config: Any) -> Any:
    import torch

    found = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, found) if isinstance(found, str) else found


def check_length(settings: TrainSettings, config: Any) -> None:
    """Raises SettingsError if a sequence is longer than the model's maximum."""
    most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is not None and settings.sequence_length > most:
        raise SettingsError(
            f"train.sequence_length = {settings.sequence_length}, but the model takes at most {most} tokens. Lower it."
        )


def devices() -> list[int]:
    """Memory of each GPU, in bytes."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [int(torch.cuda.get_device_properties(number).total_memory) for number in range(count)]


def plan_stages(settings: TrainSettings, config: Any, precision: str) -> list[StagePlan]:
    """Plans the stages: the parameters that they train, and the memory that they need."""
    model = skeleton(config)
    found = []
    for number, stage in enumerate(settings.stages, start=1):
        chosen = select(model, stage.layers, stage.modules)
        sizes = {name: (p.numel(), p.element_size()) for name, p in model.named_parameters()}
        trained = sum(sizes[name][0] for name in chosen.trained)
        frozen = sum(sizes[name][0] for name in chosen.frozen)
        memory = Memory(
            weights=4 * trained
            + sum(sizes[name][0] * (sizes[name][1] if precision == "bf16" else 4) for name in chosen.frozen),
            gradients=4 * trained,
            optimizer=8 * trained,
            activations=activations(settings, config, chosen, precision),
        )
        found.append(StagePlan(number, settings.of(stage), chosen, trained, frozen, memory))
    return found


def activations(settings: TrainSettings, config: Any, chosen: Selection, precision: str) -> int | None:
    """Bytes of activations that a device keeps for the backward pass; None if they cannot be estimated.

    They are counted on a model of two layers, with fake tensors and the mask of packed examples. A layer before the
    first trained layer keeps nothing.
    """
    first = chosen.layers[0] if chosen.layers else chosen.of
    if any("embed" in name for name in chosen.trained):
        first = 0
    behind = chosen.of - first
    tokens = settings.micro_batch * settings.sequence_length
    text = config.get_text_config(decoder=True)
    head = 2 * 4 * min(tokens, _HEAD_ROWS) * int(text.vocab_size)
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch logs a trace before it raises
    try:
        both, top, bottom = (saved_bytes(config, which, tokens, precision) for which in ((0, 1), (1,), (0,)))
    except Exception:  # the model cannot be cut to two layers, or needs the values of tensors
        return None
    finally:
        logging.disable(disabled)
    layer, rest = both - top, max(0, 2 * top - both)
    through = max(0, bottom - rest - layer)  # a frozen layer after a trained one
    of_trained = len(chosen.layers)
    kept = of_trained * layer + (behind - of_trained) * through
    if settings.gradient_checkpointing:
        width = 2 if precision == "bf16" else 4
        kept = min(kept, behind * tokens * int(text.hidden_size) * width + max(layer, through))
    return kept + rest + head


def saved_bytes(config: Any, trained: Sequence[int], tokens: int, precision: str) -> int:
    """Bytes that autograd keeps of a forward pass through a model's first two layers, some of which are trained."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModel

    with FakeTensorMode():
        model = AutoModel.from_config(two_layers(config), dtype=_dtype(config))
        stack, _ = find_layers(model)
        layers = model.get_submodule(stack)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for number in trained:
            for module in layers[number].modules():
                for name, parameter in module.named_parameters(recurse=False):
                    setattr(module, name, torch.nn.Parameter(parameter.detach().float()))
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        ids = torch.zeros((1, tokens), dtype=torch.long)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            out = model(input_ids=ids, use_cache=False)
            del out
    return sum(kept.values())


@dataclass(frozen=True)
class Preview:
    """Token counts of a mix, estimated from its first examples."""

    examples: int
    sampled: int
    mean: float
    longest: int
    too_long: int

    @property
    def kept(self) -> int:
        """Approximate number of examples that are not too long."""
        return round(self.examples * (1 - self.too_long / max(self.sampled, 1)))

    def sequences(self, settings: TrainSettings) -> int:
        """Approximate number of sequences in the data set: packed ones, or examples."""
        if not settings.packing:
            return self.kept
        return max(1, round(self.kept * self.mean / settings.sequence_length / _PACKED))


def preview(mix: Mix, encoder: Encoder, longest: int) -> Preview:
    """Counts the tokens of the first examples, which are a sample because the mix is shuffled."""
    sizes: list[int] = []
    for where, chats in conversations(portions(mix.train, _SAMPLE)):
        sizes += [len(ids) for ids, _ in encoder.encode(chats, where)]
    kept = [size for size in sizes if size <= longest]
    return Preview(
        count(mix.train),
        len(sizes),
        sum(kept) / max(len(kept), 1),
        max(kept, default=0),
        len(sizes) - len(kept),
    )


def describe(
    settings: TrainSettings,
    stages: Sequence[StagePlan],
    shown: Batches,
    precision: str,
    seen: Preview,
    gpus: list[int],
    machines: int = 1,
) -> str:
    """The printed text of a dry run.

    Args:
        gpus: memory of each visible GPU, in bytes.
        machines: number of machines that train together.
    """
    rows = []
    for plan in stages:
        m = plan.memory
        steps = shown.steps(plan.stage.epochs, settings.max_steps)
        rows.append(
            (
                str(plan.number), _layers(plan.selection), f"{plan.trained:,}", f"{plan.frozen:,}",
                f"{plan.trained / max(plan.trained + plan.frozen, 1):.1%}", f"{steps:,}", _gib(m.weights), _gib(m.gradients),
                _gib(m.optimizer), _gib(m.activations), _gib(m.total), _fits(m.total, gpus),
            )
        )  # fmt: skip
    head = (
        "stage", "layers", "trained", "frozen", "share", "steps", "weights", "gradients", "optimizer", "activations",
        "total, GiB", "fits",
    )  # fmt: skip
    tokens = seen.kept * seen.mean
    a_step = (
        settings.sequence_length * _PACKED if settings.packing else seen.mean
    ) * shown.micro_batch * shown.accumulation * shown.processes  # fmt: skip
    unit = "packed sequences" if settings.packing else "examples"
    on = f"{shown.processes} {'processes' if shown.processes > 1 else 'process'}"
    if machines > 1:
        on += f" ({machines} machines, {shown.processes // machines} on each)"
    lines = [
        columns(rows, head),
        "",
        f"{seen.examples:,} examples, about {tokens:,.0f} tokens with this model's template (counted on the first "
        f"{seen.sampled:,}; {seen.too_long:,} of these are longer than {settings.sequence_length:,} and left out).",
        f"A step: about {a_step:,.0f} tokens, {shown.micro_batch} x {shown.accumulation} {unit} on {on}: "
        f"{shown.micro_batch * shown.accumulation * shown.processes:,} {unit} in all, in {precision}; trained weights and their "
        "optimizer in fp32.",
    ]
    return "\n".join(lines)


def _layers(chosen: Selection) -> str:
    if not chosen.layers:
        return f"none of {chosen.of}"
    first, last = chosen.layers[0], chosen.layers[-1]
    together = last - first + 1 == len(chosen.layers)
    numbers = f"{first}-{last}" if together and last > first else ",".join(map(str, chosen.layers))
    return f"{numbers} of {chosen.of}"


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**30:.2f}"


def _fits(total: int | None, gpus: list[int]) -> str:
    if total is None:
        return "?"
    if gpus:
        return "yes" if total <= min(gpus) else f"no: the GPU has {min(gpus) / 2**30:.0f} GiB; shard the model (fsdp)"
    room = next((size for size in _SIZES if total <= size * 2**30), None)
    return f"a GPU of {room} GiB" if room else f"no GPU up to {_SIZES[-1]} GiB: shard the model (fsdp)"
