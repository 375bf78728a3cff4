#!/usr/bin/env bash
# Starts a job, or a cluster that stays, on Kubernetes with KubeRay, behind cluster/kuberay-network.yaml:
#   launch/kuberay.sh [cluster/kuberay-rayjob.yaml]
# A folder is a kustomization, such as cluster/kuberay-rdma.
# A job of the same name that is over is removed first by: kubectl delete -f FILE
set -euo pipefail
file=${1:-"$(dirname "$0")/../cluster/kuberay-rayjob.yaml"}
if [ -d "$file" ]; then
  rendered=$(mktemp)
  trap 'rm -f "$rendered"' EXIT
  # The files that it changes lie beside it, not in it: kustomize asks for this to be allowed.
  kubectl kustomize --load-restrictor=LoadRestrictionsNone "$file" > "$rendered"
  file=$rendered
fi
kubectl apply -f "$(dirname "$0")/../cluster/kuberay-network.yaml" # before there is anything to reach
created=$(kubectl create -f "$file" -o name) # such as rayjob.ray.io/rlaif
kubectl get -f "$file"
echo "Its pods: kubectl get pods"
for each in $created; do
  case $each in
    rayjob.*) echo "Its log: kubectl logs --follow --selector job-name=${each##*/}" ;; # KubeRay names the Job after it
  esac
done
