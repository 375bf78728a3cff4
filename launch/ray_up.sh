#!/usr/bin/env bash
# Starts Ray on the machines of cluster/ray-up.yaml, and on its head a job, which it follows:
#   launch/ray_up.sh [train configs/cluster/nodes.yaml run_dir=/shared/runs/nodes]
# What follows is rlaif's command line. The cluster stays up; end it with: ray down cluster/ray-up.yaml
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- train configs/cluster/nodes.yaml run_dir=/shared/runs/nodes
ray up --yes cluster/ray-up.yaml
ray exec cluster/ray-up.yaml "cd /opt/rlaif-ray && rlaif $(printf '%q ' "$@")"
