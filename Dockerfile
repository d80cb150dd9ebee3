# One image for every pod of k8s/: `make image`, or `make image TARGET=cpu` for a cluster without GPUs.
# What is installed is what constraints.txt names; the code is baked in.

FROM python:3.11.14-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/onethreshold
ENV PATH=/opt/onethreshold/bin:$PATH
WORKDIR /build
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY dml ./dml
COPY cluster ./cluster
COPY tune ./tune
COPY serve ./serve

# PyTorch's own index has builds without CUDA, which are 3 GB smaller; a local version (+cpu) meets the same constraint.
FROM build AS build-cpu
RUN python -m pip install --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu '.[cpu,server]'

# PyPI's PyTorch brings its CUDA libraries along; the driver comes from the node.
FROM build AS build-gpu
RUN python -m pip install --constraint constraints.txt '.[gpu,server]'

FROM python:3.11.14-slim-bookworm AS base
# wget: KubeRay's own probes ask with it. libgomp1: torch and faiss. Debian keeps no older versions to pin.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libgomp1 wget \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 1000 ray && useradd --uid 1000 --gid 1000 --create-home --home-dir /home/ray ray
ENV PATH=/opt/onethreshold/bin:$PATH \
    HOME=/home/ray \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /home/ray

FROM base AS cpu
COPY --from=build-cpu /opt/onethreshold /opt/onethreshold
USER 1000:1000
CMD ["python", "-m", "cluster.doctor"]

FROM base AS gpu
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-gpu /opt/onethreshold /opt/onethreshold
USER 1000:1000
CMD ["python", "-m", "cluster.doctor"]
