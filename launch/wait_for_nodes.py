#!/usr/bin/env python3
"""Waits until so many nodes of a Ray cluster are there, whose head has its temporary folder on this node.

    python launch/wait_for_nodes.py /tmp/rlaif-12/ray 4 [PID...]

Exit code 1 when they are not there within RLAIF_NODES_TIMEOUT_S seconds (300), or one of the processes PID, which
start Ray on them, has ended before that.
"""

import logging
import os
import sys
import time
from pathlib import Path

import ray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's package; it need not be installed here

from rlaif_ray.output import say, survive_lost_output

POLL_S = 1.0
TOLD_EVERY_S = 15.0


def registered(address_file: Path) -> list[str]:
    """Host names of the nodes that live; none before the head has written its address."""
    if not ray.is_initialized():
        try:
            address = address_file.read_text().strip()
        except FileNotFoundError:
            return []
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    return sorted(node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"])


def main(folder: str, wanted: int, starters: list[str]) -> int:
    limit_s = float(os.environ.get("RLAIF_NODES_TIMEOUT_S", "300"))
    began = told = time.monotonic()
    while True:
        there = registered(Path(folder) / "ray_current_cluster")
        now = time.monotonic()
        if len(there) >= wanted:
            return 0
        message = f"{len(there)} of {wanted} nodes registered ({', '.join(there) or 'none'})"
        ended = not all(Path("/proc", pid).exists() for pid in starters)
        if ended or now - began > limit_s:
            why = "ray start has ended on one" if ended else f"RLAIF_NODES_TIMEOUT_S={limit_s:g} s are over"
            say(f"slurm: {message}, and {why}. See the .log files in {Path(folder).parent}.")
            return 1
        if now - told > TOLD_EVERY_S:
            told = now
            say(f"slurm: {message}")
        time.sleep(POLL_S)


if __name__ == "__main__":
    survive_lost_output()
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
