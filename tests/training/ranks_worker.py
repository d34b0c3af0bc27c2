"""A rank of two, by gloo, that looks for checkpoints in a folder of its own; prints what it finds as JSON.

Its working folder stands for a host that sees other files of a shared disk. Started by test_ranks.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist

from alignvlm.training.checkpoints.store import CheckpointStore
from alignvlm.training.distributed import World


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    world = World(rank, dist.get_world_size(), rank, torch.device("cpu"), None, None)
    store = CheckpointStore(Path("checkpoints"), world, keep_last=9, keep_every=None, keep_best="loss/held_out")
    newest = store.newest(lambda line: None)
    best = [store.is_best({"loss/held_out": loss}, step=40) for loss in (1.5, 2.5)]
    print(json.dumps({"newest": newest and newest.step, "is best": best}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
