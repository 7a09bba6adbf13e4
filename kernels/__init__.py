"""Every hot operation: a torch reference that states the mathematics, a Triton kernel, a dispatcher.

Nothing here knows about models, requests or files; arguments are tensors and numbers.
"""
