"""Several processes: one run in them decides as in one process, is written once, and is refused where it must be."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import run_values
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loraprune import processes
from loraprune.cli import USER_ERROR
from loraprune.cli import main as command_line
from loraprune.errors import UserError
from loraprune.launch import Launch, here, hidden_launch, refuse_other_launches
from loraprune.pipeline import run
from loraprune.processes import dealt, rows_each
from loraprune.settings import Settings
from loraprune.settings_file import settings_from
from loraprune.training_arguments import training_arguments

SCRIPT = Path(__file__).with_name("in_processes.py")
WAYS = {"ddp": ["--multi_gpu"], "fsdp2": ["--use_fsdp", "--fsdp_version", "2"]}
STEADY = {
    "lora_dropout": 0.0,
    "min_retain_performance": 0.6,
}  # dropout draws by process; the floor is never within 1e-6
COMPRESS = {"forget": None, "retain": None, "min_retain_performance": 0.0, "sparsity": 0.2, "score_from": "training"}
NOT_OF_COMPRESSION = ("forget_batch_size", "forget_target", "band", "minimum_forget_sensitivity", "forget_retain_ratio")
CASES = {
    "lora": {},
    "gate": {"metric": "gate", "micro_batch_size": 1},
    "grad": {"metric": "grad", "recovery_steps": 0},
    "activation": {"metric": "activation"},
    "looking ahead": {"forget_batch_size": 4, "min_retain_performance": 0.0, "micro_batch_size": 1},
    "not looking ahead": {"relearning_radius": 0.0},
    "rescaled heads": {"attention_unit": "q_head", "rescale_survivors": True},
    "few rows": {"gradient_checkpointing": True, "forget_batch_size": 1, "retain_batch_size": 1},
    "lora in training": COMPRESS,
    "gate in training": {**COMPRESS, "metric": "gate", "score_norm": "module", "micro_batch_size": 1},
    "grad in training": {**COMPRESS, "metric": "grad"},
}
EIGHT_BITS = {"eight bits": {"base_bits": 8}} if find_spec("bitsandbytes") else {}
NEAR = {"eight bits": 1e-2}  # one activation that is rounded the other way is off by 1/127
CASES_OF = {
    "ddp": [*CASES, *EIGHT_BITS],
    "fsdp2": ["lora", "few rows", "gate", "looking ahead", "not looking ahead", "grad in training"],
}


def values_of(folder, case, way):
    """The settings of one case, where it is written in one way."""
    changes = {**STEADY, **(CASES | EIGHT_BITS)[case]}
    values = {**run_values(folder, f"{case}/{way}"), **changes}
    if "score_from" in changes:
        values = {name: one for name, one in values.items() if name not in NOT_OF_COMPRESSION}
        values["data"] = str(folder / "retain.jsonl")
    return {name: one for name, one in values.items() if one is not None}


def launched(way, program, *arguments, **environment):
    """What a program ended as in two processes on this machine's CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", *WAYS[way], *program]
    alone = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [*command, *arguments], env=os.environ | alone | environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def runs(run_folder):
    """The folder of every case's run, in one process, by DDP and by FSDP2."""
    for case in CASES | EIGHT_BITS:
        run(settings_from(values_of(run_folder, case, "one")))
    for way, cases in CASES_OF.items():
        done = launched(way, [str(SCRIPT)], json.dumps([values_of(run_folder, case, way) for case in cases]))
        assert done.returncode == 0, done.stderr[-5000:]
    return run_folder


def read(folder, name="decision.json"):
    return json.loads((folder / name).read_text(encoding="utf-8"))


EVERY = [(way, case) for way, cases in CASES_OF.items() for case in cases]


@pytest.mark.parametrize(("way", "case"), EVERY)
def test_two_processes_decide_as_one_does(runs, way, case):
    one, two = read(runs / case / "one"), read(runs / case / way)
    scores = {name: (one["removals"].pop(name), two["removals"].pop(name)) for name in ("share", "forget", "retain")}
    assert one["removals"]["index"]
    assert two == one
    for alone, shared in scores.values():
        assert [number is None for number in alone] == [number is None for number in shared]
        numbers = [(a, b) for a, b in zip(alone, shared, strict=True) if a is not None]
        assert all(b == pytest.approx(a, rel=NEAR.get(case, 1e-3), abs=1e-6) for a, b in numbers)


@pytest.mark.parametrize(("way", "case"), EVERY)
def test_the_written_model_is_the_same_but_for_rounding_and_loads_in_its_stock_class(runs, way, case):
    one, two = (load_file(runs / case / name / "model" / "model.safetensors") for name in ("one", way))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=2e-4)
    model = AutoModelForCausalLM.from_pretrained(runs / case / way / "model")
    assert (
        sum(weight.numel() for weight in model.parameters())
        == read(runs / case / way, "metrics.json")["model"]["parameters"]["after"]
    )


