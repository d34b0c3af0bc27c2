"""`alignvlm launch slurm|torchrun|hosts|local|kubernetes RECIPE`: check a recipe, then start it on a cluster.

The work is done by the files in launch/, which can be used without this command.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from alignvlm.cli.arguments import add_recipe, count, device_resource, endpoint, hosts, path, positive, word
from alignvlm.errors import UserError
from data_pipeline.masking import mask

if TYPE_CHECKING:
    from alignvlm.launch import SlurmJob


def add_parser(subparsers: Any) -> None:
    """Add `launch` and its kinds of clusters to the command line."""
    parser = subparsers.add_parser(
        "launch",
        help="start a recipe on a cluster",
        description="Check that a recipe fits the machines, and start it there.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")

    slurm = _add_kind(kinds, "slurm", "submit to Slurm: one process per GPU, requeued until training ends")
    add_slurm_options(slurm)
    slurm.set_defaults(handler=run_slurm)

    torchrun = _add_kind(kinds, "torchrun", "start torchrun on this host; run the same command on every host")
    torchrun.add_argument(
        "--nodes", type=hosts, default="1", metavar="N", help="number of hosts, or MIN:MAX (default: 1)"
    )
    torchrun.add_argument("--processes-per-node", type=positive, metavar="N", help="default: one per GPU, or 1")
    torchrun.add_argument(
        "--rendezvous", type=endpoint, default="localhost:29400", metavar="HOST:PORT", help="default: %(default)s"
    )
    torchrun.set_defaults(handler=run_torchrun)

    hostfile = _add_kind(kinds, "hosts", "start the hosts of a DeepSpeed hostfile over ssh")
    hostfile.add_argument(
        "--hostfile", type=path, required=True, metavar="FILE", help="a line per host: NAME slots=GPUS"
    )
    hostfile.add_argument(
        "--node-rank",
        type=count,
        metavar="N",
        help="start this host only, without ssh; its position in the hostfile, from 0",
    )
    hostfile.set_defaults(handler=run_hosts)

    local = _add_kind(kinds, "local", "train on this machine; restart after crashes")
    local.set_defaults(handler=run_local)

    kubernetes = _add_kind(kinds, "kubernetes", "print a manifest for `kubectl apply -f -`", dry_run=False)
    kubernetes.add_argument(
        "--kind", dest="manifest", choices=("job", "pytorchjob"), default="job",
        help="a Job of Kubernetes itself, or a PyTorchJob of Kubeflow's operator (default: %(default)s)",
    )  # fmt: skip
    kubernetes.add_argument("--nodes", type=positive, default=1, metavar="N", help="pods (default: %(default)s)")
    kubernetes.add_argument(
        "--gpus-per-node", type=positive, default=8, metavar="N", help="GPUs of a pod (default: %(default)s)"
    )
    kubernetes.add_argument(
        "--image", type=word, required=True, metavar="NAME", help="container image with alignvlm installed"
    )
    kubernetes.add_argument(
        "--claim",
        type=word,
        required=True,
        metavar="NAME",
        help="persistent volume claim (ReadWriteMany) for data and runs",
    )
    kubernetes.add_argument(
        "--rdma", type=device_resource, metavar="RESOURCE[=N]",
        help="resource of the cluster's RDMA device plugin, such as rdma/hca_shared_devices_a (default: TCP)",
    )  # fmt: skip
    kubernetes.add_argument("--host-network", action="store_true", help="pods use the network of their nodes")
    kubernetes.set_defaults(handler=run_kubernetes)


def add_slurm_options(slurm: Any) -> None:
    """Add what says how a job of Slurm looks, to a parser or a group of it; `slurm_job` reads it."""
    slurm.add_argument("--nodes", type=positive, default=1, metavar="N", help="hosts of a job (default: %(default)s)")
    slurm.add_argument(
        "--gpus-per-node",
        type=count,
        default=8,
        metavar="N",
        help="GPUs of a host; 0 trains on CPUs (default: %(default)s)",
    )
    slurm.add_argument(
        "--processes-per-node",
        type=positive,
        metavar="N",
        help="processes of a host (default: one per GPU, or train.processes)",
    )
    slurm.add_argument(
        "--cpus-per-process", type=positive, metavar="N", help="cores of a process (default: data.num_workers + 1)"
    )
    slurm.add_argument(
        "--time", type=word, default="24:00:00", metavar="TIME", help="time limit of one job (default: %(default)s)"
    )
    slurm.add_argument(
        "--signal-seconds", type=positive, default=300, metavar="N",
        help="save and requeue this many seconds before the time limit (default: %(default)s)",
    )  # fmt: skip
    slurm.add_argument(
        "--partition", type=word, metavar="NAME", help="partition of the cluster (default: the cluster's own)"
    )
    slurm.add_argument(
        "--account", type=word, metavar="NAME", help="account that pays for the job (default: the user's)"
    )
    slurm.add_argument(
        "--sbatch",
        type=word,
        action="append",
        default=[],
        metavar="OPTION",
        help="another option of sbatch, such as --sbatch=--qos=low; may be repeated",
    )


def _add_kind(kinds: Any, name: str, text: str, dry_run: bool = True) -> argparse.ArgumentParser:
    parser = kinds.add_parser(name, help=text)
    add_recipe(parser, "train.precision=fp32")
    if dry_run:
        parser.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    return parser


def run_slurm(arguments: argparse.Namespace) -> int:
    """Submit the job and print its number and logs."""
    from alignvlm.config import load_recipe
    from alignvlm.launch.scripts import find_launcher
    from alignvlm.launch.slurm import logs_folder

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    job = slurm_job(arguments, recipe)
    job.check(recipe)
    if arguments.dry_run:
        print(f"mkdir -p {shlex.quote(str(logs_folder(recipe)))}")
        print(mask(job.shell_line(recipe)))
        print(f"\n# {find_launcher('slurm/train.sbatch')}:\n")
        print(find_launcher("slurm/train.sbatch").read_text(encoding="utf-8"), end="")
        return 0
    logs_folder(recipe).mkdir(parents=True, exist_ok=True)
    number = submit(job.command(recipe), job.environment(recipe), job.shell_line(recipe))
    print(f"submitted job {number}; logs: {logs_folder(recipe)}/slurm-{number}.log and rank-*.log")
    return 0


def slurm_job(arguments: argparse.Namespace, recipe: Any) -> SlurmJob:
    """The job that the options of `add_slurm_options` describe."""
    from alignvlm.launch import SlurmJob

    return SlurmJob(
        recipe_name=arguments.recipe,
        overrides=arguments.overrides,
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        processes_per_node=arguments.processes_per_node or arguments.gpus_per_node or recipe.train.processes,
        cpus_per_process=arguments.cpus_per_process or recipe.data.num_workers + 1,
        time=arguments.time,
        signal_seconds=arguments.signal_seconds,
        partition=arguments.partition,
        account=arguments.account,
        options=arguments.sbatch,
    )


def submit(command: list[str], environment: dict[str, str], line: str) -> str:
    """Give a command to sbatch and return the job's number; `line` is the command for errors."""
    try:
        submitted = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError as error:
        raise UserError(
            "sbatch is not on the PATH; submit from a login node of the cluster, or use --dry-run"
        ) from error
    if submitted.returncode:
        raise UserError(f"sbatch refused the job (exit code {submitted.returncode}): {line}")
    return submitted.stdout.strip().split(";")[0]


