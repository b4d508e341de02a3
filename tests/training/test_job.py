"""What the launcher and its workers say to each other, and how they tell what a stage changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
pytest.importorskip("accelerate")

from corpusprep.errors import RunError  # noqa: E402
from corpusprep.training.job import COMPLETE, Job, difference, made_of, received  # noqa: E402
from corpusprep.training.layers import Selection  # noqa: E402
from corpusprep.training.tensors import compare, digests  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that train


def test_a_mark_that_is_empty_is_none(tmp_path: Path) -> None:
    assert made_of(tmp_path) is None
    (tmp_path / COMPLETE).write_text("")
    assert made_of(tmp_path) is None
    (tmp_path / COMPLETE).write_text('{"seed": 1}')
    assert made_of(tmp_path) == {"seed": 1}


def test_what_others_say_is_for_the_log() -> None:
    assert received("Loading weights\n") is None
    assert received('\x1e{"kind": "step"}\n') == {"kind": "step"}
    assert received('\x1e{"kind": "step"}warning: x\n') is None


def test_difference_names_what_is_another() -> None:
    assert difference({"seed": 1, "mix": "a"}, {"seed": 1, "mix": "a", "new": 1}) is None
    assert "the mix has changed (from a to b)" in str(difference({"mix": "a"}, {"mix": "b"}))


def test_a_launch_under_torchrun_has_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is one of those that CUDA_VISIBLE_DEVICES names."""
    from corpusprep.training.machines import Place
    from corpusprep.training.processes import prepare

    known = {"work": str(tmp_path), "processes": 8, "launches": 8, "launch": 5, "precision": "bf16", "cpu": False}
    job = Job(**{field.name: known.get(field.name) for field in fields(Job)})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    command = prepare(job, Place(2, 8, 5, "node1", 0, local=1, local_launches=4), "ddp", 29401, gpus=4)
    assert command[-1] == str(tmp_path / "job-5.json")
    assert Job.read(command[-1]) == job
    config = json.loads((tmp_path / "accelerate-5.json").read_text())
    assert config["gpu_ids"] == "5"
    told = [config[name] for name in ("num_machines", "machine_rank", "num_processes")]
    assert told == [8, 5, 8]
    assert (config["main_process_ip"], config["main_process_port"]) == ("node1", 29401)


def test_an_interruption_is_heard_while_processes_are_silent(tmp_path: Path) -> None:
    """Also where a library has the system resume reads, as siginterrupt does here."""
    script = tmp_path / "script.py"
    script.write_text(
        "import signal, sys\n"
        "from types import SimpleNamespace as Job\n"
        "from corpusprep.report.progress import Progress\n"
        "from corpusprep.training.processes import run_stage\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.siginterrupt(signal.SIGINT, False)\n"
        "silent = [sys.executable, '-c', 'import time; print(1); time.sleep(100)', sys.argv[1]]\n"
        "run_stage(silent, Job(number=1), sys.argv[1], None, Progress(), None)\n"
    )
    log = tmp_path / "log"
    process = subprocess.Popen([sys.executable, str(script), str(log)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not log.exists() or "1\n" not in log.read_text().partition("\n")[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=20)[1]
    shown = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(log) not in shown


def test_a_launcher_that_nobody_waits_for_has_ended() -> None:
    from corpusprep.training.worker import _has_ended

    assert not _has_ended(os.getpid())
    process = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 30
    while not _has_ended(process.pid):  # it is not reaped yet
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.wait()
    assert _has_ended(process.pid)


def test_changes_are_counted_by_bits() -> None:
    """A frozen tensor that lost the sign of a zero was touched, and a step that bf16 rounds away did not survive."""
    before = {"a": torch.ones(4, dtype=torch.bfloat16), "b": torch.ones(2), "c": torch.zeros(3)}
    chosen = Selection((0,), 1, "layers", ("a", "b"), ("c",))
    after = {
        "a": torch.tensor([1.0, 1.0001, 1.5, 1.0]), "b": torch.ones(2), "c": torch.tensor([0.0, -0.0, 0.0]),
    }  # fmt: skip
    found = compare(after, before, digests({"c": before["c"]}.items()), chosen)
    assert found.touched == ("c",)
    assert found.unmoved == ("b",)
    assert found.not_finite == ()
    after["b"][0] = float("nan")
    assert compare(after, before, {}, chosen).not_finite == ("b",)
    assert (found.values, found.changed, found.survived) == (6, 2, 1)


def test_examples_that_do_not_stay_apart_are_refused_packed() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    from corpusprep.training.worker import check_packing

    torch.manual_seed(1)
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=100,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=32,
        )
    ).eval()
    with pytest.raises(RunError, match=r"OPTForCausalLM does not separate examples .* Set train\.packing = false"):
        check_packing(opt)
