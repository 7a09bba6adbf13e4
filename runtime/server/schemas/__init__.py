"""Request schemas: one for each route; every field is validated before anything is queued.

The responses are built in `responses/`. `prepare.py` converts requests to SamplingParams.
"""