@pytest.mark.parametrize(("way", "case"), EVERY)
def test_every_file_and_every_event_is_written_once(runs, way, case):
    one, two = runs / case / "one", runs / case / way
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    kinds = [
        [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()]
        for folder in (one, two)
    ]
    if way == "fsdp2" or "base_bits" in (CASES | EIGHT_BITS)[case]:  # the end may be chosen elsewhere
        kinds = [[kind for kind in some if kind != "roll_back"] for some in kinds]
    assert kinds[0] == kinds[1]
    assert read(two, "reproduce.json")["processes"] == {"count": 2, "sharded": way == "fsdp2"}


def test_a_launch_that_lost_a_process_ends_and_goes_on_from_its_saved_step(runs):
    folder = runs / "killed"
    killed = launched(
        "ddp", [str(SCRIPT)], json.dumps([{**values_of(runs, "lora", "one"), "output": str(folder)}]), "kill"
    )
    assert killed.returncode != 0
    assert not (folder / "metrics.json").exists()
    done = launched("ddp", ["-m", "loraprune", "unlearn"], "--config", str(folder / "config.toml"))
    ended = read(folder, "metrics.json")
    assert done.returncode == (0 if ended["goal_met"] else 1), done.stderr  # the launcher's word for any other code
    begun = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [one["step"] > 0 for one in begun if one["event"] == "begin"] == [False, True]
    assert read(folder) == read(runs / "lora" / "ddp")


def test_a_mistake_of_the_user_is_told_once(runs):
    values = values_of(runs, "lora", "one")
    given = [values["model"], "--forget", values["forget"], "--output", str(runs / "none")]
    done = launched("ddp", ["-m", "loraprune", "unlearn"], *given, "--retain", str(runs / "nowhere.jsonl"))
    assert done.stderr.count("error  ") == done.stderr.count("nowhere.jsonl") == 1
    assert not (runs / "none").exists()


# --- refusals ---


@pytest.mark.parametrize(
    ("environment", "settings", "told"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "parallelism config"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "version 1 of FSDP"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, {}, "offloaded"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {"base_bits": 4}, "base_bits is 4"),
        ({"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "1"}, {}, "checkpointing"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "mixed precision bf16"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "dynamo_backend INDUCTOR"),
        ({"ACCELERATE_USE_CPU": "true"}, {}, "for the CPU"),
    ],
)
def test_a_launch_that_a_run_cannot_have_is_refused(environment, settings, told, monkeypatch):
    refuse_other_launches(Settings(**settings))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told):
        refuse_other_launches(Settings(**settings))


def test_deepspeed_is_refused_on_the_command_line_before_anything_is_written(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    given = [f"--{name}={run_folder / name}.jsonl" for name in ("forget", "retain")]
    output = tmp_path / "run"
    assert command_line(["unlearn", str(run_folder / "checkpoint"), *given, f"--output={output}"]) == USER_ERROR
    assert "DeepSpeed" in capsys.readouterr().err
    assert not output.exists()


@pytest.fixture
def launched_in_two(monkeypatch):
    """This process as one of two."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    here.cache_clear()
    yield
    here.cache_clear()


@pytest.mark.parametrize("command", ["evaluate", "attack", "status", "plan", "demo"])
def test_other_commands_are_not_for_several_processes(command, launched_in_two, capsys):
    sets = ["m", "--forget=a", "--retain=b"]
    given = {"evaluate": sets, "plan": sets, "demo": []}.get(command, ["runs/x"])
    assert command_line([command, *given]) == USER_ERROR
    assert f"loraprune {command} was launched in 2 processes" in capsys.readouterr().err


def test_trainer_stays_on_the_gpu_of_its_process(launched_in_two, monkeypatch, tmp_path):
    monkeypatch.setenv("LOCAL_RANK", "1")
    here.cache_clear()
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr("accelerate.state.check_cuda_p2p_ib_support", lambda: True)
    with hidden_launch():
        arguments = training_arguments(Settings(), tmp_path, 5)
    assert (arguments.device, arguments.n_gpu, chosen) == (torch.device("cuda", 1), 1, [])
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_launch_of_one_process_is_no_sharded_one(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    here.cache_clear()
    assert here() == Launch()
    here.cache_clear()


# --- shares ---


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("items", [1, 2, 3, 7, 8])
def test_every_item_is_dealt_once_and_every_process_gets_as_many(count, items, monkeypatch):
    hands = []
    for rank in range(count):
        monkeypatch.setattr(processes, "here", lambda rank=rank: Launch(rank, count))
        hands.append(dealt(range(items)))
    assert len({len(hand) for hand in hands}) == 1
    assert sorted(item for hand in hands for item, weight in hand if weight) == list(range(items))
    assert [item for turn in zip(*hands, strict=True) for item, weight in turn if weight] == list(range(items))


@pytest.mark.parametrize(("count", "rows", "most", "expected"), [(1, 8, None, 8), (2, 7, None, 4), (8, 3, 2, 1)])
def test_a_pass_has_a_share_of_the_rows(count, rows, most, expected, monkeypatch):
    monkeypatch.setattr(processes, "here", lambda: Launch(0, count))
    assert rows_each(rows, most) == expected
