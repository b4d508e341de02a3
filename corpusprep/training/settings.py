"""Settings of the training: the model, the stages, and what each stage trains."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from corpusprep.stage import Settings

Rate = Annotated[float, Field(gt=0, le=1)]
Layers = str | tuple[Annotated[int, Field(ge=0)], ...]


SCHEDULES = {"cosine": "cosine_with_min_lr", "linear": "linear", "constant": "constant_with_warmup"}
"""Names of the schedules in transformers."""


class TrainStage(Settings):
    """One stage of the training, a `[[train.stages]]` table. Settings that it leaves out are taken from `[train]`."""

    layers: Layers
    """Decoder layers to train: `bottom:4` (the first ones, next to the embeddings), `top:15`, `8-12` (counted from 0,
    both included), `all`, `none`, or a list of numbers from 0. All other layers are frozen."""
    modules: tuple[str, ...] = ()
    """Further modules to train, by their exact name in the model, such as `model.norm`."""
    learning_rate: Rate | None = None
    """Maximum of the learning rate."""
    min_learning_rate: Annotated[float, Field(ge=0, le=1)] | None = None
    """Learning rate at the end of a cosine schedule."""
    warmup: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the steps during which the learning rate rises."""
    schedule: Literal["cosine", "linear", "constant"] | None = None
    """How the learning rate falls."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the mix."""

    @field_validator("layers")
    @classmethod
    def _form(cls, value: Layers) -> Layers:
        from corpusprep.training.layers import check_form

        check_form(value)
        return value


class WholeStage(Settings):
    """A stage with all its settings."""

    layers: Layers
    modules: tuple[str, ...]
    learning_rate: float
    min_learning_rate: float
    warmup: float
    schedule: Literal["cosine", "linear", "constant"]
    epochs: float


class TrainSettings(Settings):
    """Settings of `corpusprep train`: the two stages of LLaMAX2 / Qwen3-XPlus (arXiv 2510.09189) by default."""

    model: str
    """The instruct model to train: a folder, or a name on the Hugging Face hub."""
    stages: Annotated[tuple[TrainStage, ...], Field(min_length=1)] = (
        TrainStage(layers="bottom:4"),
        TrainStage(layers="top:15"),
    )
    """The stages, in order. Each starts from the model of the previous one."""
    learning_rate: Rate = 1e-5
    """Maximum of the learning rate."""
    min_learning_rate: Annotated[float, Field(ge=0, le=1)] = 2e-6
    """Learning rate at the end of a cosine schedule."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps during which the learning rate rises."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls: cosine to min_learning_rate, linear to 0, constant not at all."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the mix, in each stage."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Ends each stage after this many steps, for a trial."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    sequence_length: Annotated[int, Field(ge=16)] = 4096
    """Tokens per sequence; longer examples are left out and counted."""
    batch_tokens: Annotated[int, Field(ge=1)] = 131_072
    """Approximate number of tokens per optimizer step, over all devices."""
    micro_batch: Annotated[int, Field(ge=1)] = 1
    """Sequences per device and forward pass."""
    packing: bool = True
    """Puts several examples into one sequence. They do not attend to each other."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the computation; auto is bf16 on a GPU that supports it, else fp32. Trained weights and their
    optimizer are always fp32; frozen weights keep the model's type. With fp32 they are held in fp32 while training, and saved in
    the model's type."""
    gradient_checkpointing: bool = True
    """Recomputes activations instead of keeping them: takes a third more time and much less memory."""
    attention: Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "auto"
    """The attention implementation; with auto, transformers chooses it. varlen is PyTorch's own flash attention within
    each packed example, for models with plain causal attention. It is fast only on a GPU with bf16 and PyTorch 2.11."""
    template_arguments: dict[str, Any] = Field(default_factory=lambda: {"enable_thinking": False})
    """Arguments of the model's chat template; a template ignores those that it does not know."""
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] | None = None
    """Seed of the order of examples; by default the recipe's seed."""
    parallelism: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several GPUs: a copy of the model on each (ddp), or a shard of it (fsdp, which is FSDP2). auto is ddp if
    everything fits one GPU by the estimate of `--dry-run`."""
    processes: Annotated[int, Field(ge=1)] | None = None
    """Number of processes on each machine, one per GPU; by default one for each visible GPU, or one if there is no GPU."""
    machines: Annotated[int, Field(ge=1)] | None = None
    """Number of machines that train together. Each runs the same command. By default what torchrun or Slurm set in the
    environment, else one. 1 ignores a Slurm job of several nodes."""
    machine_rank: Annotated[int, Field(ge=0)] | None = None
    """Number of this machine, from 0; by default from the environment. Machine 0 writes the results."""
    main_address: str | None = None
    """`host:port` of machine 0, where the others report; by default from the environment. Any free port will do."""
    machine_timeout: Annotated[int, Field(ge=1)] = 600
    """Seconds to wait at the start for the other machines."""
    checkpoint_steps: Annotated[int, Field(ge=1)] = 200
    """Steps between checkpoints, from which `--resume` continues."""
    log_steps: Annotated[int, Field(ge=1)] = 10
    """Steps between points of the loss curve."""
    validation_examples: Annotated[int, Field(ge=0)] = 1000
    """Number of validation examples whose loss is measured before and after each stage; 0 for none."""

    @model_validator(mode="after")
    def _falls(self) -> TrainSettings:
        for stage in self.stages:
            whole = self.of(stage)
            if whole.schedule == "cosine" and whole.min_learning_rate > whole.learning_rate:
                raise ValueError(
                    f"min_learning_rate = {whole.min_learning_rate} is above learning_rate = {whole.learning_rate}: the cosine "
                    "would rise"
                )
        return self

    @field_validator("main_address")
    @classmethod
    def _has_port(cls, value: str | None) -> str | None:
        if value is not None:
            host, _, port = value.rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
                raise ValueError("is not host:port, as in node1:29400")
        return value

    def of_the_weights(self) -> Self:
        """The settings without those that say where the training runs."""
        return self.without("machines", "machine_rank", "main_address", "machine_timeout")

    def of(self, stage: TrainStage) -> WholeStage:
        """A stage with all its settings: those that it leaves out are taken from `[train]`."""
        names = ("learning_rate", "min_learning_rate", "warmup", "schedule", "epochs")
        own = {name: value for name in names if (value := getattr(stage, name)) is not None}
        shared = {name: getattr(self, name) for name in names}
        return WholeStage(layers=stage.layers, modules=stage.modules, **(shared | own))
