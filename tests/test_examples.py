"""The ready examples for schedulers: their fields, and that the commands in them are commands of ours."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import config_from_args, get_args_parser

from partialfc.checkpoint.read import steps_in
from partialfc.cli import main

ROOT = Path(__file__).parents[1]
SBATCH = ROOT / "examples" / "slurm" / "train.sbatch"
JOB = yaml.safe_load((ROOT / "examples" / "kubernetes" / "pytorchjob.yaml").read_text(encoding="utf-8"))
FIXTURE = ROOT / "tests" / "fixtures" / "insightface"

SRUN_RECORDS = """printf '%s\\n' "$@" > "$FAKE/srun" """
SRUN_RUNS = """shift
for node in 1 2; do "$@" & pids+=($!); done
echo "${pids[@]}" > "$FAKE/pids"
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status"""
OTHERS = {
    "scontrol": """case $1 in show) printf 'localhost\\nlocalhost\\n';; requeue) echo "$2" > "$FAKE/requeued";; esac""",
    "scancel": """[[ $1 == --signal=TERM ]] && kill -TERM $(cat "$FAKE/pids")""",
    "torchrun": f"""exec {sys.executable} -m torch.distributed.run "$@" """,
}


def start_sbatch(folder: Path, srun: str, *options: str) -> subprocess.Popen[str]:
    """Run the script as Slurm would, with Slurm's commands replaced; "nodes" are processes of this machine."""
    tools = folder / "tools"
    tools.mkdir()
    for name, script in {"srun": srun, **OTHERS}.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tools / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": str(random.randrange(10**6)), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "localhost"}
    environment = {**os.environ, **slurm, "PATH": f"{tools}:{os.environ['PATH']}", "FAKE": str(folder)}
    return subprocess.Popen(
        ["bash", str(SBATCH), *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def is_ours(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The configuration that the command stands for."""
    start = words.index("partialfc")
    assert words[start + 1] == "train"
    assert "--resume" in words
    assert main([*words[start + 1 :], "--print-config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_the_slurm_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = start_sbatch(tmp_path, SRUN_RECORDS)
    assert process.communicate(timeout=60) == ("", None)
    assert process.returncode == 0
    words = (tmp_path / "srun").read_text().splitlines()
    assert is_ours(words, capsys)["data"]["path"] == "/data/webface12m"
    launch = config_from_args(get_args_parser().parse_args(words[words.index("torchrun") + 1 :]))[0]
    assert (launch.min_nodes, launch.max_nodes, launch.nproc_per_node, launch.max_restarts) == (2, 2, 1, 3)
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_slurm_ends_the_job_and_it_is_queued_again(tmp_path: Path) -> None:
    """USR1 to the script: both nodes' processes save and end, and the job goes back into the queue."""
    run = tmp_path / "run"
    options = {"data.path": FIXTURE, "data.workers": 0, "data.global_batch_size": 8, "backbone.name": "mini"}
    options |= {"backbone.embedding_dim": 16, "schedule.epochs": 10_000, "output.log_every": 1, "device": "cpu"}
    words = [f"--{name}={value}" for name, value in options.items()]
    process = start_sbatch(tmp_path, SRUN_RUNS, *words, "--out", str(run))
    metrics = run / "metrics.jsonl"
    try:
        until = time.monotonic() + 200
        while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") > 2):
            assert time.monotonic() < until
            time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=100)
    finally:
        process.kill()
        if (tmp_path / "pids").exists() and process.returncode is None:
            subprocess.run(["kill", "-TERM", *(tmp_path / "pids").read_text().split()], check=False)
    assert output.count("stopped by SIGTERM after step") == 2, output
    assert process.returncode != 0
    assert steps_in(run / "checkpoints")
    assert (tmp_path / "requeued").exists()


def test_the_fields_of_the_pytorchjob() -> None:
    """What the operator's definition of v1 knows; it drops what it does not."""
    assert (JOB["apiVersion"], JOB["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(JOB["spec"]) <= {"elasticPolicy", "runPolicy", "pytorchReplicaSpecs", "nprocPerNode"}
    elastic = JOB["spec"]["elasticPolicy"]
    rendezvous = {"rdzvBackend", "rdzvPort", "rdzvHost", "rdzvId", "rdzvConf"}
    assert set(elastic) <= {"minReplicas", "maxReplicas", "maxRestarts", "metrics", "standalone", *rendezvous}
    policies = {"cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit"}
    assert set(JOB["spec"]["runPolicy"]) <= {*policies, "schedulingPolicy", "suspend"}
    worker = JOB["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert set(worker) == {"replicas", "restartPolicy", "template"}
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]
    pod = worker["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > 30  # after which torchrun kills
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    volumes = {volume["name"] for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == volumes
    assert mounts["shm"] == "/dev/shm"
    assert all(isinstance(word, str) for word in container["command"])


def test_the_command_of_the_pytorchjob(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (container,) = JOB["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    words = container["command"]
    config = is_ours(words, capsys)
    assert config["data"]["path"].startswith("/data/")
    assert config["backbone"]["sync_batch_norm"] is True
    elastic = JOB["spec"]["elasticPolicy"]
    smallest = elastic["minReplicas"] * 8
    assert config["data"]["global_batch_size"] <= smallest * config["data"]["micro_batch_size"]
    for name, value in {  # as the operator sets them
        "PET_RDZV_BACKEND": elastic["rdzvBackend"],
        "PET_RDZV_ENDPOINT": f"{JOB['metadata']['name']}-worker-0:{elastic['rdzvPort']}",
        "PET_NNODES": f"{elastic['minReplicas']}:{elastic['maxReplicas']}",
        "PET_MAX_RESTARTS": str(elastic["maxRestarts"]),
        "PET_RDZV_ID": elastic["rdzvId"],
    }.items():
        monkeypatch.setenv(name, value)
    launch = config_from_args(get_args_parser().parse_args(words[1:]))[0]
    assert (launch.min_nodes, launch.max_nodes, launch.nproc_per_node, launch.max_restarts) == (2, 4, 8, 100)
    assert launch.rdzv_endpoint == "partialfc-worker-0:29400"
