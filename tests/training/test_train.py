"""Whole trainings of a small Qwen3 on the CPU: what changes, what stays, and what is refused."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from conftest import sentences  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_model import save_model, save_tokenizer  # noqa: E402

from corpusprep.cli import main  # noqa: E402
from corpusprep.errors import RunError, SettingsError  # noqa: E402
from corpusprep.store import lock  # noqa: E402
from corpusprep.training import TrainResult, TrainSettings, TrainStage, dry_run, train  # noqa: E402
from corpusprep.training.job import COMPLETE  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that train


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)


def write_mix(folder: Path, rows: int, seed: int = 1) -> Path:
    pairs = sentences(rows + 20, seed)
    for name, part in (("train-0", pairs[:rows]), ("validation/validation-0", pairs[rows:])):
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            for english, german in part:
                turns = [
                    {"role": "user", "content": f"Translate into German: {english}"},
                    {"role": "assistant", "content": german},
                ]
                file.write(json.dumps({"messages": turns}) + "\n")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a mix, a model in fp32 and the same in bf16."""
    folder = tmp_path_factory.mktemp("train")
    write_mix(folder / "mix", 140)
    texts = [text for pair in sentences(200, 9) for text in pair]
    for name in ("model", "half"):
        size = len(save_tokenizer(folder / name, texts, 400))
        model = save_model(folder / name, size)
    model.to(torch.bfloat16).save_pretrained(folder / "half")
    return folder


def settings(place: Path, **more: Any) -> TrainSettings:
    asked: dict[str, Any] = {
        "model": str(place / "model"), "stages": (TrainStage(layers="bottom:2"), TrainStage(layers="top:3")),
        "sequence_length": 256, "batch_tokens": 1024, "learning_rate": 2e-3, "min_learning_rate": 2e-4, "log_steps": 1,
        "checkpoint_steps": 3, "validation_examples": 20,
    }  # fmt: skip
    return TrainSettings(**{**asked, **more})


@pytest.fixture(scope="module")
def trained(place: Path, one_thread: None) -> tuple[Path, TrainResult]:
    """Both stages, uninterrupted."""
    out = place / "run"
    return out, train(settings(place), place / "mix", out)


