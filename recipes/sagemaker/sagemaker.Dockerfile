# docker build -f recipes/kubernetes/Dockerfile -t llmkit:0.1.0 .
# docker build -f recipes/sagemaker/sagemaker.Dockerfile -t llmkit-sagemaker:0.1.0 recipes/sagemaker
FROM llmkit:0.1.0
# SageMaker runs containers as root, and reads these labels.
USER root
LABEL com.amazonaws.sagemaker.capabilities.multi-models=true
LABEL com.amazonaws.sagemaker.capabilities.accept-bind-to-port=true
COPY --chmod=755 sagemaker-entrypoint.sh /opt/llmkit/bin/sagemaker-entrypoint.sh
EXPOSE 8080
ENTRYPOINT ["/opt/llmkit/bin/sagemaker-entrypoint.sh"]
