"""The definitions of the metrics, for the head of a report."""

DEFINITIONS: dict[str, str] = {
    "TTFT": "time to first token: from sending a request to the first message that brings a token",
    "TPOT": "time per output token after the first: (e2e - TTFT) / (output tokens - 1), one figure"
    " a request",
    "ITL": "inter-token latency: the gaps between messages that bring tokens, pooled over all"
    " requests",
    "e2e": "end-to-end latency: from sending a request to its last token",
    "TTFO": "time to first output token: from sending a request to the first message that brings"
    " text or a tool call, not reasoning; over the requests with any",
    "session latency": "from the time at which a session should start to its last answer, its"
    " branches and think time included",
    "infinite cache": "a prefix cache that has all prompts sent before a request and all answers"
    " that ended before it, in full blocks of the server's size; the last prompt token is always"
    " computed",
    "throughput": "requests, output tokens, or prompt and output tokens, over the wall time from"
    " the first request sent to the last answered",
    "p50, p90, p95, p99": "percentiles over requests (ITL: over gaps), linearly interpolated"
    " between ranks",
    "goodput": "requests a second that meet every bound of --slo",
    "cache hit rate": "prompt tokens that the target took from its prefix cache, by each request's"
    " usage, over all prompt tokens",
    "acceptance": "of speculative decoding: accepted draft tokens over proposed ones, and the mean"
    " tokens that a step with drafts adds to a request, the model's own included; at a place, the"
    " share of drafts whose tokens up to there are all accepted (places count from 0); from the"
    " server's counters before and after each run",
    "repetitions": "figures are medians over repetitions of the same lengths with other text"
    " (recorded conversations: other ones, while there are any); intervals are 95 % of their mean"
    " by Student's t; targets that took turns are compared by a paired t test, others by Welch's,"
    " both at 5 %",
    "MBU": "bytes a decode step must read (weights, and keys and values of the requests in flight)"
    " over the mean TPOT, as a share of the measured bandwidth: on a CPU with compiled kernels that"
    " of reading a large weight, otherwise that of a copy, which also writes, so that reading alone"
    " may pass 100 %",
    "MFU": "operations of all tokens computed (products and attention, two for a multiplication"
    " and its addition) over the wall time, as a share of the measured rate of a large matrix"
    " product; on a CPU with compiled kernels that of their product in the cache, with inputs of"
    " the same dtype",
    "energy": "GPUs: their own counters over a run; CPU: RAPL's counters of all packages and their"
    " memory, of everything that runs on the machine. Idle power is included. A million tokens:"
    " --power, or both counters, over the wall time, divided by output tokens",
    "cost": "(--price-per-hour / --utilization + power * --price-per-kwh) over the wall time, in"
    " the prices' currency. All of it for a million output tokens, and for a million tokens of"
    " prompts and outputs (blended). Prefill's share is the requests' time until their first"
    " tokens, without the wait in the server's queue, over all their time without that wait; it is"
    " the cost of the prompt tokens, cached ones included, and the rest is the cost of the output"
    " tokens",
    "queue, KV cache": "the server's request_queue_time_seconds over a run; the largest"
    " kv_cache_usage_perc and num_requests_waiting of one sample a second (--server-metrics)",
    "client": "processor time of the load client's thread over output tokens, and over the wall"
    " time. Of --mode agentic also its work between an answer and the next request (of a turn), and"
    " how late its event loop is because of it: mean and p99 over the moments of the run",
    "memory": "host: proportional set size of the server and its children, sampled while it starts"
    " and between runs; with --offline what loading and running the model added to the resident"
    " size of the process and its children, peaks between samples included; GPU: memory in use by"
    " all processes, sampled between runs",
    "start": "from the command's start until the server is healthy, and until the first token"
    " of a prompt of 16 tokens that is sent then; stages are measured by the server, and the"
    " remaining time is the rest. Warm and cold mean that the weight files are in the page cache or"
    " not; Python and the libraries are as the system has them",
    "saturation": "of a sweep: the load with the highest output throughput; a sweep stops when"
    " throughput grows by less than 5 % and the median e2e by more than 10 %",
    "most load under the SLO": "of --mode slo: the load at which exactly --attained of the requests"
    " keep every bound, by a logistic curve over all loads that were run, and its 95 % interval;"
    " a load at which the queue grows misses the SLO",
    "knee": "of --mode slo and sweep: the load at which median e2e is farthest below the straight"
    " line from the first load to the last, both axes scaled to 1 (Kneedle)",
    "interactivity": "output tokens a second of one user: 1 / (TPOT at P90)",
    "perplexity": "exp of the mean negative log-likelihood over windows that do not overlap; a"
    " window's first token is not scored",
    "KL divergence": "KL(baseline || model) of the next token's distribution, in nats, over all"
    " positions of the windows",
    "same token": "share of positions where the most probable token is the baseline's",
    "KL divergence, at least": "when target or baseline is a server, which returns its 20 most"
    " probable tokens only: the KL divergence with all tokens that are not known on both sides"
    " merged into one. By the log sum inequality it is never above the true one. Perplexity and the"
    " same token are exact",
    "tasks": "figures of EleutherAI's lm-evaluation-harness, asked through the server; ± is 1.96"
    " standard errors",
    "tool cases": "conversations with tools, asked of the chat API with temperature 0 and tool"
    " choice auto. Right: exactly the expected calls, in any order, with accepted arguments, or no"
    " call where none is expected. Well formed: arguments are JSON objects, and no call is left in"
    " the text. Offered tools, schema, equal: of cases that expect calls, those that pass this"
    " check and the ones before it. ± is half of Wilson's 95 % interval; targets are compared by"
    " McNemar's exact test on the same cases, at 5 %",
    "quality": "models run as they are served: packed weights, serving kernels and the dtype of the"
    " KV cache",
}
