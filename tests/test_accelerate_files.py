"""The files for `accelerate launch --config_file`: Accelerate reads them, and tells the processes what is meant."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch import distributed

import configs.schema
from pipelines.devices import leave_process_group, make_accelerator

FILES = Path(configs.schema.__file__).parent / "accelerate"
KINDS = {
    "multi_gpu": DistributedType.MULTI_GPU,
    "multi_node": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero1": DistributedType.DEEPSPEED,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
}
ENTRIES = {
    "multi_gpu": {},
    "multi_node": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
        "FSDP_OFFLOAD_PARAMS": "false",
    },
    "deepspeed_zero1": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "deepspeed_zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
}
LEFT_TO_THE_RUN = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_GRADIENT_CLIPPING",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    "FSDP_TRANSFORMER_CLS_TO_WRAP",
}
NUM_PROCESSES = {"multi_node": 16}


def test_every_file_is_tested():
    assert {file.stem for file in FILES.glob("*")} == KINDS.keys() == ENTRIES.keys()


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_a_file(name):
    config = load_config_from_file(str(FILES / f"{name}.yaml"))
    assert config.distributed_type is KINDS[name]
    assert config.num_processes == NUM_PROCESSES.get(name, 8)
    assert config.num_machines == config.num_processes // 8
    assert config.mixed_precision is None


@pytest.mark.parametrize("name", KINDS)
def test_a_file_gives_the_processes_its_environment_and_leaves_the_run_its_own_keys(name, monkeypatch):
    for key in [key for key in os.environ if key.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(key)
    # As the second machine, where there are two: the first one looks whether the port is free.
    rank = ["--machine_rank", "1"] if name == "multi_node" else []
    arguments = ["--config_file", str(FILES / f"{name}.yaml"), *rank, "scripts/train_prior.py"]
    args, config, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    args.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
    environment = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    assert environment.items() >= ENTRIES[name].items()
    assert not LEFT_TO_THE_RUN & environment.keys()
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert int(args.nproc_per_node) == 8
    if name == "multi_node":
        assert (args.nnodes, args.node_rank, args.rdzv_endpoint) == ("2", 1, "10.0.0.1:29500")


def test_the_precision_of_a_run_wins_over_that_of_a_launcher(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert make_accelerator("bf16").mixed_precision == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert make_accelerator("no").mixed_precision == "no"
    assert isinstance(make_accelerator("auto"), Accelerator)


def test_the_process_group_is_left_where_there_is_one():
    leave_process_group()  # nothing to leave
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    leave_process_group()
    assert not distributed.is_initialized()