def curve(folder: Path) -> list[dict[str, str]]:
    with open(folder / "loss.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def changed(before: Path, after: Path) -> set[str]:
    """Tensors of the saved files that differ in any bit."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name].view(torch.uint8), new[name].view(torch.uint8))}


def test_each_stage_changes_its_layers_and_nothing_else(place: Path, trained: tuple[Path, TrainResult]) -> None:
    out, result = trained
    assert result.folders == [out / "stage-1", out / "stage-2"]
    names = set(load_file(place / "model" / "model.safetensors"))
    first = {name for name in names if name.startswith(("model.layers.0.", "model.layers.1."))}
    last = {name for name in names if name.startswith(tuple(f"model.layers.{n}." for n in (5, 6, 7)))}
    assert changed(place / "model", out / "stage-1") == first
    assert changed(out / "stage-1", out / "stage-2") == last


def test_a_stage_says_what_was_checked(trained: tuple[Path, TrainResult]) -> None:
    for folder, report in zip(trained[1].folders, trained[1].reports, strict=True):
        checks = report["checks"]
        assert checks["frozen_tensors_changed"] == checks["trained_tensors_unmoved"] == []
        assert checks["trained_tensors"] == checks["optimizer_state_tensors"] == len(report["fingerprint"]["trained"])
        assert checks["gradients_at_step_1"] == {"trained_with": checks["trained_tensors"], "all_zero": []}
        assert checks["saved_as_trained"] is True
        assert checks["gradient_before_trained_layers"] is False
        assert checks["trained_values"] == report["parameters"]["trained"]
        assert 0.9 * checks["trained_values"] < checks["trained_values_changed"] <= checks["trained_values"]
        assert (
            checks["trained_values_changed_as_saved"] == checks["trained_values_changed"]
        )  # in fp32 nothing is rounded
        assert report["losses"]["after"] < report["losses"]["before"]
        card = (folder / "README.md").read_text()
        assert f"checksum `{report['mix']['checksum']}`" in card
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
        points = curve(folder)
        assert [int(point["step"]) for point in points] == list(range(1, report["steps"] + 1))
        assert float(points[-1]["loss"]) < float(points[0]["loss"])


def test_the_learning_rate_is_the_published_schedule(trained: tuple[Path, TrainResult]) -> None:
    rates = [float(point["learning_rate"]) for point in curve(trained[1].folders[0])]
    assert max(rates) == pytest.approx(2e-3)
    assert rates.index(max(rates)) <= 2  # warm-up of 3 %
    assert rates[-1] == pytest.approx(2e-4, rel=0.2)


def test_the_result_opens_with_transformers(trained: tuple[Path, TrainResult]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder = trained[1].folders[1]
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    GenerationConfig.from_pretrained(folder)
    assert tokenizer.chat_template
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Translate into German: the house"}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    assert model.config.use_cache is True


def test_stage_2_begins_with_the_loss_that_stage_1_ended_with(trained: tuple[Path, TrainResult]) -> None:
    first, second = (report["losses"] for report in trained[1].reports)
    assert second["before"] == pytest.approx(first["after"], abs=1e-6)


@contextlib.contextmanager
def begun(asked: TrainSettings, mix: Path, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A stage 1 in a process of its own, in which a checkpoint is whole; the caller ends it."""
    recipe = out.with_name(f"{out.name}.json")
    recipe.write_text(asked.model_dump_json())
    script = (
        "import sys; from pathlib import Path; from corpusprep.training import TrainSettings, train;"
        "train(TrainSettings.model_validate_json(Path(sys.argv[1]).read_text()), sys.argv[2], sys.argv[3], stage=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(recipe), str(mix), str(out)], start_new_session=True)
    deadline = time.monotonic() + 240
    try:
        while not list(out.glob(f".work/stage-1/checkpoints/*/{COMPLETE}")):
            assert process.poll() is None, "it ended before it could be interrupted"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()


def processes_of(out: Path) -> list[int]:
    """Those whose command line names a folder."""
    shown = subprocess.run(["ps", "-wweo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in shown.splitlines() if str(out) in line]


def kill_after_a_checkpoint(asked: TrainSettings, mix: Path, out: Path) -> None:
    """Begins stage 1, and kills launcher and workers once a checkpoint is whole."""
    with begun(asked, mix, out):
        for process in processes_of(out):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    assert not (out / "stage-1").exists()


@pytest.fixture(scope="module")
def killed(place: Path, trained: Any) -> Path:
    """A stage 1 that was killed after its first checkpoint."""
    kill_after_a_checkpoint(settings(place), place / "mix", place / "killed")
    return place / "killed"


def test_what_was_begun_is_not_begun_again_unasked(place: Path, killed: Path, trained: Any) -> None:
    with pytest.raises(RunError, match=r"already has an interrupted stage 1\. Continue with --resume"):
        train(settings(place), place / "mix", killed)
    with pytest.raises(RunError, match="already has stage-1"):
        train(settings(place), place / "mix", trained[0])


def test_another_set_of_the_same_size_is_not_gone_on_with(place: Path, killed: Path) -> None:
    """The libraries match optimizer state by number, and would take that of another layer."""
    other = settings(place, stages=(TrainStage(layers="top:2"), TrainStage(layers="top:3")))
    with pytest.raises(
        RunError, match=r"the set of trained tensors has changed \(model.layers.6.*is new, model.layers.0"
    ):
        train(other, place / "mix", killed, stage=1, resume=True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 2}, r"the seed has changed \(from 1 to 2\)"),
        ({"learning_rate": 1e-3}, r"train.learning_rate has changed"),
        ({"batch_tokens": 2048}, r"train.batch_tokens has changed"),
    ],
)
def test_other_settings_are_not_gone_on_with(place: Path, killed: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(RunError, match=told):
        train(settings(place, **change), place / "mix", killed, stage=1, resume=True)


def test_another_mix_is_not_gone_on_with(place: Path, killed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(killed, copy)  # the tokens of the other mix take the place of these
    with pytest.raises(RunError, match="the mix has changed"):
        train(settings(place), write_mix(tmp_path / "other", 140, seed=2), copy, stage=1, resume=True)


def test_a_killed_stage_goes_on_bit_by_bit(place: Path, killed: Path, trained: tuple[Path, TrainResult]) -> None:
    half_written = killed / ".work" / "stage-1" / "checkpoints" / "checkpoint-999"
    half_written.mkdir()  # as a kill within a save leaves it
    result = train(settings(place), place / "mix", killed, stage=1, resume=True)
    assert changed(trained[0] / "stage-1", killed / "stage-1") == set()
    told = [curve(folder) for folder in (trained[0] / "stage-1", result.folders[0])]
    assert told[0] == told[1]
    assert result.reports[0]["losses"]["after"] == trained[1].reports[0]["losses"]["after"]
    assert not (killed / ".work" / "stage-1").exists()


def test_a_mixture_of_experts_goes_on_bit_by_bit(place: Path, tmp_path: Path) -> None:
    """Its experts have other names in a file than in the model, and its router a buffer that no gradient changes."""
    from transformers import AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM

    folder = tmp_path / "experts"
    shutil.copytree(place / "model", folder)
    torch.manual_seed(1)
    config = Glm4MoeConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
        first_k_dense_replace=1, n_shared_experts=1, max_position_embeddings=512,
    )  # fmt: skip
    model = Glm4MoeForCausalLM(config)
    for layer in list(model.model.layers)[1:]:
        layer.mlp.gate.e_score_correction_bias.uniform_(0.1, 0.4)
    model.save_pretrained(folder)
    asked = settings(
        place, model=str(folder), stages=(TrainStage(layers="top:2"),), max_steps=8, checkpoint_steps=2,
        validation_examples=0,
    )  # fmt: skip
    train(asked, place / "mix", tmp_path / "whole")
    kill_after_a_checkpoint(asked, place / "mix", tmp_path / "killed")
    report = train(asked, place / "mix", tmp_path / "killed", resume=True).reports[0]
    assert report["steps"] == 8
    assert changed(tmp_path / "whole" / "stage-1", tmp_path / "killed" / "stage-1") == set()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "killed" / "stage-1")
    for old, new in list(zip(model.model.layers, after.model.layers, strict=True))[1:]:
        assert torch.equal(old.mlp.gate.e_score_correction_bias, new.mlp.gate.e_score_correction_bias)


def test_attention_of_its_own_does_what_the_usual_one_does(place: Path) -> None:
    """And says so where it does not: a leak between examples, or a term that it does not have."""
    from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

    from corpusprep.training import attention
    from corpusprep.training.worker import check_packing

    attention.register()
    model = AutoModelForCausalLM.from_pretrained(place / "model", attn_implementation=attention.VARLEN)
    check_packing(model.train(), usual="sdpa")
    assert model.config._attn_implementation == attention.VARLEN
    assert model.model.layers[0].self_attn.q_proj.weight.grad.any()
    torch.manual_seed(1)
    capped = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, layer_types=["full_attention"] * 2, attn_logit_softcapping=0.1,
        )
    )  # fmt: skip
    capped.set_attn_implementation(attention.VARLEN)
    with pytest.raises(RunError, match=r'train\.attention = "varlen" does not support softcap'):
        check_packing(capped)


