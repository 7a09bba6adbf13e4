"""Runs requests with the real vLLM (its CPU build) and says how long they took.

Run with the Python of an environment made from vllm.txt:

    python vllm_speed.py MODEL

It prints a line when the model is loaded. For each line of its input, a JSON object with `prompts`
(lists of token ids) and `output_tokens`, it prints the seconds until all answers are complete.
"""

import json
import os
import sys
import time

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def main() -> None:
    """Load the model, then answer requests."""
    os.environ.update(SETTINGS)
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    # Prompts differ from each other, so that its prefix cache has nothing to find.
    model = LLM(sys.argv[1], dtype="bfloat16", max_model_len=4096, skip_tokenizer_init=True)
    print("loaded", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=request["output_tokens"],
            ignore_eos=True,
            detokenize=False,
        )
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in request["prompts"]]
        start = time.perf_counter()
        answers = model.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert all(len(one.outputs[0].token_ids) == request["output_tokens"] for one in answers)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
