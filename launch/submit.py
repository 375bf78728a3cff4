#!/usr/bin/env python3
"""Sends a job to a running Ray cluster and follows its log until it ends; the exit code is the job's.

    python launch/submit.py --address http://HEAD:8265 train configs/demo/train.yaml steps=20 run_dir=/shared/runs/a

Everything after the options is `rlaif`'s command line. The cluster's nodes need the package installed, or
`--working-dir .` uploads this checkout. `ray job stop ID` ends the job: it writes a checkpoint, and the same command
goes on from there.

Whoever may look at the cluster sees a job's words, its variables and what is uploaded: a secret in the words or
variables is refused, and files that hold secrets as a rule (.env, keys, .netrc) are not uploaded.
"""

import argparse
import asyncio
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's package; it need not be installed here

from rlaif_ray.output import survive_lost_output
from rlaif_ray.secrecy import is_secret_variable, masked, secrets_in_arguments

# What git ignores is not uploaded, but .gitignore need not be there, and RAY_RUNTIME_ENV_IGNORE_GITIGNORE turns it off.
NOT_UPLOADED = (
    *(".env", ".env.*", "*.env", ".envrc", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.kdbx", "id_rsa*", "id_dsa*"),
    *(
        "id_ecdsa*",
        "id_ed25519*",
        ".ssh",
        ".gnupg",
        ".aws",
        ".azure",
        ".kube",
        ".docker/config.json",
        ".config/gcloud",
        ".netrc",
    ),
    *("_netrc", ".pgpass", ".git-credentials", ".git", ".hg", ".svn", ".npmrc", ".pypirc", ".htpasswd", "*kubeconfig*"),
    *("auth_token", "credentials.json", "service-account*.json", "secrets.y*ml", "secrets.json", "secrets.toml"),
    *(".venv", "venv", "__pycache__"),  # Ray's own, which a list of ours is added to in newer versions only
)
# A head node that has just started takes a while until its agent accepts jobs, a busy one longer.
AGENT_WAIT_S = float(os.environ.get("RLAIF_AGENT_WAIT_S", "120"))


def take_the_token_that_is_there() -> None:
    """A cluster may ask for the token of its machine: `ray start` makes one that does wherever a token is, and Ray's
    first local start writes one. Its client sends a token only where RAY_AUTH_MODE says so."""
    if "RAY_AUTH_MODE" in os.environ:
        return
    token = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    if os.environ.get("RAY_AUTH_TOKEN") or os.path.isfile(token):
        os.environ["RAY_AUTH_MODE"] = "token"


def submit_when_ready(client: Any, command: str, runtime_env: dict[str, object]) -> str | None:
    """The submitted job's id; None when the cluster's agent did not come up in time."""
    deadline = time.monotonic() + AGENT_WAIT_S
    while True:
        try:
            return str(client.submit_job(entrypoint=command, runtime_env=runtime_env))
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > deadline:
                return None
        time.sleep(1.0)


def secrets_shown(options: argparse.Namespace) -> str:
    """What is wrong with a job's words and variables, which everybody sees who sees the cluster; "" for nothing."""
    where = "Set it in the environment in which the nodes start"
    secret = [name for name in options.env if is_secret_variable(name) or _holds_secret(os.environ.get(name, ""))]
    if secret:
        return (
            f"--env must not pass secrets (got {', '.join(secret)}): Ray writes what it passes into logs and its list "
            f"of jobs. {where}."
        )
    words = [options.working_dir or "", options.python, options.job, *options.arguments]
    if found := list(secrets_in_arguments(words)):
        return (
            f"a job's words must hold no secret (got {', '.join(found)}): everybody who sees the cluster's dashboard, "
            f"its list of jobs or its logs reads them. {where}, and name its variable, as judge.api_key_env=NAME does."
        )
    return ""


def _holds_secret(value: str) -> bool:
    return masked(value) != value


def named_dashboard() -> str | None:
    """Where the environment says that jobs go. RAY_ADDRESS may name a cluster's head as well, which takes none."""
    ray_address = os.environ.get("RAY_ADDRESS", "")
    dashboard = ray_address if ray_address.startswith(("http://", "https://")) else None
    return os.environ.get("RAY_API_SERVER_ADDRESS") or dashboard


def nowhere_to_go() -> str:
    """Why no job is sent where neither the command line nor the environment says where to."""
    got = os.environ.get("RAY_ADDRESS")
    ray_address = f"RAY_ADDRESS={got} is no" if got else "RAY_ADDRESS has no"
    return (
        f"no cluster is named (got neither --address nor RAY_API_SERVER_ADDRESS, and {ray_address} http:// or https:// "
        f"address): what answers on this machine may be somebody else's, and would get the job and the token. Set "
        f"--address http://HEAD:8265."
    )


def main() -> int:
    survive_lost_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--address",
        default=named_dashboard(),
        metavar="URL",
        help="the head's dashboard, http://HEAD:8265 (default: RAY_API_SERVER_ADDRESS, or RAY_ADDRESS with http://)",
    )
    parser.add_argument("--working-dir", help="folder to upload to the cluster (configs and data files in it)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME", help="variable to pass on; no secrets")
    parser.add_argument("--python", default="python", help="Python of the cluster's nodes (default: python)")
    parser.add_argument(
        "--stop-wait",
        type=int,
        default=930,
        metavar="S",
        help="seconds that `ray job stop` leaves it at most, above checkpoint.grace_s; as `rlaif plan` says "
        "(default %(default)s, enough for configs/cluster/nodes.yaml)",
    )
    parser.add_argument("--no-wait", action="store_true", help="print the job's id and return")
    parser.add_argument("job", help="train, ...")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="config files and key=value settings")
    options = parser.parse_args()
    if not options.address:
        print(f"submit: {nowhere_to_go()}", file=sys.stderr)
        return 2
    if problem := secrets_shown(options):
        print(f"submit: {problem}", file=sys.stderr)
        return 2
    missing = [name for name in options.env if name not in os.environ]
    if missing:
        print(f"submit: --env names variables that are not set here: {', '.join(missing)}", file=sys.stderr)
        return 2

    take_the_token_that_is_there()
    os.environ["RAY_API_SERVER_ADDRESS"] = options.address  # Ray puts this and RAY_ADDRESS above what it is given
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobStatus, JobSubmissionClient

    try:
        client = JobSubmissionClient(options.address)
    except ConnectionError as error:
        print(
            f"submit: no Ray dashboard answers at {options.address} ({error}). Start it with the head node "
            f"(ray start --head --include-dashboard=true), or correct --address.",
            file=sys.stderr,
        )
        return 2
    except AuthenticationError as error:
        print(
            f"submit: the cluster at {options.address} asks for a token ({str(error).strip().splitlines()[0]}). "
            f"Set RAY_AUTH_TOKEN to it, or put it into ~/.ray/auth_token. RAY_AUTH_MODE must be token, or not set.",
            file=sys.stderr,
        )
        return 2
    # Read by Ray's process that starts the job and stops it; its default, 3 s, is too short for a checkpoint.
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(options.stop_wait)} | {name: os.environ[name] for name in options.env}
    runtime_env: dict[str, object] = {"env_vars": variables}
    if options.working_dir:
        runtime_env |= {"working_dir": options.working_dir, "excludes": list(NOT_UPLOADED)}
    command = shlex.join([options.python, "-m", "rlaif_ray.cli", options.job, *options.arguments])
    job_id = submit_when_ready(client, command, runtime_env)
    if job_id is None:
        print(
            f"submit: the cluster at {options.address} answers, but has had no agent that takes jobs for "
            f"{AGENT_WAIT_S:.0f} s (RLAIF_AGENT_WAIT_S). See its session folder's dashboard_agent.log: the agent takes "
            f"none if another program holds its port (ray start --dashboard-agent-listen-port, 52365 by default).",
            file=sys.stderr,
        )
        return 1
    print(f"submitted {job_id}: {command}", flush=True)
    if options.no_wait:
        return 0

    async def follow() -> None:
        async for lines in client.tail_job_logs(job_id):
            print(lines, end="", flush=True)

    try:
        asyncio.run(follow())
    except KeyboardInterrupt:
        print(f"\nsubmit: stopped following; the job goes on. Stop it with: ray job stop {job_id}", file=sys.stderr)
        return 130
    info = client.get_job_info(job_id)
    print(f"{job_id}: {info.status}", flush=True)
    if info.status == JobStatus.STOPPED:
        return 130
    return 0 if info.status == JobStatus.SUCCEEDED else info.driver_exit_code or 1


if __name__ == "__main__":
    sys.exit(main())
