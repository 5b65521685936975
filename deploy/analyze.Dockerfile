# The reader, for the metrics sidecar and for prune. In a checkout: docker build -f deploy/analyze.Dockerfile -t eplb-analyze .
FROM python:3.13-slim
RUN --mount=type=bind,target=/eplb-dump pip install --no-cache-dir '/eplb-dump[analyze,metrics]'
