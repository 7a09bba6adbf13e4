"""`make bench-tools`: do INT4 checkpoints call tools as well as the model that they were made of?

    python tests/peers/bench_tools.py [--examples 320] [--limit N] [--only REGEX] [--work DIR]

SmolLM2-135M-Instruct does not know tools, so it is trained for some minutes on generated cases
(`tool_training.py`), whose tools are others than those of the built-in cases. Then it is quantized,
and `llmkit bench --tool-cases builtin` asks all checkpoints the same cases. Prints the shares of
right calls. A step that is done is not repeated.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from clients import TEMPLATE
from tool_training import TrainingCase, generate_cases
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import llmkit, real_model, table
from llmkit.bench.tool_accuracy.load_tool_cases import load_tool_cases

SEED = 20261123
BATCH = 8  # examples of one step
FROZEN_LAYERS = 12  # of 30: they need no gradients, which saves a third of the time
LEARNING_RATE = 2e-4
WARMUP_STEPS = 6
MAX_TOKENS = 96  # of an answer
CALIBRATION = ("--samples", 16, "--seq-len", 512)
# Name, options of `llmkit quantize`.
QUANTIZED: dict[str, tuple[object, ...]] = {
    "int8": ("--method", "int8", "--activations", *CALIBRATION),
    "int4-auto": ("--method", "auto", *CALIBRATION),
    "int4-gptq": ("--method", "gptq", *CALIBRATION),
    "int4-max": ("--method", "gptq", "--effort", "max", *CALIBRATION),
    "int4-rtn": ("--method", "rtn"),
    "int3-gptq": ("--method", "gptq", "--bits", "3", *CALIBRATION),
}
METRICS = {
    "right": "tool_accuracy",
    "well formed": "tool_well_formed",
    "an offered tool": "tool_name",
    "keeps the schema": "tool_schema",
    "right where a call is due": "tool_equal",
    "right where none is": "tool_no_call",
}


def answer_text(case: TrainingCase) -> str:
    """What the model writes, in the form that the chat template names."""
    if not case.calls:
        return case.text
    return "\n".join(
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
        for name, arguments in case.calls
    )


def check_disjoint(cases: list[TrainingCase]) -> None:
    """Exits when a tool or a question of the training is in the built-in cases."""
    asked = load_tool_cases(["builtin"], None)
    known = {tool["function"]["name"] for case in asked for tool in case.tools}
    known |= {message["content"] for case in asked for message in case.messages}
    for case in cases:
        own = {tool["function"]["name"] for tool in case.tools}
        own |= {message["content"] for message in case.messages if message["role"] == "user"}
        if own & known:
            raise SystemExit(f"the training knows {sorted(own & known)}")


def train(source: Path, out: Path, examples: int) -> None:
    """Train the upper layers on the answers alone. Writes a checkpoint with the chat template."""
    torch.manual_seed(SEED)
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = TEMPLATE
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.config.use_cache = False
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[:FROZEN_LAYERS].requires_grad_(False)
    cases = generate_cases(examples, SEED)
    check_disjoint(cases)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    num_steps = len(cases) // BATCH

    def rate(step: int) -> float:
        return min((step + 1) / WARMUP_STEPS, 1 - step / num_steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(num_steps):
        total = 0.0
        for case in cases[step * BATCH : (step + 1) * BATCH]:
            prompt = tokenizer.apply_chat_template(
                case.messages, tools=case.tools, add_generation_prompt=True, tokenize=False
            )
            start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            end = tokenizer(answer_text(case) + "<|im_end|>", add_special_tokens=False)["input_ids"]
            ids = torch.tensor([start + end])
            hidden = model.model(input_ids=ids).last_hidden_state[0, len(start) - 1 : -1]
            loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), torch.tensor(end))
            (loss / BATCH).backward()
            total += loss.item() / BATCH
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        print(f"step {step + 1} of {num_steps}: loss {total:.3f}", file=sys.stderr, flush=True)
    partial = out.with_name(f"{out.name}.partial")
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "chat_template.jinja").write_text(TEMPLATE)
    partial.rename(out)


def main() -> int:
    """Train, quantize, ask and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=320, help="of the training")
    parser.add_argument("--limit", type=int, help="tool cases, at most")
    parser.add_argument("--only", default=".", help="names of checkpoints, a regular expression")
    parser.add_argument("--work", type=Path, default=Path(".bench-tools"))
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(exist_ok=True)
    trained = work / "bf16"
    if not trained.exists():
        shutil.rmtree(work / "bf16.partial", ignore_errors=True)
        start = time.monotonic()
        train(real_model(work), trained, arguments.examples)
        print(f"trained in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    targets = [trained]
    for name, options in QUANTIZED.items():
        if not re.search(arguments.only, name):
            continue
        targets.append(work / name)
        if not targets[-1].exists():
            llmkit("quantize", trained, *options, "--no-eval", "-q", "-o", targets[-1])
    report = work / "report.json"
    limit = () if arguments.limit is None else ("--tool-limit", arguments.limit)
    cases = ("--tool-cases", "builtin", *limit, "--tool-max-tokens", MAX_TOKENS)
    llmkit("bench", *targets, *cases, "--no-speed", "-o", report)
    document = json.loads(report.read_text())
    rows = []
    for target in document["targets"]:
        metrics = target["metrics"]
        shares = [f"{100 * metrics[name]:.1f} %" for name in METRICS.values()]
        kl = f"{metrics['mean_kl']:.4f}" if "mean_kl" in metrics else ""
        rows.append([target["name"], *shares, kl])
    print(table(("checkpoint", *METRICS, "mean KL"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
