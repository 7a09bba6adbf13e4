"""`make clients`: programs and libraries that people use, unchanged, on `llmkit serve`.

    python tests/peers/clients.py [--only REGEX] [--work DIR]

Serves SmolLM2-135M-Instruct on a CPU with a chat template that has tools, and a scripted model for
agents of several turns. Runs each client in its own environment, without a network. Prints a table
of what each did. Exit code 1 when a client fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.scripted_model import trigger
from support.server_process import wait_for
from support.thinking_model import thinking_checkpoint

from common import PEERS, ROOT, peer_python, real_model, table

MODEL = "smollm2"
REQUESTS = 4  # of a load client
# SmolLM2's own template has no tools.
TEMPLATE = """\
{%- if tools %}<|im_start|>system
You answer with function calls. The functions:
{%- for tool in tools %}
{{ tool.function | tojson }}
{%- endfor %}
Write a call as <tool_call>
{"name": NAME, "arguments": ARGUMENTS}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ "user" if message.role == "tool" else message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# A task of lm-eval: the end of a sentence, chosen by log probability and written.
FACTS = [
    ("The capital of France is", ["Paris", "Oslo"]),
    ("The opposite of hot is", ["cold", "seven"]),
    ("Two and two make", ["four", "green"]),
]
CHOICE_TASK = """\
task: choose_fact
dataset_path: json
dataset_kwargs: {{data_files: {{test: {facts}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
WRITE_TASK = """\
task: write_fact
dataset_path: json
dataset_kwargs: {{data_files: {{test: {facts}}}}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
"""


@dataclass(frozen=True)
class Setup:
    """What every client gets."""

    url: str
    scripted_url: str  # of a model that thinks and calls tools
    tokenizer: Path  # the checkpoint that is served
    work: Path


@dataclass(frozen=True)
class Client:
    """A client, and the function that runs it and says what it did."""

    distribution: str
    environment: str  # .venv-NAME
    command: str  # how a user points it at a server
    run: Callable[[Setup, Client], str]


class ClientError(Exception):
    """A client failed, or its figures show that its requests did."""


@contextlib.contextmanager
def serve(model: Path, log: Path, *options: str) -> Iterator[str]:
    """Run `llmkit serve` and yield its address when it is ready."""
    command = [sys.executable, "-m", "llmkit.cli.main", "serve", str(model)]
    command += ["--served-model-name", MODEL, *options]
    with log.open("w") as stream:
        server = subprocess.Popen(
            [*command, "--device", "cpu", "--port", "0"], stdout=stream, stderr=stream
        )
    try:
        wait_for(lambda: " is ready at " in log.read_text() or server.poll() is not None, 300)
        found = re.search(r" is ready at (\S+)", log.read_text())
        if found is None:
            raise SystemExit(f"llmkit serve did not start:\n{log.read_text()}")
        yield found[1]
    finally:
        server.terminate()
        server.wait()


def run_program(client: Client, setup: Setup, *arguments: object) -> str:
    """Run `python ARGUMENTS` in the client's environment and return its output."""
    command = [str(peer_python(client.environment)), *map(str, arguments)]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(setup.work / "huggingface"),
        "OPENAI_API_KEY": "none",
    }
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=setup.work,
        timeout=900,
    )
    (setup.work / f"{client.distribution}.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise ClientError(lines[-1] if lines else f"exit code {done.returncode}")
    return done.stdout


def call_library(setup: Setup, client: Client) -> str:
    """Run call_clients.py."""
    output = run_program(
        client,
        setup,
        PEERS / "call_clients.py",
        client.distribution,
        "--url",
        setup.url,
        "--model",
        MODEL,
    )
    return str(json.loads(output.splitlines()[-1])["done"])


def call_and_run_agent(setup: Setup, client: Client) -> str:
    """Run call_clients.py, then agent_loops.py."""
    done = call_library(setup, client)
    script = PEERS / "agent_loops.py"
    options = ("--url", setup.scripted_url, "--model", MODEL, "--prompt", trigger("agent"))
    results = ("--results", trigger("sum"), trigger("final"))
    output = run_program(client, setup, script, client.distribution, *options, *results)
    return f"{done}; {json.loads(output.splitlines()[-1])['done']}"


def run_guidellm(setup: Setup, client: Client) -> str:
    """`guidellm run` on chats and on completions."""
    for endpoint in ("/v1/chat/completions", "/v1/completions"):
        out = setup.work / "guidellm.json"
        out.unlink(missing_ok=True)
        run_program(
            client,
            setup,
            "-m",
            "guidellm",
            "run",
            "--backend",
            f"kind=openai_http,target={setup.url},model={MODEL},request_format={endpoint}",
            "--profile",
            "kind=concurrent,streams=2",
            "--constraint",
            f"kind=max_requests,count={REQUESTS}",
            "--data",
            "kind=synthetic_text,prompt_tokens=32,output_tokens=8",
            "--tokenizer",
            f"kind=huggingface_auto,model={setup.tokenizer}",
            "--output",
            f"kind=json,path={out}",
            "--disable-console-interactive",
        )
        (benchmark,) = json.loads(out.read_text())["benchmarks"]
        totals = benchmark["metrics"]["request_totals"]
        if totals["successful"] != REQUESTS or totals["errored"]:
            raise ClientError(f"{endpoint}: {totals}")
    return f"{REQUESTS} chats and {REQUESTS} completions, streamed, with their figures"


def run_lm_eval(setup: Setup, client: Client) -> str:
    """`lm_eval run` with the server's tokenizer, by log probabilities and by written answers."""
    folder = setup.work / "lm-eval"
    folder.mkdir(exist_ok=True)
    facts = folder / "facts.jsonl"
    documents = [{"question": question, "choices": choices} for question, choices in FACTS]
    facts.write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "choose.yaml").write_text(CHOICE_TASK.format(facts=facts))
    (folder / "write.yaml").write_text(WRITE_TASK.format(facts=facts))
    # lm-eval 0.4.13 itself fails with a chat template, a remote tokenizer and log probabilities.
    runs: tuple[tuple[str, str, list[str], str], ...] = (
        ("local-completions", ",tokenizer_backend=remote", [], "choose_fact,write_fact"),
        ("local-chat-completions", "", ["--apply_chat_template"], "write_fact"),
    )
    accuracy = 0.0
    for model, tokenizer, more, tasks in runs:
        endpoint = "/v1/chat/completions" if more else "/v1/completions"
        options = f"model={MODEL},base_url={setup.url}{endpoint},num_concurrent=2,max_retries=1"
        out = folder / f"results-{time.time_ns()}.json"
        run_program(
            client,
            setup,
            "-m",
            "lm_eval",
            "run",
            "--model",
            model,
            "--model_args",
            options + tokenizer,
            "--tasks",
            tasks,
            "--include_path",
            folder,
            "--output_path",
            out,
            *more,
        )
        (written,) = folder.glob(f"{out.stem}*.json")
        results: dict[str, Any] = json.loads(written.read_text())["results"]
        if sorted(results) != sorted(tasks.split(",")):
            raise ClientError(f"results of {sorted(results)} only")
        if "choose_fact" in results:
            accuracy = results["choose_fact"]["acc,none"]
    if accuracy < 1:
        raise ClientError(f"the accuracy of three simple facts is {accuracy}")
    return "log probabilities and answers with the server's tokenizer, answers to chats"


