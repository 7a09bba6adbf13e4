"""Tensors of the models of a Triton ensemble: data types by name.

Tensors with the same name are the same tensor in all models and in the ensemble.
"""

from __future__ import annotations

from llmkit.runtime.server.kserve.kserve_tensors import INPUTS

TOKENIZER_INPUTS = {"text_input": "BYTES"}
TOKENIZER_OUTPUTS = {"input_ids": "INT64"}
GENERATOR_INPUTS = {"input_ids": "INT64", "stream": "BOOL", "sampling_parameters": "BYTES"}
# What the detokenizer needs. Triton sends it each response of a stream as a request of its own,
# without a sequence. Every response therefore has the tokens before it that matter.
DETOKENIZER_INPUTS = {
    # The last tokens of the responses before, and those of this one.
    "output_ids": "INT64",
    # [2]: where this response's text begins and ends in output_ids.
    "text_range": "INT64",
    "skip_special_tokens": "BOOL",
    "finish_reason": "BYTES",
}
GENERATOR_OUTPUTS = DETOKENIZER_INPUTS | {
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}
DETOKENIZER_OUTPUTS = {"text_output": "BYTES"}
ENSEMBLE_INPUTS = TOKENIZER_INPUTS | {
    name: data_type for name, data_type in GENERATOR_INPUTS.items() if name != "input_ids"
}
ENSEMBLE_OUTPUTS = DETOKENIZER_OUTPUTS | {
    "finish_reason": "BYTES",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}
# Inputs that clients may leave out.
OPTIONAL_INPUTS = INPUTS.keys() - {"text_input"}
