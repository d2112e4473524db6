# Images for cluster=docker and cluster=slurm. They contain only dependencies. The code is in the
# run directory, which containers mount.
#   docker build --target recipes --tag nemo-recipes:0.1.0 .
#   docker build --target engine --tag nemo-recipes-engine:0.1.0 .
# For Pyxis: enroot import dockerd://nemo-recipes:0.1.0

FROM ghcr.io/astral-sh/uv:0.9.5 AS uv

# In both images, packages of the base image stay if they fit (requirements/install_missing.py). The
# build prints packages whose version in the base image is not the pinned one. It fails if a package that
# must stay, such as torch, was replaced (`kept` prints their versions), or if an import fails.

# In this image TensorRT-LLM's transformers must stay, too. The stage evaluate_served needs lm-eval.
FROM nvcr.io/nvidia/tensorrt-llm/release:1.2.0 AS engine
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
COPY pyproject.toml /opt/nemo-recipes/
COPY requirements/engine.txt requirements/install_missing.py /opt/nemo-recipes/requirements/
RUN --mount=from=uv,source=/uv,target=/usr/local/bin/uv \
    kept() { python -c 'from importlib.metadata import version as v; print(*map(v, ["torch", "tensorrt-llm", "transformers"]))'; } \
 && before=$(kept) \
 && python /opt/nemo-recipes/requirements/install_missing.py /opt/nemo-recipes/requirements/engine.txt \
      uv pip install --no-cache --no-deps --break-system-packages --python "$(command -v python)" \
      --require-hashes --requirement \
 && [ "$(kept)" = "$before" ] \
 && useradd --create-home --uid 10001 recipes
USER 10001
RUN python -c 'import omegaconf, lm_eval.models.huggingface, lm_eval.models.openai_completions'

FROM nvcr.io/nvidia/nemo:25.11 AS recipes
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
COPY pyproject.toml /opt/nemo-recipes/
COPY requirements/stack.txt requirements/install_missing.py /opt/nemo-recipes/requirements/
RUN --mount=from=uv,source=/uv,target=/usr/local/bin/uv \
    kept() { python -c 'from importlib.metadata import version as v; print(*map(v, ["torch", "transformer-engine"]))'; } \
 && before=$(kept) \
 && python /opt/nemo-recipes/requirements/install_missing.py /opt/nemo-recipes/requirements/stack.txt \
      uv pip install --no-cache --no-deps --break-system-packages --python "$(command -v python)" \
      --require-hashes --requirement \
 && [ "$(kept)" = "$before" ] \
 && useradd --create-home --uid 10001 recipes
# docker run --user replaces this user by the caller, so that files belong to the person who starts a run.
USER 10001
RUN python -c 'import hydra, omegaconf, sys; assert sys.version_info[:2] == (3, 12)' \
 && python -c 'import megatron.core, modelopt.torch, nemo.collections.llm, transformer_engine.pytorch'
