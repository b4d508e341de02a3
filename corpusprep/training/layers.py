"""Which parameters a stage trains: layers by their place, modules by their name."""

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
    """What is trained of a model.

    Attributes:
        layers: numbers of the trained layers, from 0, ascending.
        of: layers that the model has.
        stack: name of the list of layers in the model, as `model.layers`.
        trained, frozen: names of the parameters, in the model's order.
    """

    layers: tuple[int, ...]
    of: int
    stack: str
    trained: tuple[str, ...]
    frozen: tuple[str, ...]


def check_form(layers: str | Sequence[int]) -> None:
    """Raises ValueError where that names no layers of whatever model."""
    if not isinstance(layers, str):
        if len(set(layers)) < len(layers):
            raise ValueError("a layer is named twice")
        return
    ends, numbers = _ENDS.fullmatch(layers), _RANGE.fullmatch(layers)
    if ends and int(ends[2]) == 0:
        raise ValueError(f"{layers!r} trains no layer; write none, with modules to train")
    if numbers and int(numbers[1]) > int(numbers[2]):
        raise ValueError(f"{layers!r} ends before it begins")
    if not ends and not numbers and layers not in ("all", "none"):
        raise ValueError(f"{layers!r} names no layers; write bottom:4, top:15, 8-12, all, none, or a list as [0, 1, 5]")


def parse_layers(layers: str | Sequence[int], count: int) -> tuple[int, ...]:
    """The numbers of the layers, from 0, of a model that has `count`.

    Raises:
        SettingsError: the model has not as many.
    """
    if not isinstance(layers, str):
        found: Sequence[int] = sorted(layers)
    elif layers in ("all", "none"):
        found = range(count if layers == "all" else 0)
    elif ends := _ENDS.fullmatch(layers):
        number = int(ends[2])
        if number > count:
            raise SettingsError(f"train.stages: layers = {layers!r}, but the model has {count} layers.")
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
    """Name of the list of decoder layers, and how many there are.

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
    # A list within a layer, as that of experts, is not one of layers.
    found = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(found) != 1 or not isinstance(count, int):
        shown = f"several ({', '.join(found)})" if found else "none"
        raise SettingsError(
            f"{type(model).__name__}: a list of {count} decoder layers is looked for in the model, and there is {shown}. "
            "Stages by layers need a decoder with one."
        )
    return found[0], count


def select(model: Any, layers: str | Sequence[int], modules: Sequence[str]) -> Selection:
    """What a stage trains of a model.

    Args:
        model: a causal language model of transformers; it may lie on the device `meta`.
        layers, modules: see `TrainStage`.

    Raises:
        SettingsError: there is no such layer or module; nothing is to be trained; or a module's weight is another's too.
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
                f"train.stages: modules: {name!r} cannot be trained: in this model the output head and the input embeddings are "
                "one tensor (tie_word_embeddings), so that training one changes the other, and with it every layer's input. "
                "Leave it out."
            )
        if next(known[name].parameters(), None) is None:
            raise SettingsError(f"train.stages: modules: {name!r} has no parameters.")
        prefixes.append(f"{name}.")
    names = [name for name, _ in model.named_parameters()]
    trained = tuple(name for name in names if name.startswith(tuple(prefixes))) if prefixes else ()
    if not trained:
        raise SettingsError(f"train.stages: layers = {layers!r} and no modules: nothing would be trained.")
    inside = set(trained)
    return Selection(chosen, count, stack, trained, tuple(name for name in names if name not in inside))


def freeze(model: Any, selection: Selection) -> None:
    """Lets gradients flow to the trained parameters only, and makes these fp32: in bf16, most steps of a small learning rate
    would be rounded away. Frozen ones keep their type."""
    import torch

    trained = set(selection.trained)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        if name in trained:
            parameter.data = parameter.data.to(torch.float32)


def drop_input_gradients(model: Any) -> None:
    """Undoes `enable_input_require_grads`, which transformers 5 does with gradient checkpointing: it is for adapters, and with a
    frozen prefix it has all activations kept and computed again that freezing saves."""
    if getattr(model, "_require_grads_hooks", None) or getattr(model, "_require_grads_hook", None) is not None:
        model.disable_input_require_grads()


def _tied(model: Any, modules: dict[str, Any]) -> set[str]:
    config = model.config.get_text_config(decoder=True)
    if not getattr(config, "tie_word_embeddings", False):
        return set()
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    found = {name for name, module in modules.items() if any(module is end for end in ends)}
    # A module around them, as the whole decoder, trains them too.
    return found | {outer for outer in modules for name in found if name.startswith(f"{outer}.")}


def two_layers(config: Any) -> Any:
    """The configuration of a model with the first two layers of another."""
    small = copy.deepcopy(config)
    text = small.get_text_config(decoder=True)
    text.num_hidden_layers = 2
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:2]
    return small
