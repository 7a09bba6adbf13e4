"""The Open Inference Protocol (KServe v2) as in Triton's vLLM backend, over HTTP and gRPC.

A request is converted to a completion request, with the same checks, engine and limits.
"""
