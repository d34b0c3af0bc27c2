"""The files of launch/: shellcheck's opinion, Kubernetes' schemas, and scripts run with a stand-in for the program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.fixtures.command import Command
from tests.jobs import ROOT, TINY

LAUNCH = ROOT / "launch"
SCRIPTS = [
    *sorted(LAUNCH.glob("*.sh")),
    *sorted((LAUNCH / "slurm").glob("*.sbatch")),
    ROOT / "scripts" / "release.sh",
    ROOT / "tests" / "cluster" / "install.sh",
]
KUBERNETES = "1.31"

REPLICAS = {
    "type": "object",
    "properties": {
        "replicas": {"type": "integer", "minimum": 1},
        "restartPolicy": {"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
        "template": {"type": "object"},
    },
    "additionalProperties": False,
    "required": ["replicas", "restartPolicy", "template"],
}
PYTORCH_JOB = {
    "type": "object",
    "properties": {
        "apiVersion": {"const": "kubeflow.org/v1"},
        "kind": {"const": "PyTorchJob"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "properties": {
                "nprocPerNode": {"type": "string"},
                "runPolicy": {
                    "type": "object",
                    "properties": {
                        "activeDeadlineSeconds": {"type": "integer"},
                        "backoffLimit": {"type": "integer"},
                        "cleanPodPolicy": {"enum": ["All", "Running", "None"]},
                        "suspend": {"type": "boolean"},
                        "ttlSecondsAfterFinished": {"type": "integer"},
                    },
                    "additionalProperties": False,
                },
                "pytorchReplicaSpecs": {
                    "type": "object",
                    "properties": {"Master": REPLICAS, "Worker": REPLICAS},
                    "additionalProperties": False,
                    "required": ["Master"],
                },
            },
            "additionalProperties": False,
            "required": ["pytorchReplicaSpecs"],
        },
    },
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
}
"""What Kubeflow's training operator says around the pods (its resource definition, version 1.9)."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def manifests(arguments: list[str], command: Command) -> list[dict[str, Any]]:
    options = ["--image=registry/alignvlm:1", "--claim=disk", "--gpus-per-node=2"]
    return list(yaml.safe_load_all(command("launch", "kubernetes", TINY, "name=my_run", *options, *arguments)))


