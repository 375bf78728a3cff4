#!/usr/bin/env bash
# Submits a job to Slurm (cluster/slurm.sbatch):
#   launch/slurm.sh [--nodes=5 ...] [train configs/cluster/nodes.yaml run_dir=/shared/runs/nodes]
# Options, each as --NAME=VALUE, are sbatch's; what follows them is rlaif's command line.
set -euo pipefail
cd "$(dirname "$0")/.."
options=()
while [[ ${1:-} == -* ]]; do
  options+=("$1")
  shift
done
job=$(sbatch --parsable "${options[@]}" cluster/slurm.sbatch "$@")
echo "submitted $job; its log: $(scontrol show job "$job" | sed -n 's/^ *StdOut=//p')"
echo "End it, with a checkpoint: scancel --batch --signal=TERM $job"
