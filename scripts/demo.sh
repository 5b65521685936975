#!/bin/sh
# Make the environment, run the example engine with the writer on, show what it recorded.
. "$(dirname "$0")/env.sh"
need all
rm -rf demo-dump
python -m examples.moe_engine --dump demo-dump
echo
eplb-analyze summary demo-dump
echo
eplb-analyze layer 2 --steps 100-119 demo-dump
echo
echo "To run eplb-analyze yourself: . .venv/bin/activate"
