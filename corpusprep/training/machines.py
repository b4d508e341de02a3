"""Where a launch of `corpusprep train` stands among those that train together: from the settings and the environment.

What the settings say comes first, then what torchrun and other launchers set (`NNODES`, `MASTER_ADDR`, …), then Slurm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from corpusprep.errors import SettingsError
from corpusprep.training.settings import TrainSettings

Environment = Mapping[str, str]

_NAMES = {
    "MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK",
    "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME",
}  # fmt: skip
_PREFIXES = ("TORCHELASTIC_", "PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")
_FIRST_SPECIAL_STEP = 4294967290  # steps of Slurm's own: an interactive shell, a batch script
_PORTS = range(20_000, 30_000)  # below the ports that Linux gives to connections


@dataclass(frozen=True)
class Place:
    """Where this launch stands.

    Attributes:
        machines: number of machines.
        launches: number of launches of the command: one on each machine, or as many as torchrun starts.
        rank: number of this launch, from 0. Launch 0 leads.
        host, port: where launch 0 listens; port 0 if launch 0 chooses one and tells it in `store`.
        local: number of this launch on its machine, from 0, and its GPU; None if it starts the processes of its machine.
        local_launches: number of launches on this machine.
        store: host and port of torchrun's store; None if there is none or if it is not needed.
        attempt: number of torchrun's restart.
        note: what the user may want to know, or nothing.
    """

    machines: int = 1
    launches: int = 1
    rank: int = 0
    host: str = ""
    port: int = 0
    local: int | None = None
    local_launches: int = 1
    store: tuple[str, int] | None = None
    attempt: str = "0"
    note: str = ""

    def name(self, rank: int) -> str:
        """What messages call a launch."""
        return f"{'machine' if self.local is None else 'process'} {rank}"

    def names(self, ranks: list[int]) -> str:
        """What messages call several launches."""
        if len(ranks) == 1:
            return self.name(ranks[0])
        word = "machines" if self.local is None else "processes"
        return f"{word} {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


class _Said(NamedTuple):
    """A number, and the setting or variable that says it."""

    value: int
    by: str


def find_place(settings: TrainSettings, environment: Environment, planning: bool = False) -> Place:
    """Where this launch stands.

    Args:
        environment: the variables of the process, such as `os.environ`.
        planning: for a dry run: only the number of machines must be known.

    Raises:
        SettingsError: settings or variables contradict each other, or one is missing.
    """
    if all(name in environment for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE")):
        return _of_torchrun(settings, environment)
    if settings.machines == 1:
        return _alone(settings)
    rank, address = _rank_set(settings), settings.main_address
    if settings.machines is not None and rank is not None and address is not None:
        return _placed(_Said(settings.machines, "train.machines"), rank, *_split(address))
    step = _slurm_step(environment)
    count = _count(settings, environment, step)
    if count is None or count.value == 1:
        return _alone(settings, note=_outside_a_step(environment) if settings.machines is None else "")
    rank = rank or _environment_rank(environment, count) or (step.rank if step else None)
    host, port = _address(settings, environment, step)
    if planning:
        rank = rank or _Said(0, "a dry run")
    elif rank is None or not host or port is None:
        raise SettingsError(_what_is_missing(count, rank, host, port, environment))
    return _placed(count, rank, host, port or 0)


def without_places(environment: Environment) -> dict[str, str]:
    """An environment without the variables that say where a process stands: its own processes stand elsewhere."""
    return {
        name: value for name, value in environment.items() if name not in _NAMES and not name.startswith(_PREFIXES)
    }  # fmt: skip


def first_host(nodes: str) -> str:
    """The first host of Slurm's list: `node07` of `node[07-09,12],gpu1`."""
    depth, end = 0, len(nodes)
    for at, letter in enumerate(nodes):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            end = at
            break
    return re.sub(r"\[([^\]]*)\]", lambda match: re.split("[-,]", match[1])[0], nodes[:end])


