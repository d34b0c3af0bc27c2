"""Manifests of launch/kubernetes/ filled in for a recipe. Talks to no cluster: their text goes to `kubectl apply`."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from alignvlm.errors import UserError
from alignvlm.launch.scripts import find_launcher

NAME = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")
"""Names that Kubernetes takes for services, with room for the endings of pods."""
PORT = 29400


@dataclass(frozen=True)
class Cluster:
    """What the pods look like."""

    nodes: int
    gpus_per_node: int
    image: str
    claim: str
    rdma: tuple[str, int] | None = None
    """Name of the resource of an RDMA device plugin, and how many of it a pod asks for."""
    host_network: bool = False


def render(manifest: str, name: str, arguments: Sequence[str], cluster: Cluster) -> str:
    """The documents of launch/kubernetes/<manifest>.yaml for a run.

    Args:
        arguments: recipe and overrides, as `alignvlm train` takes them.

    Raises:
        UserError: the run's name cannot name a job.
    """
    name = name.lower().replace("_", "-").replace(".", "-")
    if not NAME.fullmatch(name):
        raise UserError(f"the run's name {name!r} cannot name a Kubernetes job (letters, digits, '-'): add name=other")
    documents = list(yaml.safe_load_all(find_launcher(f"kubernetes/{manifest}.yaml").read_text(encoding="utf-8")))
    for document in documents:
        document["metadata"]["name"] = name
        {"Service": _service, "Job": _job, "PyTorchJob": _pytorch_job}[document["kind"]](
            document["spec"], name, arguments, cluster
        )
    return yaml.safe_dump_all(documents, sort_keys=False, width=120)


def _service(spec: dict[str, Any], name: str, arguments: Sequence[str], cluster: Cluster) -> None:
    spec["selector"] = {"batch.kubernetes.io/job-name": name}


def _job(spec: dict[str, Any], name: str, arguments: Sequence[str], cluster: Cluster) -> None:
    spec |= {"completions": cluster.nodes, "parallelism": cluster.nodes}
    pod = spec["template"]["spec"]
    pod["subdomain"] = name
    _pod(pod, f"{name}-0.{name}", arguments, cluster)


def _pytorch_job(spec: dict[str, Any], name: str, arguments: Sequence[str], cluster: Cluster) -> None:
    replicas = copy.deepcopy(spec["pytorchReplicaSpecs"])
    replicas["Worker"]["template"] = copy.deepcopy(replicas["Worker"]["template"])  # one YAML anchor for both
    for role in replicas.values():
        _pod(role["template"]["spec"], f"{name}-master-0", arguments, cluster)
    replicas["Worker"]["replicas"] = cluster.nodes - 1
    if cluster.nodes == 1:
        del replicas["Worker"]
    spec["pytorchReplicaSpecs"] = replicas


def _pod(pod: dict[str, Any], first: str, arguments: Sequence[str], cluster: Cluster) -> None:
    container = pod["containers"][0]
    container["image"] = cluster.image
    container["command"] = ["alignvlm", "launch", "torchrun", *arguments]
    container["args"] = [
        f"--nodes={cluster.nodes}",
        f"--processes-per-node={cluster.gpus_per_node}",
        f"--rendezvous={first}:{PORT}",
    ]
    limits = {"nvidia.com/gpu": cluster.gpus_per_node}
    container["resources"] = {"limits": limits}
    if cluster.rdma is not None:
        resource, number = cluster.rdma
        limits[resource] = number
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}  # RDMA pins memory
    if cluster.host_network:  # names of services are looked up as in other pods
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    claims = [volume["persistentVolumeClaim"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    for claim in claims:
        claim["claimName"] = cluster.claim
