"""The network of a COMET quality estimation model, run on concatenated rows without padding.

Two model classes are supported: `unified_metric` (Rei et al., "CometKiwi", WMT 2022), which reads translation and
source as one sequence, and `referenceless_regression_metric` (Rei et al., "Unbabel's participation in the WMT20 metrics
shared task"), which compares embeddings of the two. Their encoder is XLM-RoBERTa (Conneau et al. 2020) or
XLM-RoBERTa-XL (Goyal et al. 2021). Hidden states of all layers are mixed with learned weights (softmax, or sparsemax of
Martins and Astudillo 2016), pooled, and passed to a feed-forward head.

States that the head does not use are not computed. Layers above the last layer with a non-zero weight are skipped. If
only the first token is used, the last layer computes only that token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from corpusprep.errors import RunError
from corpusprep.stages.quality.comet.files import CometFiles, line, needs_reference, read_hparams, unreadable

_UNBABEL = 'Set quality.backend = "unbabel" to run it with COMET itself.'
_DEFAULTS: dict[str, dict[str, Any]] = {  # defaults of COMET's classes for missing hyperparameters
    "unified_metric": {
        "encoder_model": "XLM-RoBERTa", "layer": "mix", "layer_transformation": "sparsemax", "layer_norm": True, "pool": "cls",
        "hidden_sizes": [3072, 1024], "activations": "Tanh", "final_activation": None, "input_segments": ["mt", "src", "ref"],
    },
    "referenceless_regression_metric": {
        "encoder_model": "XLM-RoBERTa", "layer": "mix", "layer_transformation": "softmax", "layer_norm": True, "pool": "avg",
        "hidden_sizes": [2048, 1024], "activations": "Tanh", "final_activation": None,
    },
}  # fmt: skip
_UNUSED = (
    "hidden2tag.",
    "encoder.model.pooler.",
    "layerwise_attention.dropout_",
    "train_",
    "val_",
    "wordloss.",
    "sentloss.",
)
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
_HEAD_ACTIVATIONS = ("Tanh", "Sigmoid", "Softplus", "Softsign", "Hardtanh", "Identity", "Tanhshrink")
_LAYER_NORM_EPSILON = 1e-12  # of the layer mix


class Batch(NamedTuple):
    """Concatenated rows of tokens; rows of equal length are adjacent.

    Attributes:
        tokens: int64 (t,).
        positions: int64 (t,), index of each token's position embedding.
        bounds: int32 (n + 1,), the start of each row, and the end of the last row.
        first: int64 (n,), the start of each row.
        groups: (start, rows, tokens per row) of each run of rows of equal length.
    """

    tokens: Tensor
    positions: Tensor
    bounds: Tensor
    first: Tensor
    groups: tuple[tuple[int, int, int], ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(length for _, _, length in self.groups)


@dataclass(frozen=True)
class Shape:
    """The shape of an encoder, from its `config.json`."""

    hidden: int
    layers: int
    heads: int
    feed_forward: int
    vocabulary: int
    positions: int
    pad: int
    epsilon: float
    activation: str
    norm_first: bool
    """XLM-RoBERTa-XL: layer norm before attention and before the feed-forward layer, not after."""


class _Layer(NamedTuple):
    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    norm_attention: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    norm_feed_forward: tuple[Tensor, Tensor]


class _Weights:
    """The weights of a checkpoint, taken one by one. Each must exist, have the right shape, and be taken."""

    def __init__(self, found: dict[str, Tensor], checkpoint: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._found = {
            name: value
            for name, value in found.items()
            if not name.startswith(_UNUSED) and not name.endswith("position_ids") and "metrics" not in name
        }
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, device
        self._missing: list[str] = []

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        value = self._found.pop(name, None)
        if value is None:
            self._missing.append(name)
            return torch.zeros(shape, dtype=dtype or self._dtype, device=self._device)
        if tuple(value.shape) != shape:
            raise RunError(
                f"{self._checkpoint}: {name} has shape {tuple(value.shape)}, but its hyperparameters and its encoder's "
                f"config.json require {shape}. Check that the files are from the same model."
            )
        if not value.dtype.is_floating_point:
            raise RunError(f"{self._checkpoint}: {name} is {value.dtype}; weights must be floats.")
        return value.to(dtype or self._dtype).to(self._device)

    def linear(self, name: str, out: int, into: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        return self.take(f"{name}.weight", out, into, dtype=dtype), self.take(f"{name}.bias", out, dtype=dtype)

    def norm(self, name: str, size: int) -> tuple[Tensor, Tensor]:
        return self.take(f"{name}.weight", size), self.take(f"{name}.bias", size)

    def all_taken(self) -> None:
        if self._missing:
            raise RunError(
                f"{self._checkpoint} is incomplete or does not match its hparams.yaml: {len(self._missing)} of the "
                f"model's weights are missing, such as {self._missing[0]}."
            )
        if self._found:
            raise RunError(
                f"{self._checkpoint} has {len(self._found)} weights that do not match its hyperparameters, such as "
                f"{min(self._found)}. {_UNBABEL}"
            )


class Encoder:
    """XLM-RoBERTa or XLM-RoBERTa-XL."""

    def __init__(self, shape: Shape, weights: _Weights, layers: int, kernels: bool) -> None:
        self.shape = shape
        h, f = shape.hidden, shape.feed_forward
        name = "encoder.model.embeddings"
        self._words = weights.take(f"{name}.word_embeddings.weight", shape.vocabulary, h)
        self._positions = weights.take(f"{name}.position_embeddings.weight", shape.positions, h)
        # There is one token type: its embedding is the same for all tokens.
        self._positions = self._positions + weights.take(f"{name}.token_type_embeddings.weight", 1, h)
        self._norm = None if shape.norm_first else weights.norm(f"{name}.LayerNorm", h)
        self._layers = []
        for k in range(shape.layers):
            name = f"encoder.model.encoder.layer.{k}"
            parts = [weights.linear(f"{name}.attention.self.{part}", h, h) for part in ("query", "key", "value")]
            before = (
                f"{name}.attention.self_attn_layer_norm" if shape.norm_first else f"{name}.attention.output.LayerNorm"
            )
            layer = _Layer(
                (torch.cat([w for w, _ in parts]), torch.cat([b for _, b in parts])),
                weights.linear(f"{name}.attention.output.dense", h, h),
                weights.norm(before, h),
                weights.linear(f"{name}.intermediate.dense", f, h),
                weights.linear(f"{name}.output.dense", h, f),
                weights.norm(f"{name}.LayerNorm" if shape.norm_first else f"{name}.output.LayerNorm", h),
            )
            if k < layers:
                self._layers.append(layer)
        self._last_norm = weights.norm("encoder.model.encoder.LayerNorm", h) if shape.norm_first else None
        self._activation = _ACTIVATIONS[shape.activation]
        self._kernels: Any = _kernels(self._words, shape.heads) if kernels else None
        self._quick = self._kernels is not None and self._words.dtype == torch.bfloat16

    def states(self, batch: Batch, first_only: bool) -> Iterator[Tensor]:
        """Hidden states from the embeddings to the last layer that is kept, (t, hidden) each.

        If first_only, the last state has only the first token of each row, (n, hidden).
        """
        shape = self.shape
        x = F.embedding(batch.tokens, self._words) + F.embedding(batch.positions, self._positions)
        if self._norm is not None:
            x = self._normalise(x, self._norm)
        yield x
        for k, layer in enumerate(self._layers, 1):
            last = k == len(self._layers)
            x = self._layer(layer, x, batch, first_only and last)
            if k == shape.layers and self._last_norm is not None:
                x = self._normalise(x, self._last_norm)
            yield x

    def _layer(self, layer: _Layer, x: Tensor, batch: Batch, first_only: bool) -> Tensor:
        norm_first = self.shape.norm_first
        inner = self._normalise(x, layer.norm_attention) if norm_first else x
        attended = F.linear(self._attend(layer, inner, batch, first_only), *layer.out)
        if first_only:
            x = x[batch.first]
        if norm_first:
            x = attended.add_(x)
            inner = self._normalise(x, layer.norm_feed_forward)
        else:
            x = inner = self._add_normalise(attended, x, layer.norm_attention)
        fed = F.linear(self._raise(inner, layer), *layer.down)
        return fed.add_(x) if norm_first else self._add_normalise(fed, x, layer.norm_feed_forward)

    def _raise(self, x: Tensor, layer: _Layer) -> Tensor:
        if self._quick and self.shape.activation.startswith("gelu"):
            found: Tensor = self._kernels.linear_gelu(x, *layer.up)
            return found
        return self._activation(F.linear(x, *layer.up))

    def _attend(self, layer: _Layer, x: Tensor, batch: Batch, first_only: bool) -> Tensor:
        heads, hidden = self.shape.heads, self.shape.hidden
        weight, bias = layer.qkv
        if first_only:
            queries = F.linear(x[batch.first], weight[:hidden], bias[:hidden]).view(-1, heads, 1, hidden // heads)
            parts = F.linear(x, weight[hidden:], bias[hidden:])
        else:
            parts = F.linear(x, weight, bias)
        if self._quick:
            apart = parts.view(len(x), -1, heads, hidden // heads).unbind(1)
            bounds, longest = batch.bounds, batch.longest
            asked, asking = bounds, longest
            if first_only:
                asked, asking = torch.arange(len(bounds), dtype=torch.int32, device=x.device), 1
            q, k, v = (queries.squeeze(2), *apart) if first_only else apart
            attended: Tensor = self._kernels.attention(q, k, v, asked, bounds, asking, longest)
            return attended.view(-1, hidden)
        out = []
        row = 0
        for start, rows, length in batch.groups:
            group = parts[start : start + rows * length].view(rows, length, -1, heads, hidden // heads)
            q, k, v = (None, *group.permute(2, 0, 3, 1, 4)) if first_only else group.permute(2, 0, 3, 1, 4)
            if q is None:
                q = queries[row : row + rows]
            row += rows
            out.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, hidden))
        return out[0] if len(out) == 1 else torch.cat(out)

    def _normalise(self, x: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        return F.layer_norm(x, (self.shape.hidden,), *norm, self.shape.epsilon)

    def _add_normalise(self, x: Tensor, y: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        """The layer norm of x + y; x may be overwritten."""
        if self._kernels is not None:
            found: Tensor = self._kernels.add_norm(x, y, *norm, self.shape.epsilon)
            return found
        return self._normalise(x.add_(y), norm)


def _kernels(like: Tensor, heads: int) -> Any:
    """The built-in kernels for tensors like this; None if a head is too large.

    Raises:
        RunError: the kernels cannot be compiled.
    """
    if like.shape[1] // heads > 128:
        return None
    try:
        from corpusprep.stages.quality.comet import fused as kernels

        kernels.check(like, heads)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton raises many types of errors
        raise RunError(
            f"Triton cannot compile kernels for this GPU: {type(error).__name__}: {line(error)} Set quality.kernels = "
            "false to run without them."
        ) from error
    return kernels


class CometModel:
    """A checkpoint, ready to score.

    Args:
        files: the model's files.
        dtype: type of the encoder's computation; mix, pooling and head are in float32.
        device: device of the model.
        kernels: whether the built-in kernels are used.

    Attributes:
        joint: whether translation and source are read as one sequence; else embeddings of single texts are compared.
        limit: maximum number of tokens of the encoder.
        hidden: size of an embedding.

    Raises:
        RunError: the checkpoint cannot be read, lacks weights, or is not supported.
    """

    def __init__(self, files: CometFiles, dtype: torch.dtype, device: torch.device, kernels: bool = False) -> None:
        hparams = read_hparams(files.checkpoint)
        kind = _known(files.checkpoint, hparams)
        state, found = _contents(files.checkpoint)
        settings = {**_DEFAULTS[kind], **found}
        if kind == "unified_metric":
            settings |= {"layer": settings.get("sent_layer", settings["layer"]), "pool": "cls"}
            if "src" not in settings["input_segments"]:
                raise needs_reference(files.checkpoint, kind)
        self.joint = kind == "unified_metric"
        self.pool = settings["pool"]
        shape = _shape(files.config, settings["encoder_model"])
        self.hidden, self.limit, self.pad = shape.hidden, shape.positions - 2, shape.pad
        weights = _Weights(state, files.checkpoint, dtype, device)
        self._mix(settings, hparams, weights, shape, files.checkpoint)
        used = max(k for k, weight in enumerate(self._shares) if weight)
        self.encoder = Encoder(shape, weights, used, kernels)
        self._head = _head(settings, weights, shape.hidden * (1 if self.joint else 4), files.checkpoint)
        weights.all_taken()

    def _mix(
        self, settings: dict[str, Any], hparams: dict[str, Any], weights: _Weights, shape: Shape, checkpoint: Path
    ) -> None:
        """Sets the weight of each layer's states."""
        if self.pool not in ("avg", "cls", "max", "default"):
            raise RunError(f"{checkpoint}: the pooling {self.pool!r} is not supported.")
        self._normed, self._gamma = False, 1.0
        layer = settings["layer"]
        if layer != "mix" or self.pool == "default":
            if self.pool == "default":  # the first token's last state
                layer, self.pool = shape.layers, "cls"
            if not isinstance(layer, int) or not 0 <= layer <= shape.layers:
                raise RunError(f"{checkpoint}: layer {layer!r} is not one of the encoder's {shape.layers + 1} layers.")
            self._shares = [float(k == layer) for k in range(shape.layers + 1)]
        if settings["layer"] != "mix":
            return
        scalars = [
            weights.take(f"layerwise_attention.scalar_parameters.{k}", 1, dtype=torch.float32)
            for k in range(shape.layers + 1)
        ]
        gamma = weights.take("layerwise_attention.gamma", 1, dtype=torch.float32)
        if settings["pool"] == "default":
            return
        # "sparsemax_patch" marks models that were trained with softmax although their setting is sparsemax.
        sparse = (
            settings["layer_transformation"] == "sparsemax" and hparams.get("layer_transformation") != "sparsemax_patch"
        )
        shares = (sparsemax if sparse else lambda values: torch.softmax(values, 0))(torch.cat(scalars).cpu())
        self._shares = shares.tolist()
        self._gamma = float(gamma)
        self._normed = bool(settings["layer_norm"])

    def embed(self, batch: Batch) -> Tensor:
        """Embeddings of rows, float32 (n, hidden)."""
        first_only = self.pool == "cls" and not self._normed
        mixed: Tensor | None = None
        last = len(self._shares) - 1 - next(k for k, share in enumerate(reversed(self._shares)) if share)
        for k, (state, share) in enumerate(zip(self.encoder.states(batch, first_only), self._shares, strict=False)):
            if share:
                if self.pool == "cls" and not (first_only and k == last and k > 0):
                    piece = state[batch.first].float()
                elif self.pool == "avg":
                    piece = self._mean(state, batch)
                else:
                    piece = state.float()
                if self._normed:
                    piece = self._standardise(piece, state, batch)
                piece = piece * share
                mixed = piece if mixed is None else mixed.add_(piece)
        assert mixed is not None
        mixed = mixed * self._gamma
        return self._most(mixed, batch) if self.pool == "max" else mixed

    def score(self, embedded: Tensor) -> Tensor:
        """The head's score of each row, float32 (n,). The embeddings are those of whole rows, or of translation and
        source, (n, 2, hidden)."""
        if not self.joint:
            mt, src = embedded.unbind(1)
            embedded = torch.cat((mt, src, mt * src, (mt - src).abs()), 1)
        for step in self._head:
            embedded = step(embedded)
        return embedded.view(-1)

    def _mean(self, state: Tensor, batch: Batch) -> Tensor:
        real = (batch.tokens != self.pad).unsqueeze(1)
        state = state.float() * real
        return torch.cat([group.mean(1) for group in _apart(state, batch)])

    def _most(self, state: Tensor, batch: Batch) -> Tensor:
        state = state.masked_fill((batch.tokens == self.pad).unsqueeze(1), float("-inf"))
        return torch.cat([group.amax(1) for group in _apart(state, batch)])

    def _standardise(self, piece: Tensor, state: Tensor, batch: Batch) -> Tensor:
        """(piece - mean) / deviation, with mean and deviation of all states of a row, over tokens and dimensions."""
        found = []
        for group in _apart(state.float(), batch):
            mean = group.mean((1, 2), keepdim=True)
            found.append(torch.stack((mean.view(-1), ((group - mean) ** 2).mean((1, 2))), 1))
        mean, variance = torch.cat(found).unbind(1)
        deviation = torch.sqrt(variance + _LAYER_NORM_EPSILON)
        if self.pool == "avg":
            # Padding tokens within the text count as zero, before and after standardisation.
            real = (batch.tokens != self.pad).float().unsqueeze(1)
            share = torch.cat([group.mean((1, 2)) for group in _apart(real, batch)])
            return (piece - (mean * share).unsqueeze(1)) / deviation.unsqueeze(1)
        if piece.shape[0] != mean.shape[0]:  # one item per token
            lengths = torch.tensor(
                [length for _, rows, length in batch.groups for _ in range(rows)], device=mean.device
            )
            mean, deviation = mean.repeat_interleave(lengths), deviation.repeat_interleave(lengths)
        return (piece - mean.unsqueeze(1)) / deviation.unsqueeze(1)


