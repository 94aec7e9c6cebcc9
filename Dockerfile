# What `make` needs beside Python; the project is mounted or copied into it. Used by .devcontainer and by CI:
#   docker build --tag schoenbat . && docker run --rm -v "$PWD:/workspace" -w /workspace schoenbat make run
FROM python:3.11-slim
# g++ is for torch.compile.
RUN apt-get update && apt-get install -y --no-install-recommends g++ git make && rm -rf /var/lib/apt/lists/*
# The mounted folder belongs to somebody else.
RUN git config --system --add safe.directory '*'
ENV PIP_ROOT_USER_ACTION=ignore