def run_torchrun(arguments: argparse.Namespace) -> int:
    """Replace this process by launch/torchrun.sh."""
    variables = {"ALIGNVLM_NODES": arguments.nodes, "ALIGNVLM_RENDEZVOUS": arguments.rendezvous}
    world_size = None  # not known here where hosts come and go, or where each starts one process per GPU
    if arguments.processes_per_node:
        variables["ALIGNVLM_PROCESSES"] = str(arguments.processes_per_node)
        if arguments.nodes.isdigit():
            world_size = int(arguments.nodes) * arguments.processes_per_node
    return _exec_script("torchrun.sh", arguments, variables, world_size=world_size)


def run_hosts(arguments: argparse.Namespace) -> int:
    """Replace this process by launch/deepspeed_hosts.sh."""
    variables = {} if arguments.node_rank is None else {"ALIGNVLM_NODE_RANK": str(arguments.node_rank)}
    return _exec_script("deepspeed_hosts.sh", arguments, variables, str(arguments.hostfile))


def run_local(arguments: argparse.Namespace) -> int:
    """Replace this process by launch/local.sh."""
    return _exec_script("local.sh", arguments, {})


def _exec_script(
    script: str,
    arguments: argparse.Namespace,
    variables: dict[str, str],
    *first: str,
    world_size: int | None = None,
) -> int:
    """Replace this process by a script of launch/, so that signals and exit codes are the script's."""
    from alignvlm.config import load_recipe
    from alignvlm.launch import check_world, find_launcher

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if world_size is not None:
        check_world(recipe, world_size, cuda=True)
    if not (arguments.dry_run or all(map(os.path.isfile, first))):
        raise UserError(f"--hostfile {first[0]}: no such file; it has a line `HOST slots=GPUS` for each host")
    variables = {"ALIGNVLM_PYTHON": sys.executable, **variables}
    command = ["bash", str(find_launcher(script)), *first, arguments.recipe, *arguments.overrides]
    if arguments.dry_run:
        named = (f"{name}={shlex.quote(value)}" for name, value in variables.items())
        print(mask(" ".join([*named, shlex.join(command)])))
        return 0
    sys.stdout.flush()
    os.execvpe("bash", command, os.environ | variables)


def run_kubernetes(arguments: argparse.Namespace) -> int:
    """Print the manifest."""
    from alignvlm.config import load_recipe
    from alignvlm.errors import UserError
    from alignvlm.launch import check_world
    from alignvlm.launch.kubernetes import Cluster, render

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    for override in arguments.overrides:
        if mask(override) != override:
            raise UserError(
                f"override {override!r}: a manifest is no place for a password; give it to the pods as a Secret"
            )
    check_world(recipe, arguments.nodes * arguments.gpus_per_node, cuda=True)
    cluster = Cluster(
        arguments.nodes, arguments.gpus_per_node, arguments.image, arguments.claim,
        rdma=arguments.rdma, host_network=arguments.host_network,
    )  # fmt: skip
    print(render(arguments.manifest, recipe.name, [arguments.recipe, *arguments.overrides], cluster), end="")
    return 0
