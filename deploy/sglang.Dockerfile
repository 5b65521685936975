# SGLang with the recorder. In a checkout: docker build -f deploy/sglang.Dockerfile -t sglang-with-eplb-dump .
ARG SGLANG_VERSION=v0.5.23
FROM lmsysorg/sglang:${SGLANG_VERSION}
RUN --mount=type=bind,target=/eplb-dump PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir /eplb-dump
