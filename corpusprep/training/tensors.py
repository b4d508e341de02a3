"""Digests of a model's tensors, and a comparison of tensors before and after training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from corpusprep.training.layers import Selection


def tensor_digest(tensor: Any) -> str:
    """A digest of a tensor's type, shape and bytes."""
    import torch

    plain = tensor.detach().cpu().contiguous()
    state = hashlib.blake2b(f"{plain.dtype} {tuple(plain.shape)}".encode(), digest_size=16)
    state.update(plain.reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def tensors_of(model: Any) -> dict[str, Any]:
    """name -> tensor: all parameters, each once, and the buffers that are saved."""
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    own = dict(model.named_parameters())
    return own | {name: tensor for name, tensor in model.state_dict().items() if name not in again}


def digests(tensors: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """name -> digest."""
    named = list(tensors)
    with ThreadPoolExecutor() as pool:
        return dict(zip((name for name, _ in named), pool.map(tensor_digest, (t for _, t in named)), strict=True))


@dataclass(frozen=True)
class Changes:
    """The changes that a stage made to the tensors.

    Attributes:
        touched: frozen tensors that changed.
        unmoved: trained tensors that did not change.
        not_finite: trained tensors with a NaN or infinite value.
        values: number of values in the trained tensors.
        changed: number of values that changed, in fp32.
        survived: number of values that still differ after rounding to the type in which the model is saved.
    """

    touched: tuple[str, ...]
    unmoved: tuple[str, ...]
    not_finite: tuple[str, ...]
    values: int
    changed: int
    survived: int


def compare(
    state: Mapping[str, Any], before: Mapping[str, Any], frozen: Mapping[str, str], chosen: Selection
) -> Changes:
    """Compares the tensors after a stage with those before it.

    Args:
        state: all tensors after the stage.
        before: the trained tensors before the stage, in the type in which the model is saved.
        frozen: name -> digest of the frozen tensors and of buffers before the stage, in the same type.
        chosen: the trained and the frozen parameters.
    """
    import torch

    unmoved, not_finite, values, changed, survived = [], [], 0, 0, 0
    for name in chosen.trained:
        old, new = before[name], state[name].detach().cpu()
        differs = int((new.to(torch.float32) != old.to(torch.float32)).sum())
        if not differs:
            unmoved.append(name)
        if not bool(torch.isfinite(new).all()):
            not_finite.append(name)
        values += old.numel()
        changed += differs
        survived += int((new.to(old.dtype) != old).sum())
    after = digests((name, state[name]) for name in frozen)
    touched = tuple(name for name in frozen if after[name] != frozen[name])
    return Changes(touched, tuple(unmoved), tuple(not_finite), values, changed, survived)
