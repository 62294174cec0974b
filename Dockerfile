# ettin_foundry with LLM-Foundry, torch and flash-attn, for GPUs with CUDA 12.6:
#
#   docker build -t ettin-foundry .
#   docker run --gpus all --ipc=host -v "$PWD/data:/ettin/data" -v "$PWD/runs:/ettin/runs" ettin-foundry \
#       ettin suite yamls/suite/ettin-150m.yaml
#
# launch/suite.k8s.yaml runs it on Kubernetes. torch is the base image's; pip leaves it as it is, for it is the pinned one.

# flash-attn is compiled here, with nvcc, so that the image that runs needs no compiler of CUDA
FROM pytorch/pytorch:2.7.0-cuda12.6-cudnn9-devel AS flash-attn
# how many compilers at once: each takes some 5 GB
ARG MAX_JOBS=8
RUN pip install --no-cache-dir packaging==25.0 ninja==1.11.1.4 wheel==0.45.1 psutil==7.0.0 setuptools==80.9.0 \
    && pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir /wheels flash-attn==2.7.4.post1

FROM pytorch/pytorch:2.7.0-cuda12.6-cudnn9-runtime
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# a C compiler: Triton builds its launchers when a kernel is first used
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc=4:11.* libc6-dev=2.35-* git=1:2.34.* \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /ettin
COPY --from=flash-attn /wheels /wheels
COPY setup.cfg pyproject.toml constraints.txt README.md LICENSE ./
COPY ettin_foundry ettin_foundry
RUN pip install --no-cache-dir -c constraints.txt -e . && pip install --no-cache-dir --no-deps /wheels/*.whl && rm -r /wheels
COPY train.py ./
COPY yamls yamls
COPY data_prep data_prep
COPY launch launch
RUN useradd --create-home --uid 1000 ettin && mkdir data runs models && chown ettin: /ettin data runs models
USER 1000
# hadolint ignore=DL3064
ENV HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
CMD ["ettin", "--help"]
