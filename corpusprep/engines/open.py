"""The engine that a recipe or the command line names."""

from __future__ import annotations

import contextlib

from corpusprep.engines import Engine
from corpusprep.errors import SettingsError


def open_engine(
    name: str, workers: int | None = None, memory: int | None = None
) -> contextlib.AbstractContextManager[Engine | None]:
    """An engine; None for `local`, where the run makes its own, with as many workers as suit the input.

    Args:
        name: `local`, `ray`, or the address of a Ray cluster, `ray://host:10001` or `host:6379`.
        workers: number of workers, at most.
        memory: bytes that the workers of one machine may use.

    Raises:
        RunError: the cluster cannot be reached.
        SettingsError: there is no such engine.
    """
    if name == "local":
        return contextlib.nullcontext()
    if name != "ray" and ":" not in name:
        raise SettingsError(
            f"{name} is not an engine. Write local, ray, or the address of a Ray cluster: ray://host:10001."
        )
    from corpusprep.engines.ray import RayEngine

    return RayEngine(None if name == "ray" else name, workers, memory)
