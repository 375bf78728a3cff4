#!/usr/bin/env bash
# Everything worth knowing from a first quarter of an hour on one GPU, step by step: see README.md beside this file.
#
#   bash tests/gpu/first_quarter_hour.sh [--budget SECONDS] [--from STEP] [--only STEP|checks|figures ...] [--list]
#
# Results go to $OUT (default: runs/gpu), complete after every step: summary.txt, summary.jsonl and log.txt.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec "${PYTHON:-python3}" -m tests.gpu.quarter_hour "$@"
