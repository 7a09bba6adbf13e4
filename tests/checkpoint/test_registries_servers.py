"""Pushes to and pulls from real server processes: S3 (moto), a GCS emulator, MLflow."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.hub_server import Hub
from support.moto_server import moto_server
from support.server_process import serving, wait_for
from support.synthetic_checkpoint import LLAMA, synthetic_checkpoint
from support.tiny_models import tiny_checkpoint

from llmkit.checkpoint.manifest import MANIFEST
from llmkit.checkpoint.open_model_files import resolve_model
from llmkit.checkpoint.registry import local_copies
from llmkit.checkpoint.registry import object_store as objects
from llmkit.checkpoint.registry.object_store import PART_BYTES
from llmkit.checkpoint.registry.transfer import pull, push
from llmkit.cli import main
from llmkit.common.errors import InputError, OutputError, ShortageError
from llmkit.common.progress import SilentProgress

pytestmark = pytest.mark.scale
ROOT = Path(__file__).parents[2]
QUIET = SilentProgress()
BUCKET = "s3://models"
WEIGHTS = "model.safetensors"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return bool(answer.status == 200)
    return False


@contextlib.contextmanager
def running(log: Path, *command: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **environ},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


@pytest.fixture(scope="module")
def environ() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            objects, "NUM_STREAMS", 2
        )  # so that less than 100 MB is more than is in flight
        yield patch


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory, environ: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of the server, whose address and credentials are in the environment, as they are for
    everybody.
    """
    s3fs = pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with moto_server(tmp_path_factory.mktemp("s3") / "log") as variables:
        for name, value in variables.items():
            environ.setenv(name, value)
        files = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        files.mkdir("models")
        yield files


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, environ: pytest.MonkeyPatch) -> Path:
    """A checkpoint with a manifest, whose weights are more pieces than are in flight at once."""
    root = tmp_path_factory.mktemp("large")
    (root / "plain").mkdir()
    (root / "plain" / "config.json").write_text(json.dumps(LLAMA))
    count = 3 * PART_BYTES + 12345
    data = torch.randint(
        0, 255, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    save_file({"weight": data}, root / "plain" / WEIGHTS)
    push(root / "plain", str(root / "large"), QUIET)
    return root / "large"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small")
    push(synthetic_checkpoint(root / "plain"), str(root / "small"), QUIET)
    return root / "small"


class Counting(SilentProgress):
    """Bytes by stage; stops after `stop` of them, as Ctrl-C does."""

    def __init__(self, stop: int | None = None) -> None:
        self.stages: dict[str, int] = {}
        self._stage = ""
        self._stop = stop

    def start(self, stage: str, total: int, unit: str) -> None:
        self._stage = stage
        self.stages[stage] = 0

    def advance(self, n: int = 1, note: str = "") -> None:
        self.stages[self._stage] += n
        if self._stop is not None and self.stages[self._stage] >= self._stop:
            raise KeyboardInterrupt


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_push_and_pull_keep_every_byte(
    s3: Any, large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["push", str(large), f"{BUCKET}/there", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == 3
    head = s3.call_s3(
        "head_object", Bucket="models", Key=f"there/{WEIGHTS}", ChecksumMode="ENABLED"
    )
    assert head["ChecksumSHA256"]  # of its parts; compared with ours before the push was over
    assert main.run(["pull", f"{BUCKET}/there", "-o", str(tmp_path / "out"), "--json"]) == 0
    assert contents(tmp_path / "out") == contents(large)
    again = Counting()
    assert push(large, f"{BUCKET}/there", again).already_there
    assert again.stages.get("send") is None  # all of it is there
    captured = capsys.readouterr()
    assert "hidden" not in captured.out + captured.err


def test_push_over_another_checkpoint_is_refused_or_forced(
    s3: Any, small: Path, large: Path, tmp_path: Path
) -> None:
    target = f"{BUCKET}/over"
    push(large, target, QUIET)
    s3.pipe_file("models/over/notes.txt", b"somebody's")
    with pytest.raises(OutputError, match=r"holds another checkpoint.*--force"):
        push(small, target, QUIET)
    push(small, target, QUIET, force=True)
    pull(target, tmp_path / "out", QUIET)
    assert contents(tmp_path / "out") == contents(small)
    assert s3.cat_file("models/over/notes.txt") == b"somebody's"
    s3.rm_file(f"models/over/{MANIFEST}")
    with pytest.raises(OutputError, match="is another file than"):  # no checkpoint, but something
        push(large, target, QUIET)


def test_push_interrupted_is_no_checkpoint_and_is_continued(
    s3: Any, small: Path, large: Path, tmp_path: Path
) -> None:
    target = f"{BUCKET}/stopped"
    both = shutil.copytree(large, tmp_path / "both")
    shutil.copy(small / WEIGHTS, both / "a.safetensors")
    (both / MANIFEST).unlink()
    with pytest.raises(KeyboardInterrupt):
        push(both, target, Counting(stop=(small / WEIGHTS).stat().st_size + 2 * PART_BYTES))
    assert (
        s3.call_s3("list_multipart_uploads", Bucket="models").get("Uploads", []) == []
    )  # none is left to be paid for
    with pytest.raises(InputError, match=r"has no llmkit.json; it holds a.safetensors"):
        pull(target, tmp_path / "out", QUIET)
    rest = Counting()
    push(both, target, rest)
    assert rest.stages["compare"] > 0
    assert rest.stages["send"] < (both / WEIGHTS).stat().st_size + (small / WEIGHTS).stat().st_size
    pull(target, tmp_path / "out", QUIET)
    assert {
        name: digest for name, digest in contents(tmp_path / "out").items() if name != MANIFEST
    } == {name: digest for name, digest in contents(both).items() if name != MANIFEST}


def test_pull_interrupted_is_continued(s3: Any, large: Path, tmp_path: Path) -> None:
    target = f"{BUCKET}/cut"
    out = tmp_path / "out"
    push(large, target, QUIET)
    with pytest.raises(KeyboardInterrupt):
        pull(target, out, Counting(stop=2 * PART_BYTES))
    kept = (tmp_path / "out.partial" / WEIGHTS).stat().st_size
    assert kept >= PART_BYTES
    # What is there is not asked for again: the server's first bytes may be lost now.
    data = (large / WEIGHTS).read_bytes()
    s3.pipe_file(f"models/cut/{WEIGHTS}", b"\0" * kept + data[kept:])
    pull(target, out, QUIET)
    assert contents(out) == contents(large)


def test_pull_refuses_damage_on_the_server(s3: Any, large: Path, tmp_path: Path) -> None:
    target = f"{BUCKET}/damaged"
    data = (large / WEIGHTS).read_bytes()
    out = tmp_path / "out"
    push(large, target, QUIET)
    s3.pipe_file("models/damaged/evil.py", b"raise SystemExit")
    for damaged, message in (
        (data[:-1], "has .* bytes, llmkit.json says"),
        (data + b"!", "has .* bytes, llmkit.json says"),
        (data[:-1] + bytes([data[-1] ^ 1]), "has SHA-256"),
        (None, "is absent"),
    ):
        if damaged is None:
            s3.rm_file(f"models/damaged/{WEIGHTS}")
        else:
            s3.pipe_file(f"models/damaged/{WEIGHTS}", damaged)
        with pytest.raises(InputError, match=message):
            pull(target, out, QUIET)
        assert not out.exists()
    push(large, target, QUIET)  # the same manifest: what is missing is put right
    assert pull(target, out, QUIET).left_out == ["evil.py"]
    assert contents(out) == contents(large)


def test_pull_names_what_is_missing(
    s3: Any, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["pull", f"{BUCKET}/nothing", "-o", str(tmp_path / "out")]) == 3
    assert "s3://models/nothing does not exist" in capsys.readouterr().err
    assert main.run(["pull", "s3://no-such-bucket/x", "-o", str(tmp_path / "out")]) == 3
    assert main.run(["push", str(small), "s3://no-such-bucket/x"]) in (3, 4)


def test_pull_without_a_server_is_a_shortage(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ShortageError, match=r"could not be reached.*AWS_PROFILE"):
        pull(f"{BUCKET}/there", tmp_path / "out", QUIET)


@contextlib.contextmanager
def cutting(port: int, cuts: int) -> Iterator[int]:
    """A proxy that ends the first `cuts` answers of over a megabyte in their middle; its port."""
    left = [cuts]

    def forward(source: socket.socket, sink: socket.socket, answers: bool) -> None:
        count = 0
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                sink.sendall(data)
                count += len(data)
                if answers and count > 2**20 and left[0] > 0:
                    left[0] -= 1
                    break
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", port))
                for arguments in ((client, server, False), (server, client, True)):
                    threading.Thread(target=forward, args=arguments, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield int(listener.getsockname()[1])
        assert left[0] == 0
        listener.shutdown(socket.SHUT_RDWR)


def test_pull_retries_broken_answers(
    s3: Any, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(large, f"{BUCKET}/flaky", QUIET)
    port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    with cutting(port, cuts=3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy}")
        pull(f"{BUCKET}/flaky", tmp_path / "out", QUIET)
    assert contents(tmp_path / "out") == contents(large)


def test_url_is_a_model_and_is_downloaded_once(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(local_copies, "_copies", {})
    reference = f"{BUCKET}/tiny"
    push(tiny_checkpoint(tmp_path / "plain"), reference, QUIET)
    path = resolve_model(reference)
    assert path.parent == tmp_path / "cache" / "llmkit" / "checkpoints"
    stamps = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    local_copies._copies.clear()
    assert main.run(["inspect", reference, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["architecture"] == "LlamaForCausalLM"
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == stamps
    with (
        serving(tmp_path / "log", reference, served_model_name="tiny") as server,
        server.client() as client,
    ):  # type: ignore[arg-type]
        body = {"model": "tiny", "prompt": "the quick", "max_tokens": 3}
        assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 3
        named = client.post("/v1/completions", json={**body, "model": reference})
        assert named.status_code == 404  # nothing is fetched because a request says so


@pytest.fixture(scope="module")
def gs(tmp_path_factory: pytest.TempPathFactory, environ: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("gcsfs")
    pytest.importorskip("gcp_storage_emulator")
    port = free_port()
    command = (
        "from gcp_storage_emulator.__main__ import main;"
        " main(['start', '--host', '127.0.0.1', '--port', "
        f"'{port}', '--in-memory', '--default-bucket', 'models'])"
    )
    with running(tmp_path_factory.mktemp("gs") / "log", sys.executable, "-c", command):
        environ.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/storage/v1/b/models"))
        yield "gs://models"


def test_push_and_pull_with_google_cloud_storage(
    gs: str, small: Path, large: Path, tmp_path: Path
) -> None:
    push(large, f"{gs}/there", QUIET)
    pull(f"{gs}/there", tmp_path / "out", QUIET)
    assert contents(tmp_path / "out") == contents(large)
    with pytest.raises(OutputError, match="holds another checkpoint"):
        push(small, f"{gs}/there", QUIET)
    push(small, f"{gs}/there", QUIET, force=True)
    pull(f"{gs}/there", tmp_path / "small", QUIET)
    assert contents(tmp_path / "small") == contents(small)


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory, environ: pytest.MonkeyPatch) -> Iterator[Any]:
    """The client, of a server that has its own environment: it needs other versions than llmkit."""
    pytest.importorskip("mlflow")
    program = ROOT / ".venv-mlflow" / "bin" / "mlflow"
    if not program.exists():
        pytest.skip("make test-scale makes .venv-mlflow")
    folder = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    with running(
        folder / "log",
        str(program),
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        "--backend-store-uri",
        f"sqlite:///{folder}/db",
        "--artifacts-destination",
        str(folder / "artifacts"),
        MLFLOW_DISABLE_TELEMETRY="true",
    ):
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/health"), 120)
        environ.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        from mlflow import MlflowClient

        client = MlflowClient()
        client.folder = folder / "artifacts"
        yield client


def test_push_and_pull_with_mlflow(
    mlflow: Any, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["push", str(small), "models:/tiny@champion", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target"] == "models:/tiny/1"
    version = mlflow.get_model_version_by_alias("tiny", "champion")
    for reference in ("models:/tiny/1", "models:/tiny@champion", version.source):
        out = tmp_path / hashlib.sha256(reference.encode()).hexdigest()
        pull(reference, out, QUIET)
        assert contents(out) == contents(small)
    assert (
        push(small, "models:/tiny", QUIET).target == "models:/tiny/2"
    )  # a version of its own each time
    (weights,) = [path for path in mlflow.folder.rglob(WEIGHTS) if version.run_id in str(path)]
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match="has SHA-256"):
        pull("models:/tiny/1", tmp_path / "out", QUIET)
    weights.write_bytes(data[:-1])
    with pytest.raises(InputError, match=r"bytes, llmkit\.json says"):
        pull("models:/tiny/1", tmp_path / "out", QUIET)
    weights.unlink()
    with pytest.raises(InputError, match="is absent"):
        pull("models:/tiny/1", tmp_path / "out", QUIET)
    assert not (tmp_path / "out").exists()
    for wrong in ("models:/tiny/7", "models:/none/1", "runs:/" + "0" * 32 + "/checkpoint"):
        assert main.run(["pull", wrong, "-o", str(tmp_path / "out")]) in (3, 4)
    assert main.run(["push", str(small), "models:/tiny/3"]) == 2


def test_push_and_pull_with_the_hub(small: Path, tmp_path: Path) -> None:
    """In processes of their own: the hub's client reads its settings when it is imported."""
    hub = Hub()
    environ = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_hidden", "HF_HUB_OFFLINE": "0"}
    environ |= {
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
    }

    def llmkit(code: int, *words: object) -> str:
        command = [sys.executable, "-m", "llmkit.cli.main", *map(str, words)]
        done = subprocess.run(
            command, env=environ, capture_output=True, text=True, check=False, timeout=100
        )
        assert done.returncode == code, done.stderr
        assert "hidden" not in done.stdout + done.stderr
        return done.stdout + done.stderr

    there = "hf://organization/model"
    llmkit(0, "push", small, there)
    assert (hub.commits, hub.private) == (1, True)  # one commit, so that nobody sees half of it
    assert hub.files == {path.name: path.read_bytes() for path in small.iterdir()}
    assert "already there" in llmkit(0, "push", small, there)
    assert hub.commits == 1
    llmkit(0, "pull", there, "-o", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(small)
    other = synthetic_checkpoint(tmp_path / "other", seed=1)
    assert "holds another checkpoint" in llmkit(5, "push", other, there)
    llmkit(0, "push", other, there, "--force")
    assert hub.files[WEIGHTS] == (other / WEIGHTS).read_bytes()
    hub.entry = lambda path: (
        Hub.entry(hub, path) | {"lfs": {"oid": "0" * 64, "size": 1, "pointerSize": 1}}
    )  # type: ignore[method-assign]
    assert "is not what was sent" in llmkit(4, "push", small, there, "--force")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mine, theirs: private keys, with .pub beside them; mine.locked needs a password."""
    pytest.importorskip("model_signing")
    from cryptography.hazmat.primitives import serialization as to
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("keys")
    for name in ("mine", "theirs"):
        key = ec.generate_private_key(ec.SECP256R1())
        (folder / name).write_bytes(
            key.private_bytes(to.Encoding.PEM, to.PrivateFormat.PKCS8, to.NoEncryption())
        )
        (folder / f"{name}.locked").write_bytes(
            key.private_bytes(
                to.Encoding.PEM, to.PrivateFormat.PKCS8, to.BestAvailableEncryption(b"hidden")
            )
        )
        public = key.public_key().public_bytes(
            to.Encoding.PEM, to.PublicFormat.SubjectPublicKeyInfo
        )
        (folder / f"{name}.pub").write_bytes(public)
    return folder


def test_sign_push_pull_verify(
    s3: Any, keys: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signed = Path(shutil.copytree(small, tmp_path / "signed"))
    (signed / "notes.md").write_text("not in the manifest")
    assert main.run(["sign", str(signed), "--key", str(keys / "mine")]) == 0
    assert main.run(["push", str(signed), f"{BUCKET}/signed"]) == 0
    capsys.readouterr()
    public = str(keys / "mine.pub")
    theirs = str(keys / "theirs.pub")
    words = ["pull", f"{BUCKET}/signed", "-o", str(tmp_path / "out"), "--public-key"]
    assert main.run([*words, theirs]) == 3
    assert "is not what the owner of" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["signed"]
    assert main.run([*words, public, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["signature"] == "valid"
    assert main.run(["verify", str(tmp_path / "out"), "--public-key", public]) == 0
    signature = str(tmp_path / "out" / "model.sig")
    own = [
        sys.executable,
        "-m",
        "model_signing",
        "verify",
        "key",
        str(tmp_path / "out"),
        "--signature",
        signature,
        "--public_key",
        public,
        "--ignore-paths",
        signature,
    ]
    done = subprocess.run(own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr  # the library's own program takes it
    # Who can write to the bucket can make a manifest that fits, and no signature.
    forged = Path(shutil.copytree(small.parent / "plain", tmp_path / "forged"))
    config = json.loads((forged / "config.json").read_text())
    (forged / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    shutil.copy(signed / "model.sig", forged)
    push(forged, f"{BUCKET}/signed", QUIET, force=True)
    words[3] = str(tmp_path / "again")
    assert main.run(words[:4]) == 0  # nobody asked
    shutil.rmtree(tmp_path / "again")
    assert main.run([*words, public]) == 3
    push(small, f"{BUCKET}/signed", QUIET, force=True)
    capsys.readouterr()
    assert main.run([*words, public]) == 3
    assert "has no model.sig" in capsys.readouterr().err  # the old one has gone with its checkpoint
    assert not (tmp_path / "again").exists()


def test_verify_refuses_what_is_not_signed(
    keys: Path,
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "copy"))
    for key in ("mine.pub", "none", "mine.locked"):
        assert main.run(["sign", str(copy), "--key", str(keys / key)]) == 3
        assert f"{keys / key} is not a readable private key" in capsys.readouterr().err
    monkeypatch.setenv("LLMKIT_KEY_PASSWORD", "hidden")
    assert main.run(["sign", str(copy), "--key", str(keys / "mine.locked")]) == 0
    monkeypatch.delenv("LLMKIT_KEY_PASSWORD")
    assert main.run(["verify", str(copy), "--public-key", str(keys / "mine.pub")]) == 0
    assert main.run(["verify", str(copy), "--public-key", str(keys / "mine")]) == 3
    shown = capsys.readouterr()
    assert "is not a readable public key" in shown.err and "hidden" not in shown.err + shown.out
    (copy / "model.sig").unlink()
    os.truncate(copy / WEIGHTS, 100)
    assert main.run(["sign", str(copy), "--key", str(keys / "mine")]) == 3
    assert not (copy / "model.sig").exists()
