"""A Ray of this machine's own listens on loopback alone: whoever reaches its ports can run code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import ray_constants

LOOPBACK = "127.0.0.1"


@contextmanager
def on_loopback() -> Iterator[None]:
    """A Ray that is started within it has 127.0.0.1 as its only node's address, and its processes listen there alone.

    Ray has no argument for this: it takes 127.0.0.1 for the machine's outward address, except on systems where it
    starts no clusters, which this variable makes of any.
    """
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    given = os.environ.get(name)
    os.environ[name] = "0"  # for the processes that Ray starts
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(name)
        if given is not None:
            os.environ[name] = given


def loopback_environment() -> dict[str, str]:
    """What keeps an actor's own servers (gloo, NCCL, vLLM) on loopback where Ray is; empty in a real cluster."""
    if ray.util.get_node_ip_address() != LOOPBACK:
        return {}
    return {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": LOOPBACK}