def _apart(state: Tensor, batch: Batch) -> Iterator[Tensor]:
    """States of the groups, (rows, length, ·) each."""
    for start, rows, length in batch.groups:
        yield state[start : start + rows * length].view(rows, length, -1)


def sparsemax(values: Tensor) -> Tensor:
    """The point of the simplex nearest to values (n,); most of its coordinates are zero."""
    ordered = values.sort(descending=True).values
    sums = ordered.cumsum(0) - 1
    counts = torch.arange(1, len(values) + 1)
    support = int((counts * ordered > sums).sum())
    return (values - sums[support - 1] / support).clamp_min(0)


def _head(settings: dict[str, Any], weights: _Weights, into: int, checkpoint: Path) -> list[Callable[[Tensor], Tensor]]:
    def activation(name: Any) -> Callable[[Tensor], Tensor]:
        if str(name).title() not in _HEAD_ACTIVATIONS:
            raise RunError(f"{checkpoint}: the activation {name!r} of its head is not supported. {_UNBABEL}")
        module: Callable[[Tensor], Tensor] = getattr(torch.nn, str(name).title())()
        return module

    def linear(name: str, out: int, into: int) -> Callable[[Tensor], Tensor]:
        pair = weights.linear(name, out, into, torch.float32)
        return lambda x: F.linear(x, *pair)

    steps: list[Callable[[Tensor], Tensor]] = []
    sizes: Sequence[int] = [into, *settings["hidden_sizes"]]
    for k in range(len(sizes) - 1):  # linear, activation, dropout
        steps += [linear(f"estimator.ff.{3 * k}", sizes[k + 1], sizes[k]), activation(settings["activations"])]
    steps.append(linear(f"estimator.ff.{3 * (len(sizes) - 1)}", 1, sizes[-1]))
    if settings["final_activation"] is not None:
        steps.append(activation(settings["final_activation"]))
    return steps