def run_vllm_bench(setup: Setup, client: Client) -> str:
    """`vllm bench serve` on chats and on completions."""
    program = peer_python(client.environment).with_name("vllm")
    for backend, endpoint in (
        ("openai", "/v1/completions"),
        ("openai-chat", "/v1/chat/completions"),
    ):
        run_program(
            client,
            setup,
            program,
            "bench",
            "serve",
            "--backend",
            backend,
            "--base-url",
            setup.url,
            "--endpoint",
            endpoint,
            "--model",
            MODEL,
            "--tokenizer",
            setup.tokenizer,
            "--dataset-name",
            "random",
            "--random-input-len",
            "32",
            "--random-output-len",
            "8",
            "--num-prompts",
            REQUESTS,
            "--ignore-eos",
            "--save-result",
            "--result-dir",
            setup.work,
            "--result-filename",
            "vllm.json",
        )
        figures = json.loads((setup.work / "vllm.json").read_text())
        if (figures["completed"], figures["total_output_tokens"]) != (REQUESTS, 8 * REQUESTS):
            raise ClientError(f"{endpoint}: {figures['completed']} requests completed")
    return f"{REQUESTS} completions and {REQUESTS} chats, streamed, with their figures"


CLIENTS = [
    Client(
        "guidellm",
        "loadclients",
        "guidellm run --backend kind=openai_http,target=URL,request_format=/v1/chat/completions",
        run_guidellm,
    ),
    Client("openai-agents", "clients", 'AsyncOpenAI(base_url="URL/v1")', call_and_run_agent),
    Client("litellm", "loadclients", 'completion("openai/NAME", api_base="URL/v1")', call_library),
    Client("langchain", "clients", 'ChatOpenAI(base_url="URL/v1")', call_library),
    Client("pydantic-ai", "clients", 'OpenAIProvider(base_url="URL/v1")', call_and_run_agent),
    Client(
        "lm-eval",
        "loadclients",
        "lm_eval run --model local-completions --model_args "
        "base_url=URL/v1/completions,tokenizer_backend=remote",
        run_lm_eval,
    ),
    Client(
        "vllm",
        "vllm",
        "vllm bench serve --backend openai-chat --base-url URL --endpoint /v1/chat/completions",
        run_vllm_bench,
    ),
]
# The distribution that talks to the server, where its name is another one.
DISTRIBUTIONS = {"langchain": "langchain-openai", "pydantic-ai": "pydantic-ai-slim"}


def version(client: Client) -> str:
    """The installed version of the client, with the name of the distribution if it differs."""
    name = DISTRIBUTIONS.get(client.distribution, client.distribution)
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    command = [str(peer_python(client.environment)), "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    prefix = "" if name == client.distribution else f"{name} "
    return prefix + done.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="a regular expression of clients")
    parser.add_argument("--work", type=Path, default=ROOT / ".clients", help="default: .clients")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    model = real_model(work)
    template = work / "tools.jinja"
    template.write_text(TEMPLATE)
    rows = []
    failed = False
    shutil.rmtree(work / "thinking", ignore_errors=True)
    scripted = thinking_checkpoint(work / "thinking")
    with (
        serve(model, work / "server.log", "--chat-template", str(template)) as url,
        serve(scripted, work / "scripted.log", "--kv-cache-memory", "64MiB") as scripted_url,
    ):
        setup = Setup(url, scripted_url, model, work)
        for client in CLIENTS:
            if not re.search(arguments.only, client.distribution):
                continue
            try:
                done = client.run(setup, client)
                result = f"works: {done}"
            except (ClientError, subprocess.TimeoutExpired) as error:
                result = "fails: " + str(error)[:300].replace("|", "/").replace("\n", " ")
                failed = True
            rows.append((client.distribution, version(client), f"`{client.command}`", result))
            print(f"{client.distribution} {result}", file=sys.stderr, flush=True)
    print(table(("client", "version", "command", "result"), rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
