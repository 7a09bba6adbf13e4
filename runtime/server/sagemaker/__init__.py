"""Amazon SageMaker's container contract: its health check, invocations, sessions, adapters, and
the loading of models behind a multi-model endpoint.
"""
