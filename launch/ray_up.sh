#!/usr/bin/env bash
# Starts Ray on the machines of cluster/ray-up.yaml, and on its head a job, which it follows:
#   launch/ray_up.sh [train configs/cluster/nodes.yaml run_dir=/shared/runs/nodes]
# What follows is rlaif's command line. The cluster stays up. End the job, with a checkpoint, and then the cluster with:
#   ray exec cluster/ray-up.yaml 'python /opt/rlaif-ray/launch/end_jobs.py 100' && ray down cluster/ray-up.yaml
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- train configs/cluster/nodes.yaml run_dir=/shared/runs/nodes
ray up --yes cluster/ray-up.yaml
ray exec cluster/ray-up.yaml "cd /opt/rlaif-ray && RAY_ADDRESS=127.0.0.1:6379 rlaif $(printf '%q ' "$@")"
