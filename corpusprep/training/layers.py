"""Selects the parameters that a stage trains: layers by position, modules by name."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from corpusprep.errors import SettingsError

_ENDS = re.compile(r"(bottom|top):(\d+)")
_RANGE = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True)
class Selection:
    """The trained and the frozen parameters of a model.

    Attributes:
        layers: numbers of the trained layers, from 0, ascending.
        of: number of layers in the model.
        stack: name of the list of layers in the model, such as `model.layers`.
        trained, frozen: names of the parameters, in the model's order.
    """

    layers: tuple[int, ...]
    of: int
    stack: str
    trained: tuple[str, ...]
    frozen: tuple[str, ...]


def check_form(layers: str | Sequence[int]) -> None:
    """Raises ValueError if `layers` cannot be valid for any model."""
    if not isinstance(layers, str):
        if len(set(layers)) < len(layers):
            raise ValueError("a layer is named twice")
        return
    ends, numbers = _ENDS.fullmatch(layers), _RANGE.fullmatch(layers)
    if ends and int(ends[2]) == 0:
        raise ValueError(f"{layers!r} selects no layer; write none, and list modules to train")
    if numbers and int(numbers[1]) > int(numbers[2]):
        raise ValueError(f"{layers!r} ends before it begins")
    if not ends and not numbers and layers not in ("all", "none"):
        raise ValueError(
            f"{layers!r} is not valid; write bottom:4, top:15, 8-12, all, none, or a list such as [0, 1, 5]"
        )


def parse_layers(layers: str | Sequence[int], count: int) -> tuple[int, ...]:
    """The numbers of the selected layers, from 0, of a model with `count` layers.

    Raises:
        SettingsError: the model has fewer layers.
    """
    if not isinstance(layers, str):
        found: Sequence[int] = sorted(layers)
    elif layers in ("all", "none"):
        found = range(count if layers == "all" else 0)
    elif ends := _ENDS.fullmatch(layers):
        number = int(ends[2])
        if number > count:
            raise SettingsError(f"train.stages: layers = {layers!r}, but the model has only {count} layers.")
        found = range(number) if ends[1] == "bottom" else range(count - number, count)
    else:
        first, last = layers.split("-")
        found = range(int(first), int(last) + 1)
    if found and found[-1] >= count:
        raise SettingsError(
            f"train.stages: layers = {layers!r}, but the model's layers are 0 to {count - 1}: there is no {found[-1]}."
        )
    return tuple(found)


def find_layers(model: Any) -> tuple[str, int]:
    """Name of the list of decoder layers, and their number.

    Raises:
        SettingsError: the model has no such list, or more than one.
    """
    from torch.nn import ModuleList

    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", None)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, ModuleList)
        and len(module) == count
        and len({type(layer) for layer in module}) == 1
        and any(True for _ in module.parameters())
    ]
    # A list inside a layer, such as that of experts, is not a list of layers.
    found = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(found) != 1 or not isinstance(count, int):
        shown = f"several ({', '.join(found)})" if found else "none"
        raise SettingsError(
            f"{type(model).__name__}: the model must have one list of {count} decoder layers, but it has {shown}. "
            "Choose a decoder with one such list."
        )
    return found[0], count


def select(model: Any, layers: str | Sequence[int], modules: Sequence[str]) -> Selection:
    """Selects the parameters of a model that a stage trains.

    Args:
        model: a causal language model of transformers; it may be on the device `meta`.
        layers, modules: see `TrainStage`.

    Raises:
        SettingsError: a layer or module does not exist; nothing would be trained; or a module shares its weight.
    """
    stack, count = find_layers(model)
    chosen = parse_layers(layers, count)
    prefixes = [f"{stack}.{number}." for number in chosen]
    known = {name: module for name, module in model.named_modules() if name}
    tied = _tied(model, known)
    for name in modules:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise SettingsError(f"train.stages: modules: the model has no module {name!r}.{hint}")
        if name in tied:
            raise SettingsError(
                f"train.stages: modules: {name!r} cannot be trained: this model's output head and input embeddings are "
                "one tensor (tie_word_embeddings), so training one changes the other, and with it the input of every "
                "layer. Leave it out."
            )
        if next(known[name].parameters(), None) is None:
            raise SettingsError(f"train.stages: modules: {name!r} has no parameters. Leave it out.")
        prefixes.append(f"{name}.")
    names = [name for name, _ in model.named_parameters()]
    trained = tuple(name for name in names if name.startswith(tuple(prefixes))) if prefixes else ()
    if not trained:
        raise SettingsError(f"train.stages: layers = {layers!r} and no modules: nothing would be trained.")
    inside = set(trained)
    return Selection(chosen, count, stack, trained, tuple(name for name in names if name not in inside))


def freeze(model: Any, selection: Selection) -> None:
    """Turns on gradients for the trained parameters only, and casts these to fp32: in bf16, most updates at a small
    learning rate would be rounded away. Frozen parameters keep their type here; a training in fp32 casts them, too."""
    import torch

    trained = set(selection.trained)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        if name in trained:
            parameter.data = parameter.data.to(torch.float32)


def drop_input_gradients(model: Any) -> None:
    """Undoes `enable_input_require_grads`, which transformers 5 calls with gradient checkpointing. It is meant for
    adapters. If the first layers are frozen, it keeps and recomputes all activations that freezing saves."""
    if getattr(model, "_require_grads_hooks", None) or getattr(model, "_require_grads_hook", None) is not None:
        model.disable_input_require_grads()


def _tied(model: Any, modules: dict[str, Any]) -> set[str]:
    config = model.config.get_text_config(decoder=True)
    if not getattr(config, "tie_word_embeddings", False):
        return set()
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    found = {name for name, module in modules.items() if any(module is end for end in ends)}
    # A module that contains them, such as the whole decoder, trains them too.
    return found | {outer for outer in modules for name in found if name.startswith(f"{outer}.")}


def two_layers(config: Any) -> Any:
    """A copy of a model's config with only the first two layers."""
    small = copy.deepcopy(config)
    text = small.get_text_config(decoder=True)
    text.num_hidden_layers = 2
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:2]
    return small