def _known(checkpoint: Path, hparams: dict[str, Any]) -> str:
    kind = str(hparams["class_identifier"])
    if kind not in _DEFAULTS:
        raise RunError(f"{checkpoint}: models of class {kind} are not supported. {_UNBABEL}")
    return kind


def shape_of(files: CometFiles) -> Shape:
    """The shape of a model's encoder, from its small files.

    Raises:
        RunError: the model or its encoder is not supported.
    """
    hparams = read_hparams(files.checkpoint)
    kind = _known(files.checkpoint, hparams)
    return _shape(files.config, hparams.get("encoder_model", _DEFAULTS[kind]["encoder_model"]))


def _shape(config: Path, encoder: str) -> Shape:
    """The shape in config.json.

    Raises:
        RunError: the file cannot be read, or the encoder is not supported.
    """
    if encoder not in ("XLM-RoBERTa", "XLM-RoBERTa-XL"):
        raise RunError(f"{config}: encoders of class {encoder} are not supported. {_UNBABEL}")
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
        shape = Shape(
            hidden=int(found["hidden_size"]),
            layers=int(found["num_hidden_layers"]),
            heads=int(found["num_attention_heads"]),
            feed_forward=int(found["intermediate_size"]),
            vocabulary=int(found["vocab_size"]),
            positions=int(found["max_position_embeddings"]),
            pad=int(found.get("pad_token_id", 1)),
            epsilon=float(found.get("layer_norm_eps", 1e-5 if encoder == "XLM-RoBERTa-XL" else 1e-12)),
            activation=str(found.get("hidden_act", "gelu")),
            norm_first=encoder == "XLM-RoBERTa-XL",
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{config} does not describe an encoder: {type(error).__name__}: {line(error)}") from error
    if shape.activation not in _ACTIVATIONS or found.get("position_embedding_type", "absolute") != "absolute":
        raise RunError(f"{config}: {shape.activation} or its type of positions is not supported. {_UNBABEL}")
    if shape.heads < 1 or shape.hidden % shape.heads or shape.positions < 8 or shape.layers < 1:
        raise RunError(f"{config} does not describe an encoder: its sizes are inconsistent.")
    return shape


def _contents(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and hyperparameters of a checkpoint. The weights are memory-mapped, not read; only data is unpickled."""
    try:
        found = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
        state, settings = found["state_dict"], found["hyper_parameters"]
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise TypeError("a weight is not a tensor")
        return dict(state), dict(settings)
    except Exception as error:  # unpickling an unknown file can raise any error
        raise unreadable(checkpoint, error) from error