def _placed(count: _Said, rank: _Said, host: str, port: int) -> Place:
    if rank.value >= count.value:
        raise SettingsError(
            f"{rank.by} = {rank.value}, but {count.by} = {count.value}: machines are counted from 0, so the last one is "
            f"{count.value - 1}."
        )
    return Place(count.value, count.value, rank.value, host, port)


def _alone(settings: TrainSettings, note: str = "") -> Place:
    if settings.machine_rank:
        one = "train.machines = 1" if settings.machines == 1 else "train.machines is missing"
        raise SettingsError(f"train.machine_rank = {settings.machine_rank}, but {one}. Say how many machines train.")
    if settings.machines is None and settings.main_address is not None:
        raise SettingsError("train.main_address is set, but train.machines is missing. Say how many machines train.")
    return Place(note=note)


def _rank_set(settings: TrainSettings) -> _Said | None:
    return None if settings.machine_rank is None else _Said(settings.machine_rank, "train.machine_rank")


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _number(environment: Environment, name: str) -> _Said | None:
    """The number in a variable; None if the variable is missing.

    Raises:
        SettingsError: it is not a number.
    """
    value = environment.get(name, "").strip()
    if not value:
        return None
    if not value.isdecimal():
        raise SettingsError(f"The environment has {name} = {value}, which is not a number. Correct it, or unset it.")
    return _Said(int(value), name)


def _first(environment: Environment, *names: str) -> _Said | None:
    return next((said for name in names if (said := _number(environment, name)) is not None), None)


def _count(settings: TrainSettings, environment: Environment, step: _Step | None) -> _Said | None:
    """The number of machines. Everything that says one must agree."""
    said = [_Said(settings.machines, "train.machines")] if settings.machines is not None else []
    if (nodes := _number(environment, "NNODES")) is not None:
        said.append(nodes)
    elif (world := _number(environment, "WORLD_SIZE")) is not None:
        if _number(environment, "RANK") is not None:
            said.append(world)
        elif world.value > 1 and step is None and not said:
            raise SettingsError(
                f"The environment has WORLD_SIZE = {world.value}, but RANK is missing. Set both, or unset both."
            )
    if step is not None:
        said.append(step.nodes)
    for other in said[1:]:
        if other.value != said[0].value:
            raise SettingsError(
                f"{said[0].by} = {said[0].value}, but {other.by} = {other.value}. Let them agree; or set train.machines, "
                "train.machine_rank and train.main_address, and the environment does not count."
            )
    return said[0] if said else None


def _environment_rank(environment: Environment, count: _Said) -> _Said | None:
    if "NNODES" in environment:
        return _first(environment, "NODE_RANK", "GROUP_RANK", "RANK")
    if "WORLD_SIZE" in environment:
        return _number(environment, "RANK")
    return _first(environment, "NODE_RANK", "GROUP_RANK")


def _address(settings: TrainSettings, environment: Environment, step: _Step | None) -> tuple[str, int | None]:
    """Host and port of machine 0, as far as they are said."""
    if settings.main_address is not None:
        return _split(settings.main_address)
    host, port = environment.get("MASTER_ADDR", ""), _number(environment, "MASTER_PORT")
    if step is not None:
        return host or step.host, port.value if port else step.port
    return host, port.value if port else None


def _what_is_missing(count: _Said, rank: _Said | None, host: str, port: int | None, environment: Environment) -> str:
    by_variables = count.by in ("NNODES", "WORLD_SIZE")
    missing = []
    if rank is None:
        name = {"NNODES": "NODE_RANK", "WORLD_SIZE": "RANK"}.get(count.by, "train.machine_rank")
        missing.append(f"{name} (which of the machines this is, from 0 to {count.value - 1})")
    if not host or port is None:
        if by_variables or host or port is not None:
            name = " and ".join([*([] if host else ["MASTER_ADDR"]), *([] if port is not None else ["MASTER_PORT"])])
        else:
            name = "train.main_address"
        missing.append(f"{name} (host and port of machine 0, the same on all machines)")
    return (
        f"{count.by} = {count.value}, but there is no {' and no '.join(missing)}. Give each machine --set "
        "train.machine_rank=… and --set train.main_address=host:port, or start with srun or torchrun."
    )


