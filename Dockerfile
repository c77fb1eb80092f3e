# The pinned install on a CUDA runtime image. torch's wheels bring their own CUDA libraries; the image brings what
# the driver's container runtime expects.
#   docker build -t moa-lightning .
#   docker run --rm --gpus all --ipc=host -v "$PWD:/workspace" moa-lightning fit --config /opt/moa-lightning/configs/recipe/pama.yaml
# On a cluster, by --entrypoint (or srun's --container-image): /opt/moa-lightning/scripts/torchrun.sh. NCCL opens libibverbs
# where it is there; without it, or without --device=/dev/infiniband, it goes by sockets.
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# Ubuntu keeps only the newest build of a package, so its versions cannot be pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates ibverbs-providers libibverbs1 python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/venv

# torch first and alone, as in the Makefile: a layer of its own, rebuilt only when a pin changes.
WORKDIR /opt/moa-lightning
COPY constraints.txt ./
RUN python -m pip install -c constraints.txt "$(grep '^torch==' constraints.txt)"

COPY pyproject.toml README.md LICENSE ./
COPY configs ./configs
COPY callbacks ./callbacks
COPY moa_lightning ./moa_lightning
COPY scripts ./scripts
RUN python -m pip install -c constraints.txt '.[quant]'

# Ubuntu's image has a user with id 1000 already.
RUN useradd --create-home --uid 1001 moa && mkdir /workspace && chown moa:moa /workspace
USER 1001
WORKDIR /workspace

ENTRYPOINT ["moa"]
CMD ["--help"]
