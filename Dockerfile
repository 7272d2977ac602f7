# Images of kanserve. `cpu` and `cuda` serve, `export` exports:
#   docker build --target cpu --tag kanserve:cpu .
#   docker run --read-only --cap-drop all -v ./models:/models:ro -p 8001:8001 kanserve:cpu
# Each is the base image with one virtual environment in /opt/kanserve, of the files whose hashes are
# in locks/ (`make lock`), which are of the versions that constraints.txt pins. What built it (a compiler, pip and its cache) stays in stages of its own.

# CUDA comes with the environment, too, so every target has the same base. `make pin-images`
# renews its digest.
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

# The package as a wheel, with the operator's library in it.
FROM ${PYTHON_IMAGE} AS wheel
# Debian keeps only the newest version of a package, and the compiler reaches no image.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY locks locks
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv tools \
    && tools/bin/pip install --no-deps --require-hashes --requirement locks/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY export export
COPY kan_bundle kan_bundle
COPY kan_model kan_model
COPY kan_ops kan_ops
COPY protos protos
COPY serving serving
RUN tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir wheels .

# cryptography verifies signatures; the rest of the extra `signing` makes them. `-m kan_ops` fails
# without the library, where the package's build would have gone on (-P: not the sources here).
FROM wheel AS cpu-environment
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --without-pip /opt/kanserve \
    && tools/bin/pip --python /opt/kanserve/bin/python install \
        --no-deps --require-hashes --requirement locks/cpu.txt \
    && tools/bin/pip --python /opt/kanserve/bin/python install --no-deps --no-index wheels/*.whl \
    && /opt/kanserve/bin/python -P -m kan_ops

FROM wheel AS cuda-environment
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --without-pip /opt/kanserve \
    && tools/bin/pip --python /opt/kanserve/bin/python install \
        --no-deps --require-hashes --requirement locks/cuda.txt \
    && tools/bin/pip --python /opt/kanserve/bin/python install --no-deps --no-index wheels/*.whl

FROM wheel AS export-environment
# The index that has torch for CPUs alone, as torch's own installation page gives it: elsewhere
# torch brings CUDA along, several GB that an export has no use for. Torch alone comes from it, and
# from nowhere else: with an index beside another, either could offer any package of the other.
ARG TORCH_INDEX=
COPY constraints.txt .
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --without-pip /opt/kanserve \
    && tools/bin/pip --python /opt/kanserve/bin/python install \
        --no-deps --require-hashes --requirement locks/export.txt \
    && tools/bin/pip --python /opt/kanserve/bin/python install --constraint constraints.txt \
        ${TORCH_INDEX:+--no-deps --index-url "${TORCH_INDEX}"} torch \
    && tools/bin/pip --python /opt/kanserve/bin/python install --no-deps --no-index wheels/*.whl \
    && /opt/kanserve/bin/python -P -m kan_ops

FROM ${PYTHON_IMAGE} AS base
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="kanserve" \
      org.opencontainers.image.description="Trained efficient-KAN models, exported with proven parity, served over gRPC" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}"
# Numbers, because who mounts a folder or forbids root has to name them.
RUN groupadd --gid 10001 kanserve \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /tmp \
        --shell /usr/sbin/nologin kanserve
# The root may be read-only: what is ever written goes to /tmp. onnxruntime sends nothing home, and
# keeps no database for it, also while the image is built.
ENV PATH=/opt/kanserve/bin:${PATH} \
    HOME=/tmp \
    TMPDIR=/tmp \
    ORT_DISABLE_TELEMETRY=1

# No init: the server takes SIGTERM as process 1, and leaves no child behind.
FROM base AS server
ENV KANSERVE_HOST=0.0.0.0 \
    KANSERVE_MODEL_REPOSITORY=/models
EXPOSE 8001 8002
# Readiness. With TLS it needs KANSERVE_HEALTH_PORT, or a command of its own with --ca.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["sh", "-c", "exec kan-client health --address 127.0.0.1:${KANSERVE_HEALTH_PORT:-${KANSERVE_GRPC_PORT:-8001}}"]
ENTRYPOINT ["kan-serve"]

FROM server AS cpu
COPY --from=cpu-environment /opt/kanserve /opt/kanserve
# Python's own modules come without bytecode in its image, and nobody could write it later: what
# is imported at every start and every probe would be compiled each time.
RUN python -c "import serving.supervisor.server, serving.supervisor.preload, serving.client.health"
USER 10001:10001
ARG REVISION=
LABEL org.opencontainers.image.revision="${REVISION}"

# Needs NVIDIA's container toolkit, and a driver for CUDA 13.
FROM server AS cuda
ENV KANSERVE_PROVIDER=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=cuda-environment /opt/kanserve /opt/kanserve
RUN python -c "import serving.supervisor.server, serving.supervisor.preload, serving.client.health"
USER 10001:10001
ARG REVISION=
LABEL org.opencontainers.image.revision="${REVISION}"

# docker run --user "$(id -u):$(id -g)" -v .:/work kanserve:export model.pt
FROM base AS export
COPY --from=export-environment /opt/kanserve /opt/kanserve
RUN python -c "import export.__main__, export.api"
WORKDIR /work
USER 10001:10001
ARG REVISION=
LABEL org.opencontainers.image.revision="${REVISION}"
# Not `python -m export`: what lies in the mounted folder would come before what is installed.
ENTRYPOINT ["kan-export"]