def test_a_stage_of_another_model_is_not_gone_on_with(
    place: Path, trained: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="the starting model has changed"):
        train(settings(place, model=str(place / "half")), place / "mix", trained[0], resume=True)
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    told = json.loads((out / "stage-1" / "tensors.json").read_text())
    told["model.norm.weight"] = "0"
    (out / "stage-1" / "tensors.json").write_text(json.dumps(told))
    with pytest.raises(RunError, match=r"stage-2: was trained with other settings: the starting model has changed"):
        train(settings(place), place / "mix", out, resume=True)


def test_stage_2_starts_from_exactly_what_stage_1_left(
    place: Path, trained: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    shutil.rmtree(out / "stage-2")
    file = out / "stage-1" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.4.mlp.up_proj.weight"][0, 0] += 1e-7
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        RunError, match=r"1 tensors have changed since that stage was trained, such as model\.layers\.4\.mlp"
    ):
        train(settings(place), place / "mix", out, stage=2)
    assert not (out / "stage-2").exists()


def test_stages_that_are_done_are_not_trained_again(place: Path, trained: tuple[Path, TrainResult]) -> None:
    before = (trained[0] / "stage-1" / "model.safetensors").stat().st_mtime_ns
    result = train(settings(place), place / "mix", trained[0], resume=True)
    assert result.commands == []
    assert (trained[0] / "stage-1" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(RunError, match="was trained with other settings: the seed"):
        train(settings(place), place / "mix", trained[0], seed=5, resume=True)
    with pytest.raises(SettingsError, match="has stages 1 to 2"):
        train(settings(place), place / "mix", trained[0], stage=3)


def test_a_stage_needs_the_one_before(place: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="stage-1: is missing, and stage 2 starts from it"):
        train(settings(place), place / "mix", tmp_path / "new", stage=2)


def test_in_bf16_trained_weights_are_fp32_and_frozen_ones_bits(place: Path, tmp_path: Path) -> None:
    asked = settings(
        place, model=str(place / "half"), precision="bf16", stages=(TrainStage(layers="top:2"),), max_steps=4,
        learning_rate=1e-5, min_learning_rate=1e-6, warmup=0.0,
    )  # fmt: skip
    report = train(asked, place / "mix", tmp_path / "run").reports[0]
    checks = report["checks"]
    assert checks["frozen_tensors_changed"] == checks["trained_tensors_unmoved"] == []
    # Steps of 1e-5 move fp32 masters, of which bf16 keeps few: that is why they are masters, and it is told.
    assert checks["trained_values_changed"] > 0.9 * checks["trained_values"]
    assert 0 < checks["trained_values_changed_as_saved"] < 0.5 * checks["trained_values"]
    saved = load_file(tmp_path / "run" / "stage-1" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


def test_a_model_in_bf16_is_trained_in_fp32(place: Path, tmp_path: Path) -> None:
    """As on a CPU by default. Frozen layers before and behind the trained ones are computed in fp32, and saved as they were."""
    asked = settings(place, model=str(place / "half"), precision="fp32", max_steps=2)
    result = train(asked, place / "mix", tmp_path / "run")
    before = place / "half"
    for folder, report, layers in zip(result.folders, result.reports, [(0, 1), (5, 6, 7)], strict=True):
        assert report["checks"]["frozen_tensors_changed"] == report["checks"]["trained_tensors_unmoved"] == []
        moved = changed(before, folder)
        assert all(name.startswith(tuple(f"model.layers.{n}." for n in layers)) for name in moved)
        assert len(moved) > 5 * len(layers)  # a norm may be the same after rounding
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
        before = folder


def test_two_processes_with_shards_train_as_one(place: Path, trained: tuple[Path, TrainResult], tmp_path: Path) -> None:
    asked = settings(place, processes=2, parallelism="fsdp", max_steps=2)
    result = train(asked, place / "mix", tmp_path / "run", stage=1)
    # The rates differ from the second step on, as there are fewer in all.
    one, two = curve(trained[1].folders[0])[:2], curve(result.folders[0])[:2]
    for name in ("loss", "grad_norm", "num_input_tokens_seen"):
        assert [float(p[name]) for p in two] == pytest.approx([float(p[name]) for p in one], rel=1e-4), name
    assert changed(place / "model", result.folders[0]) == set(result.reports[0]["fingerprint"]["trained"])


def test_attention_of_its_own_trains_as_the_usual_one(
    place: Path, trained: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    result = train(settings(place, attention="varlen", max_steps=2), place / "mix", tmp_path / "run", stage=1)
    assert result.reports[0]["attention"] == "varlen"
    assert trained[1].reports[0]["attention"] == "sdpa"
    one, two = curve(trained[1].folders[0])[:2], curve(result.folders[0])[:2]
    for name in ("loss", "grad_norm", "num_input_tokens_seen"):
        assert [float(p[name]) for p in two] == pytest.approx([float(p[name]) for p in one], rel=1e-4), name


def test_two_processes_without_packing(place: Path, tmp_path: Path) -> None:
    asked = settings(place, processes=2, parallelism="ddp", packing=False, max_steps=99, epochs=0.2)
    result = train(asked, place / "mix", tmp_path / "run", stage=1)
    report = result.reports[0]
    assert 1 < report["steps"] < 10  # a limit makes no stage longer than its epochs
    assert report["batches"]["processes"] == 2
    assert report["batches"]["sequences"] == report["mix"]["examples"] == 140
    mean = report["mix"]["tokens"] / 140
    assert report["tokens_seen"] / report["steps"] == pytest.approx(asked.batch_tokens, rel=0.2)
    assert report["batches"]["micro_batch"] * report["batches"]["accumulation"] * 2 * mean == pytest.approx(
        1024, rel=0.2
    )
    assert changed(place / "model", result.folders[0]) == set(report["fingerprint"]["trained"])


def test_an_interrupted_training_leaves_no_process(place: Path, tmp_path: Path) -> None:
    """As with Ctrl-C: what was started ends, and the lock is free."""
    out = tmp_path / "run"
    with begun(settings(place, epochs=50), place / "mix", out) as process:
        process.send_signal(signal.SIGINT)
        process.wait(60)
        deadline = time.monotonic() + 60
        while processes_of(out):
            assert time.monotonic() < deadline, "a process goes on"
            time.sleep(0.1)
    with lock(out):
        assert not (out / "stage-1").exists()


def test_a_loss_that_is_no_number_ends_the_stage(place: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(place / "model", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    asked = settings(place, model=str(broken), validation_examples=0)
    with pytest.raises(RunError, match=r"NaN or infinite before training: its weights are damaged"):
        train(asked, place / "mix", tmp_path / "run", stage=1)
    asked = asked.model_copy(update={"packing": False})
    with pytest.raises(RunError, match=r"The loss is nan at step 1\. Lower train\.learning_rate"):
        train(asked, place / "mix", tmp_path / "run", stage=1)


def test_the_dry_run_counts_what_a_stage_trains(place: Path) -> None:
    text = dry_run(settings(place), place / "mix")
    sizes = {name: tensor.numel() for name, tensor in load_file(place / "model" / "model.safetensors").items()}
    for layers, shown in (((0, 1), "0-1 of 8"), ((5, 6, 7), "5-7 of 8")):
        trained = sum(sizes[n] for n in sizes if n.startswith(tuple(f"model.layers.{k}." for k in layers)))
        row = next(line for line in text.splitlines() if shown in line)
        assert f"  {trained:,} " in row
        assert f"  {sum(sizes.values()) - trained:,} " in row
        assert "?" not in row
    assert "140 examples" in text


@pytest.mark.parametrize("layers", ["bottom:2", "top:3", "2-4", "all"])
def test_the_estimate_of_activations_is_what_is_kept(place: Path, layers: str) -> None:
    from transformers import AutoModelForCausalLM

    from corpusprep.training.layers import freeze, select
    from corpusprep.training.plan import activations, open_config

    model = AutoModelForCausalLM.from_pretrained(place / "model")
    chosen = select(model, layers, ())
    freeze(model, chosen)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor: Any) -> Any:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    asked = settings(place, gradient_checkpointing=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        half = torch.arange(asked.sequence_length // 2)  # two examples in a sequence: attention has a mask
        ids = torch.zeros((1, asked.sequence_length), dtype=torch.long)
        out = model.model(input_ids=ids, position_ids=torch.cat([half, half])[None], use_cache=False)
    config = open_config(asked.model)
    head = 2 * 4 * asked.sequence_length * config.vocab_size
    estimate = activations(asked, config, chosen, "fp32")
    assert estimate is not None
    assert out.last_hidden_state.requires_grad
    assert estimate - head == pytest.approx(sum(kept.values()), rel=0.05)
    with_checkpoints = activations(settings(place), config, chosen, "fp32")
    assert with_checkpoints is not None
    assert with_checkpoints < estimate


def test_the_command_line_answers_in_messages(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["train", "--mix", str(place / "mix"), *arguments])
        assert ended.value.code == 2
        return capsys.readouterr().err

    model = f"--set=train.model={place / 'model'}"
    assert "has no table [train]" in told("--dry-run")
    assert "cannot be opened as a model" in told("--dry-run", f"--set=train.model={tmp_path}")
    assert "takes at most 2048 tokens" in told("--dry-run", model, "--set=train.stages=[{layers='top:1'}]")
    assert "has only 8 layers" in told("--dry-run", model, "--set=train.sequence_length=256")
    assert "Missing option '--out'" in told(model)
    assert "reads only train.… and seed" in told(model, "--set=dedup.max_distance=2")
    assert "the cosine would rise" in told(model, "--dry-run", "--set=train.learning_rate=1e-6")


@pytest.mark.parametrize("attention", ["varlen", "sdpa", "eager"])
def test_packed_examples_do_not_attend_to_one_another(place: Path, attention: str) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl.data_utils import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from corpusprep.training.attention import register

    register()
    model = AutoModelForCausalLM.from_pretrained(place / "model", attn_implementation=attention).eval()
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 300, (size,), generator=draw).tolist() for size in (50, 30, 40)]
    packed = pack_dataset(Dataset.from_dict({"input_ids": rows, "labels": rows}), 128, "bfd")
    assert len(packed) == 1
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([packed[0]])
    with torch.no_grad():
        together = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[0]
        at = 0
        for size in packed[0]["seq_lengths"]:
            ids = batch["input_ids"][:, at : at + size]
            alone = model(input_ids=ids, use_cache=False).logits[0]
            torch.testing.assert_close(together[at : at + size], alone, atol=2e-5, rtol=2e-5)
            at += size


def test_checkpointing_behind_a_frozen_prefix_gives_the_same_gradients(place: Path) -> None:
    """Reentrant checkpointing gives none there, and to make the embeddings' output need one brings the activations back."""
    from transformers import AutoModelForCausalLM

    from corpusprep.training.layers import drop_input_gradients, freeze, select

    found = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(place / "model")
        freeze(model, select(model, "top:2", ()))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            drop_input_gradients(model)
        ids = torch.arange(3, 60)[None]
        asked = []
        model.model.layers[6].register_forward_pre_hook(
            lambda _, args, asked=asked: asked.append(args[0].requires_grad)
        )
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        assert asked[0] is False  # nothing is kept of what lies before the trained layers
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 22
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name])
