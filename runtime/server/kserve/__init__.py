"""The Open Inference Protocol (KServe v2) as Triton and its vLLM backend speak it, over HTTP and gRPC.

A request becomes the body of a completion, which is checked, run and limited like any other.
"""