def check_pytorch_job(job: dict[str, Any]) -> None:
    jsonschema.validate(job, PYTORCH_JOB)
    for role in job["spec"]["pytorchReplicaSpecs"].values():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **role["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        assert [container["name"] for container in pod["spec"]["containers"]] == ["pytorch"]


def test_manifests_are_valid_as_they_are() -> None:
    for document in yaml.safe_load_all((LAUNCH / "kubernetes" / "job.yaml").read_text()):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    check_pytorch_job(yaml.safe_load((LAUNCH / "kubernetes" / "pytorchjob.yaml").read_text()))


def test_indexed_job_of_a_recipe(command: Command) -> None:
    service, job = manifests(["--nodes=2"], command)
    for document in (service, job):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": "my-run"}
    assert service["metadata"]["name"] == "my-run"
    assert job["metadata"]["name"] == "my-run"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["subdomain"] == "my-run"
    assert container["image"] == "registry/alignvlm:1"
    assert container["command"] == ["alignvlm", "launch", "torchrun", str(TINY), "name=my_run"]
    assert container["args"] == ["--nodes=2", "--processes-per-node=2", "--rendezvous=my-run-0.my-run:29400"]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "disk"
    command("launch", "torchrun", *container["command"][3:], *container["args"], "--dry-run")


@pytest.mark.parametrize("nodes", [1, 2])
def test_pytorch_job_of_a_recipe(nodes: int, command: Command) -> None:
    (job,) = manifests([f"--nodes={nodes}", "--kind=pytorchjob"], command)
    check_pytorch_job(job)
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert sum(role["replicas"] for role in replicas.values()) == nodes
    for role in replicas.values():
        assert f"--nodes={nodes}" in role["template"]["spec"]["containers"][0]["args"]


@pytest.mark.parametrize("kind", ["job", "pytorchjob"])
def test_pods_get_the_fast_network(kind: str, command: Command) -> None:
    options = ["--nodes=2", f"--kind={kind}", "--rdma=rdma/hca_shared_devices_a=4", "--host-network"]
    *_, job = manifests(options, command)
    if kind == "job":
        kubernetes_validate.validate(job, KUBERNETES, strict=True)
        pods = [job["spec"]["template"]["spec"]]
    else:
        check_pytorch_job(job)
        pods = [role["template"]["spec"] for role in job["spec"]["pytorchReplicaSpecs"].values()]
        assert len(pods) == 2
    for pod in pods:
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 2, "rdma/hca_shared_devices_a": 4}
        assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
        assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    error = command("launch", "kubernetes", TINY, "--image=i", "--claim=c", "--rdma=fast", code=2)
    assert "'fast': must be the name of a resource, such as rdma/hca_shared_devices_a" in error


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "threads"),
    [
        ("torchrun.sh", [], {"ALIGNVLM_PROCESSES": "2"}, 3),
        ("torchrun.sh", [], {"ALIGNVLM_PROCESSES": "16"}, 1),
        ("torchrun.sh", [], {"ALIGNVLM_PROCESSES": "gpu", "CUDA_VISIBLE_DEVICES": "0,3,5"}, 2),
        ("torchrun.sh", [], {"ALIGNVLM_PROCESSES": "auto", "CUDA_VISIBLE_DEVICES": "0,3,5"}, 2),
        ("torchrun.sh", [], {"ALIGNVLM_PROCESSES": "2", "OMP_NUM_THREADS": "5"}, 5),
        ("deepspeed_hosts.sh", ["hosts"], {"ALIGNVLM_NODE_RANK": "0"}, 2),
    ],
)
def test_processes_of_a_host_share_its_cpus(
    script: str, arguments: list[str], environment: dict[str, str], threads: int, tmp_path: Path
) -> None:
    """With a stand-in for Python, on a host that says it has six CPUs."""
    (tmp_path / "hosts").write_text("# comment\nhost1 slots=3\nhost2 slots=6\n")
    for name, text in (("python", 'echo "$OMP_NUM_THREADS" >>threads'), ("nproc", "echo 6")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    changed = {"ALIGNVLM_PYTHON": str(tmp_path / "python"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(
        ["bash", str(LAUNCH / script), *arguments, "recipe"], cwd=tmp_path, env=inherited | changed | environment,
        check=True, timeout=30,
    )  # fmt: skip
    assert (tmp_path / "threads").read_text().splitlines()[-1] == str(threads)


def start_local(tmp_path: Path, program: str, **environment: str) -> subprocess.Popen[str]:
    """launch/local.sh with a stand-in for Python."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/bash\necho run "$@" >>calls\n{program}\n')
    fake.chmod(0o755)
    return subprocess.Popen(
        ["bash", str(LAUNCH / "local.sh"), "recipe", "a=b"], cwd=tmp_path, text=True,
        env=os.environ | {"ALIGNVLM_PYTHON": str(fake), "CUDA_VISIBLE_DEVICES": ""} | environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("program", "code", "starts"),
    [
        ("exit 0", 0, 1),
        ("exit 2", 2, 1),
        ("exit 9", 9, 2),
        ("[ $(wc -l <calls) -ge 3 ] && exit 0; exit 75", 0, 3),
    ],
)
def test_local_starts_again_what_may_succeed(program: str, code: int, starts: int, tmp_path: Path) -> None:
    """Finished, a user's mistake, crashes (one is allowed here), and early stops, which do not count."""
    assert start_local(tmp_path, program, ALIGNVLM_MAX_CRASHES="1").wait(30) == code
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == starts
    assert calls[0].startswith("run -m alignvlm train recipe a=b")


def test_local_counts_no_crash_that_came_late(tmp_path: Path) -> None:
    program = "[ $(wc -l <calls) -ge 4 ] && exit 0; exit 9"
    assert start_local(tmp_path, program, ALIGNVLM_MAX_CRASHES="1", ALIGNVLM_CRASH_MINUTES="0").wait(30) == 0
    assert len((tmp_path / "calls").read_text().splitlines()) == 4


def test_local_starts_a_process_per_visible_gpu(tmp_path: Path) -> None:
    assert start_local(tmp_path, "exit 0", CUDA_VISIBLE_DEVICES="0,3,5").wait(30) == 0
    assert (tmp_path / "calls").read_text() == "run -m alignvlm train recipe a=b train.processes=3\n"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP], ids=lambda number: number.name)
def test_local_hands_a_signal_on_and_does_not_start_again(number: signal.Signals, tmp_path: Path) -> None:
    process = start_local(
        tmp_path, "trap 'sleep 0.5; echo saved >saved; exit 75' TERM; for i in {1..100}; do sleep 0.1; done"
    )
    while not (tmp_path / "calls").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    assert process.wait(20) == 75
    assert (tmp_path / "saved").exists()
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
