#!/bin/sh
# Measure what the recorder costs in real vLLM engines on this machine's GPUs, and check what it records.
#
#   sh scripts/real_vllm_gpu.sh                     two GPUs, tensor parallel
#   sh scripts/real_vllm_gpu.sh --tp 2 --dp 2       four GPUs
#   sh scripts/real_vllm_gpu.sh --help              all options
#   sh scripts/real_vllm_gpu.sh --table OUT         print the table of stored results again
#
# Uses the Python environment as it is: vLLM and eplb-dump must be installed in it. PYTHON chooses the interpreter.
set -eu
exec "${PYTHON:-python3}" "$(dirname "$0")/real_vllm_gpu/measure.py" "$@"
