"""Settings of the training: the model, the stages, and what each stage trains."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from corpusprep.stage import Settings

Rate = Annotated[float, Field(gt=0, le=1)]
Layers = str | tuple[Annotated[int, Field(ge=0)], ...]


SCHEDULES = {"cosine": "cosine_with_min_lr", "linear": "linear", "constant": "constant_with_warmup"}
"""What transformers calls them."""


class TrainStage(Settings):
    """One stage of the training, a `[[train.stages]]` table. What it does not set is as `[train]` has it."""

    layers: Layers
    """Decoder layers that are trained, all others being frozen: `bottom:4` (the first ones, next to the embeddings), `top:15`,
    `8-12` (from 0, the last one included), `all`, `none`, or a list of numbers from 0."""
    modules: tuple[str, ...] = ()
    """Further modules that are trained, by their exact name in the model, as `model.norm`."""
    learning_rate: Rate | None = None
    """The highest of the schedule."""
    min_learning_rate: Annotated[float, Field(ge=0, le=1)] | None = None
    """Where the cosine ends."""
    warmup: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the steps in which the learning rate rises."""
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
    """A stage with nothing left open."""

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
    """The instruct model that is trained: a folder, or a name on the Hugging Face hub."""
    stages: Annotated[tuple[TrainStage, ...], Field(min_length=1)] = (
        TrainStage(layers="bottom:4"),
        TrainStage(layers="top:15"),
    )
    """One after another, each from what the one before has made."""
    learning_rate: Rate = 1e-5
    """The highest of the schedule."""
    min_learning_rate: Annotated[float, Field(ge=0, le=1)] = 2e-6
    """Where the cosine ends."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps in which the learning rate rises."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls: to min_learning_rate, to 0, or not."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the mix, in each stage."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Ends a stage after so many steps: for a trial."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of AdamW."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this norm; 0 for never."""
    sequence_length: Annotated[int, Field(ge=16)] = 4096
    """Tokens of a sequence; longer examples are left out and counted."""
    batch_tokens: Annotated[int, Field(ge=1)] = 131_072
    """Tokens of an optimizer step, over all devices, about."""
    micro_batch: Annotated[int, Field(ge=1)] = 1
    """Sequences that a device takes at once."""
    packing: bool = True
    """Several examples share a sequence, and never attend to one another."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """What is computed in; auto is bf16 on a GPU that can, else fp32. Trained weights and their optimizer are fp32 in both;
    frozen ones stay as the model has them."""
    gradient_checkpointing: bool = True
    """Computes activations again instead of keeping them: a third more time for much less memory."""
    attention: Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "auto"
    """The implementation of attention; auto is what transformers chooses. varlen is PyTorch's own flash attention within each
    packed example, for models of plain causal attention; it needs a GPU that computes in bf16 to be quick, and PyTorch 2.11."""
    template_arguments: dict[str, Any] = Field(default_factory=lambda: {"enable_thinking": False})
    """Arguments of the model's chat template; a template takes no notice of those that it does not know."""
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] | None = None
    """Of the order of examples; by default the recipe's."""
    parallelism: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several GPUs: a copy of the model on each (ddp), or shards of it (fsdp, that is FSDP2); auto is ddp where all fits
    one GPU by the estimate of `--dry-run`."""
    processes: Annotated[int, Field(ge=1)] | None = None
    """Processes, one a GPU; by default one for each GPU that is seen, or one without."""
    checkpoint_steps: Annotated[int, Field(ge=1)] = 200
    """Steps between checkpoints, from which `--resume` goes on."""
    log_steps: Annotated[int, Field(ge=1)] = 10
    """Steps between points of the loss curve."""
    validation_examples: Annotated[int, Field(ge=0)] = 1000
    """Examples of the mix's validation split whose loss is measured before and after each stage; 0 for none."""

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

    def of(self, stage: TrainStage) -> WholeStage:
        """A stage with all that it does not set itself."""
        names = ("learning_rate", "min_learning_rate", "warmup", "schedule", "epochs")
        own = {name: value for name in names if (value := getattr(stage, name)) is not None}
        shared = {name: getattr(self, name) for name in names}
        return WholeStage(layers=stage.layers, modules=stage.modules, **(shared | own))