def _of_torchrun(settings: TrainSettings, environment: Environment) -> Place:
    """The place of a process that torchrun started, or another program that starts one for each GPU."""
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if not environment.get(name)]:
        raise SettingsError(
            f"The environment has {needed[2]} as of torchrun, but not {', '.join(missing)}. Start with torchrun, or unset "
            f"{needed[2]}."
        )
    rank, world, local, local_world, port = (
        said for name in needed if name != "MASTER_ADDR" and (said := _number(environment, name)) is not None
    )
    machines = _number(environment, "GROUP_WORLD_SIZE") or _Said(-(-world.value // local_world.value), "WORLD_SIZE")
    machine = _number(environment, "GROUP_RANK") or _Said(rank.value // local_world.value, "RANK")
    for name, asked, told in (
        ("machines", settings.machines, machines.value),
        ("machine_rank", settings.machine_rank, machine.value),
        ("processes", settings.processes, local_world.value),
    ):
        if asked is not None and asked != told:
            raise SettingsError(
                f"train.{name} = {asked}, but torchrun says {told}. Leave train.{name} out where torchrun starts the "
                "processes."
            )
    if rank.value >= world.value:
        raise SettingsError(f"The environment has RANK = {rank.value}, but WORLD_SIZE = {world.value}.")
    master = (environment["MASTER_ADDR"], port.value)
    store = None
    if settings.main_address is not None:
        host, number = _split(settings.main_address)
    elif environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        host, number, store = master[0], 0, master  # its port is taken, by the store
    else:
        host, number = master
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Place(
        machines.value, world.value, rank.value, host, number, local.value, local_world.value, store, attempt
    )  # fmt: skip


class _Step(NamedTuple):
    """A step of a Slurm job, as `srun` starts it."""

    nodes: _Said
    rank: _Said
    host: str
    port: int


def _slurm_step(environment: Environment) -> _Step | None:
    """The step that this process is a task of; None outside of one, as in a batch script.

    Raises:
        SettingsError: the step has several nodes, and more or fewer tasks than nodes.
    """
    number = _number(environment, "SLURM_STEP_ID")
    nodes = _number(environment, "SLURM_STEP_NUM_NODES")
    if nodes is None and number is not None and number.value < _FIRST_SPECIAL_STEP:
        nodes = _first(environment, "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    rank = _first(environment, "SLURM_NODEID", "SLURM_PROCID")
    if nodes is None or rank is None:
        return None
    tasks = _first(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    if nodes.value > 1 and tasks is not None and tasks.value != nodes.value:
        raise SettingsError(
            f"{tasks.by} = {tasks.value}, but {nodes.by} = {nodes.value}: each machine needs one task, which starts a process "
            "for each of its GPUs. Start with srun --ntasks-per-node=1."
        )
    lists = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    listed = next((environment[name] for name in lists if environment.get(name)), "")
    # The node that srun was called on is not always one of the step's: it counts only where nothing else is known.
    host = first_host(listed) or environment.get("SLURM_LAUNCH_NODE_IPADDR", "")
    job = _first(environment, "SLURM_JOB_ID", "SLURM_JOBID")
    mixed = (job.value if job else 0) * 7 + (number.value if number else 0)
    return _Step(nodes, rank, host, _PORTS[mixed % len(_PORTS)])


def _outside_a_step(environment: Environment) -> str:
    nodes = _first(environment, "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
    if nodes is None or nodes.value == 1 or _slurm_step(environment) is not None:
        return ""
    return f"The Slurm job has {nodes.value} nodes, but this is only one of them: start with srun to train on all."
