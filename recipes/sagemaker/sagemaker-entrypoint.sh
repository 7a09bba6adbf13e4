#!/bin/sh
# What SageMaker starts: it runs the image as `docker run IMAGE serve`.
# Options of `llmkit serve` are variables of the container, such as LLMKIT_SERVE_MAX_MODEL_LEN=8192.
set -eu
if [ "${1:-}" != serve ]; then
    exec llmkit "$@"
fi
shift
export LLMKIT_SERVE_HOST="${LLMKIT_SERVE_HOST:-0.0.0.0}"
export LLMKIT_SERVE_PORT="${SAGEMAKER_BIND_TO_PORT:-8080}"
# SageMaker kills a container 30 seconds after SIGTERM.
export LLMKIT_SERVE_DRAIN_TIMEOUT="${LLMKIT_SERVE_DRAIN_TIMEOUT:-25}"
# The folders to which SageMaker copies models; HF_MODEL_ID is a model of the Hugging Face hub.
if [ "${SAGEMAKER_MULTI_MODEL:-}" = true ]; then
    exec llmkit serve "${SAGEMAKER_MODELS_PATH:-/opt/ml/models}" --sagemaker multi-model "$@"
fi
exec llmkit serve "${HF_MODEL_ID:-/opt/ml/model}" --sagemaker single-model "$@"
