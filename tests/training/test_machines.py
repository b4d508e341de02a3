"""Where a launch stands: what settings, torchrun and Slurm say of it, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from corpusprep.errors import SettingsError
from corpusprep.recipe import load_train
from corpusprep.training.machines import Place, find_place, first_host, without_places
from corpusprep.training.settings import TrainSettings

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1", "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "0",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[07,09-12]", "SLURM_JOB_NODELIST": "gpu[01-12]", "SLURM_JOB_NUM_NODES": "12",
    "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_PROCID": "1", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}  # fmt: skip


def asked(**more: Any) -> TrainSettings:
    return TrainSettings(model="any", **more)


def place(environment: dict[str, str], **more: Any) -> Place:
    return find_place(asked(**more), environment)


def test_nothing_said_is_one_machine() -> None:
    assert place({}) == Place()
    assert place({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "node1"}) == Place()
    assert place({"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "RANK": "3"}) == Place()  # left over from something


def test_settings_say_it_all() -> None:
    whole = {"machines": 3, "machine_rank": 2, "main_address": "node1:29400"}
    found = place({}, **whole)
    assert (found.machines, found.launches, found.rank, found.host, found.port) == (3, 3, 2, "node1", 29400)
    assert found.local is found.store is None
    assert place(SLURM, **whole) == found  # and the environment does not count
    assert place(SLURM, machines=1) == Place()


def test_settings_come_before_the_environment() -> None:
    assert place(SLURM, main_address="ib1:29400") == Place(2, 2, 1, "ib1", 29400)
    assert place(SLURM, machine_rank=0).rank == 0
    assert place({"NODE_RANK": "1"}, machines=2, main_address="node1:29400").rank == 1


def test_torchrun_starts_each_process() -> None:
    found = place(TORCHRUN)
    assert (found.machines, found.launches, found.rank) == (2, 8, 5)
    assert (found.local, found.local_launches) == (1, 4)
    assert (found.host, found.port, found.store) == ("node1", 0, ("node1", 29500))
    assert place(TORCHRUN, main_address="node1:29400").port == 29400
    assert place({**TORCHRUN, **SLURM}) == found  # srun torchrun …
    own = {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "False"}
    assert (place(own).port, place(own).store) == (29500, None)
    assert place(TORCHRUN, machines=2, machine_rank=1, processes=4) == found


def test_variables_of_other_launchers() -> None:
    master = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    assert place({**master, "NNODES": "2", "NODE_RANK": "1"}) == Place(2, 2, 1, "node1", 29500)
    assert place({**master, "NNODES": "2", "GROUP_RANK": "1", "WORLD_SIZE": "16"}).rank == 1
    assert place({**master, "WORLD_SIZE": "2", "RANK": "1"}) == Place(2, 2, 1, "node1", 29500)


def test_slurm_says_it_of_a_step() -> None:
    found = place(SLURM)
    assert (found.machines, found.launches, found.rank, found.host, found.local) == (2, 2, 1, "gpu07", None)
    assert 20_000 <= found.port < 30_000
    assert place({**SLURM, "SLURM_NODEID": "0"}).port == found.port
    assert place({**SLURM, "SLURM_STEP_ID": "3"}).port != found.port
    assert place({**SLURM, "MASTER_ADDR": "ib7", "MASTER_PORT": "29500", "WORLD_SIZE": "16"}).host == "ib7"
    step = {name: value for name, value in SLURM.items() if not name.startswith("SLURM_STEP_N")}
    assert place({**step, "SLURM_NTASKS": "2"}) == Place(2, 2, 1, "gpu01", found.port)  # of an older Slurm


def test_a_batch_script_is_one_machine() -> None:
    """It runs on the first node of its job only."""
    batch = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NNODES": "2",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": "0",
    }
    found = place(batch)
    assert (found.launches, found.rank) == (1, 0)
    assert "start with srun" in found.note
    assert place({**batch, "SLURM_STEP_ID": "4294967291"}).launches == 1
    assert place(batch, machines=1).note == ""


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"), ("node[07-09,12],gpu1", "node07"), ("gpu1,node[07-09]", "gpu1"), ("rack[2-3]n[11,14]", "rack2n11"),
        ("a-b[3].local,c", "a-b3.local"), ("", ""),
    ],
)  # fmt: skip
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("settings", "environment", "told"),
    [
        ({"machines": 2}, {}, r"train.machines = 2, but there is no train.machine_rank .* and no train.main_address"),
        ({"machines": 2, "machine_rank": 0}, {}, r"there is no train.main_address \(host and port of machine 0"),
        ({"machines": 2, "main_address": "a:1"}, {}, r"there is no train.machine_rank \(which .* from 0 to 1\)"),
        ({"machine_rank": 1}, {}, "train.machine_rank = 1, but train.machines is missing"),
        ({"main_address": "a:1"}, {}, "train.main_address is set, but train.machines is missing"),
        ({"machines": 1, "machine_rank": 1}, {}, "train.machine_rank = 1, but train.machines = 1"),
        ({"machines": 2, "machine_rank": 2, "main_address": "a:1"}, {}, "train.machine_rank = 2, but train.machines = 2"),
        ({"machines": 3}, SLURM, "train.machines = 3, but SLURM_STEP_NUM_NODES = 2. Let them agree"),
        ({"machines": 3}, {"NNODES": "2", "NODE_RANK": "0"}, "train.machines = 3, but NNODES = 2"),
        ({}, {**SLURM, "NNODES": "3"}, "NNODES = 3, but SLURM_STEP_NUM_NODES = 2"),
        ({}, {**SLURM, "SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS = 8, .* srun --ntasks-per-node=1"),
        ({}, {"NNODES": "2", "NODE_RANK": "0"}, "NNODES = 2, but there is no MASTER_ADDR and MASTER_PORT"),
        ({}, {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a"}, r"there is no MASTER_PORT \("),
        ({}, {"NNODES": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "there is no NODE_RANK"),
        ({}, {"WORLD_SIZE": "2"}, "WORLD_SIZE = 2, but RANK is missing"),
        ({}, {"NNODES": "1:4", "NODE_RANK": "0"}, "NNODES = 1:4, which is not a number"),
        ({}, {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}, "but not LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"machines": 3}, TORCHRUN, "train.machines = 3, but torchrun says 2"),
        ({"processes": 2}, TORCHRUN, "train.processes = 2, but torchrun says 4"),
        ({"machine_rank": 0}, TORCHRUN, "train.machine_rank = 0, but torchrun says 1"),
    ],
)  # fmt: skip
def test_what_contradicts_or_is_missing_is_refused(
    settings: dict[str, Any], environment: dict[str, str], told: str
) -> None:
    with pytest.raises(SettingsError, match=told):
        place(environment, **settings)


@pytest.mark.parametrize("address", ["node1", "node1:", ":29400", "node1:port", "node1:0", "node1:65536"])
def test_an_address_has_a_host_and_a_port(address: str) -> None:
    with pytest.raises(SettingsError, match=r"train.main_address = .* is not host:port"):
        load_train(None, ["train.model=any", f"train.main_address='{address}'"])


def test_a_dry_run_needs_the_number_of_machines_only() -> None:
    assert find_place(asked(machines=4), {}, planning=True).launches == 4
    with pytest.raises(SettingsError, match="NNODES = 2"):
        find_place(asked(machines=4), {"NNODES": "2"}, planning=True)


def test_processes_do_not_inherit_a_place() -> None:
    assert without_places(
        {**TORCHRUN, "PMI_RANK": "1", "PATH": "/bin", "NCCL_SOCKET_IFNAME": "ib0", "LOCAL_DISK": "/d"}
    ) == {
        "PATH": "/bin",
        "LOCAL_DISK": "/d",
        "NCCL_SOCKET_IFNAME": "ib0",
    }


def test_where_a_training_runs_is_no_part_of_its_weights() -> None:
    placed = asked(machines=2, machine_rank=1, main_address="node1:29400", machine_timeout=5)
    assert placed.of_the_weights() == asked()
