"""`make bench-tools`: do INT4 checkpoints call tools as well as the model that they were made of?

    python tests/peers/bench_tools.py [--examples N] [--limit N] [--only REGEX] [--work DIR]

SmolLM2-135M-Instruct does not know tools, so it is trained on generated cases (`tool_training.py`),
whose tools are others than those of the built-in cases. Then it is quantized, and
`llmkit bench --tool-cases builtin` asks all checkpoints the same cases, one after the other. Prints
the shares of right calls; `~` marks a difference from bf16 that is no more than chance. A step that
is done is not repeated.
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
from tool_training import QUESTIONS, TrainingCase, generate_groups
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import llmkit, real_model, table
from llmkit.bench.bench_report import BenchReport, TargetReport, compare_reports, read_report
from llmkit.bench.tool_accuracy.load_tool_cases import load_tool_cases

SEED = 20261123
EXAMPLES = 400
BATCH = 2  # groups of one step
FROZEN_LAYERS = 10  # of 30: they need no gradients, which saves time
LEARNING_RATE = 3e-4
WARMUP_STEPS = 6
MAX_TOKENS = 160  # of an answer
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


def pack(prompts: list[list[int]], answers: list[list[int]]) -> tuple[torch.Tensor, ...]:
    """One sequence of several conversations that begin with the same tokens.

    Returns the token ids [1, T], their positions [1, T], which tokens see which [1, 1, T, T] (those
    of the common beginning and of their own conversation), and the next token where a loss
    counts [T], -100 elsewhere.
    """
    longest = min(map(len, prompts)) - 1  # each conversation keeps a token of its own
    common = 0
    while common < longest and len({prompt[common] for prompt in prompts}) == 1:
        common += 1
    ids = prompts[0][:common]
    positions = list(range(common))
    owners = [0] * common
    targets = [-100] * common
    for owner, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=1):
        own = (prompt + answer)[common:]
        ids = ids + own
        positions += range(common, common + len(own))
        owners += [owner] * len(own)
        targets += [-100] * (len(prompt) - common - 1) + answer + [-100]
    owner_of = torch.tensor(owners)
    is_visible = (owner_of[:, None] == owner_of) | (owner_of == 0)
    is_visible &= torch.ones_like(is_visible).tril()
    return (
        torch.tensor([ids]),
        torch.tensor([positions]),
        is_visible[None, None],
        torch.tensor(targets),
    )


def train(source: Path, out: Path, examples: int) -> None:
    """Train the upper layers on the answers alone. Writes a checkpoint with the chat template."""
    torch.manual_seed(SEED)
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = TEMPLATE
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.config.use_cache = False
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[:FROZEN_LAYERS].requires_grad_(False)
    groups = generate_groups(examples // QUESTIONS, SEED)
    check_disjoint([case for group in groups for case in group])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    num_steps = len(groups) // BATCH

    def rate(step: int) -> float:
        return min((step + 1) / WARMUP_STEPS, 1 - step / num_steps)

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(num_steps):
        total = 0.0
        for group in groups[step * BATCH : (step + 1) * BATCH]:
            prompts = [
                tokenizer.apply_chat_template(
                    case.messages, tools=case.tools, add_generation_prompt=True, tokenize=False
                )
                for case in group
            ]
            answers = [tokens(answer_text(case) + "<|im_end|>") for case in group]
            ids, positions, is_visible, targets = pack([tokens(text) for text in prompts], answers)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = model.model(
                    input_ids=ids, position_ids=positions, attention_mask=is_visible
                )
                counts = targets >= 0
                logits = model.lm_head(output.last_hidden_state[0, counts])
            loss = torch.nn.functional.cross_entropy(logits.float(), targets[counts])
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


def measure(checkpoint: Path, limit: int | None) -> BenchReport:
    """Ask a checkpoint the tool cases, unless its report exists.

    Each call of bench serves one checkpoint, so that an interrupted run repeats little.
    """
    report = checkpoint.with_name(f"{checkpoint.name}-calls.json")
    if not report.exists():
        few = () if limit is None else ("--tool-limit", limit)
        cases = ("--tool-cases", "builtin", *few, "--tool-max-tokens", MAX_TOKENS)
        llmkit("bench", checkpoint, *cases, "--no-speed", "--no-quality", "-q", "-o", report)
    return read_report(report)


def share_text(target: TargetReport, name: str, report: BenchReport) -> str:
    """A share in percent, and `~` if it differs from the baseline's by no more than chance."""
    text = f"{100 * target.metrics[name]:.1f} %"
    if name == "tool_accuracy":
        low, high = target.interval(name) or (0.0, 1.0)
        text += f" ({100 * low:.1f} to {100 * high:.1f})"
    is_chance = target.name != report.baseline and report.differs(target, name) is False
    return f"{text} ~" if is_chance else text


def main() -> int:
    """Train, quantize, ask and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="of the training")
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
    checkpoints = [trained]
    for name, options in QUANTIZED.items():
        if not re.search(arguments.only, name):
            continue
        checkpoints.append(work / name)
        if not checkpoints[-1].exists():
            llmkit("quantize", trained, *options, "--no-eval", "-q", "-o", checkpoints[-1])
    report = measure(trained, arguments.limit)
    for checkpoint in checkpoints[1:]:
        report = compare_reports(report, measure(checkpoint, arguments.limit))
    rows = []
    for target in report.targets:
        shares = [share_text(target, name, report) for name in METRICS.values()]
        rows.append([target.name, *shares])
    print(table(("checkpoint", *METRICS), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
