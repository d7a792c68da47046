#!/bin/sh
# All that is to be measured on a large GPU, within nine minutes and without network:
#   bench/gpu_day.sh WHEELHOUSE OUTPUT [options of bench/gpu_day.py]
# WHEELHOUSE is a folder that bench/gpu_day_wheelhouse.py wrote; OUTPUT gets gpu_day.json and gpu_day.txt.
set -eu
[ $# -ge 2 ] || { echo "usage: $0 WHEELHOUSE OUTPUT [--dry-run] [--budget SECONDS] [--parts NAME ...]" >&2; exit 2; }
wheelhouse=$1 output=$2
shift 2
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -u -m bench.gpu_day --wheelhouse "$wheelhouse" --output "$output" "$@"
