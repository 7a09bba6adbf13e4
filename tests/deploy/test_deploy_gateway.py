"""`llmkit deploy gateway`: the weights of a Gateway API HTTPRoute."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.kubernetes_manifests import FOLDER

from llmkit.cli.main import run

HAND_WRITTEN = """\
# Ours.
kind: ConfigMap
apiVersion: v1
metadata: {name: other}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: chat, labels: {weight: "7"}}  # kept
spec:
  parentRefs: [{name: front}]
  rules:
    - matches: [{path: {value: /v1}}]
      backendRefs:
        - name: 'chat-a'  # the old one
          weight: 3
          port: 80

        - {weight: 1, name: chat-b, port: 80}
    - matches: [{path: {value: /admin}}]
      backendRefs: [{name: admin, port: 80}]
---
kind: HTTPRoute
metadata: {name: other}
"""


def gateway(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    """Run the command. Returns its JSON, or its message for an error."""
    assert run(["deploy", "gateway", *words, "--json"]) == code
    printed = capsys.readouterr()
    return printed.err if code else json.loads(printed.out)


def backends(path: Path) -> list[tuple[str, int]]:
    (route,) = (
        one for one in yaml.safe_load_all(path.read_text()) if one["metadata"]["name"] == "chat"
    )
    return [
        (backend["name"], backend["weight"]) for backend in route["spec"]["rules"][0]["backendRefs"]
    ]


def test_gateway_rollout_from_one_percent_to_the_next_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "route.yaml"
    words = ("chat", "-o", str(path))
    assert gateway(capsys, *words)["shares"] == {"chat": 1.0, "chat-next": 0.0}
    assert backends(path) == [("chat", 10_000), ("chat-next", 0)]
    steps: list[tuple[tuple[str, ...], list[tuple[str, int]]]] = [
        (("--share", "1%"), [("chat", 9900), ("chat-next", 100)]),
        (("--share", "33.33%"), [("chat", 6667), ("chat-next", 3333)]),
        (("--rollback",), [("chat", 10_000), ("chat-next", 0)]),
        (("--promote",), [("chat", 0), ("chat-next", 10_000)]),
        # Blue/green: the other Service is the next version.
        (("--next", "chat", "--share", "5%"), [("chat-next", 9500), ("chat", 500)]),
        (("--next", "chat"), [("chat-next", 9500), ("chat", 500)]),
        (("--promote",), [("chat-next", 0), ("chat", 10_000)]),
        (("--next", "chat-3"), [("chat", 10_000), ("chat-3", 0)]),
    ]
    for options, expected in steps:
        result = gateway(capsys, *words, *options)
        assert backends(path) == expected, options
        assert [result["old"], result["new"]] == [name for name, _ in expected]
        assert result["shares"] == {name: weight / 10_000 for name, weight in expected}


def test_gateway_keeps_the_text_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "route.yaml"
    path.write_text(HAND_WRITTEN)
    assert gateway(capsys, "chat", "-o", str(path))["shares"] == {"chat-a": 0.75, "chat-b": 0.25}
    gateway(capsys, "chat", "-o", str(path), "--share", "0.5%")
    expected = HAND_WRITTEN.replace("'chat-a'", "chat-a")
    expected = expected.replace("weight: 3", "weight: 9950").replace("weight: 1,", "weight: 50,")
    assert path.read_text() == expected


def test_gateway_writes_a_mirror(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "route.yaml"
    gateway(capsys, "chat", "-o", str(path), "--mirror", "20", "--gateway", "front", "--port", "81")
    spec = yaml.safe_load(path.read_text())["spec"]
    assert spec["parentRefs"] == [{"name": "front"}]
    (rule,) = spec["rules"]
    mirror = {"backendRef": {"name": "chat-next", "port": 81}, "percent": 20}
    assert rule["filters"] == [{"type": "RequestMirror", "requestMirror": mirror}]
    assert rule["timeouts"] == {"request": "0s"}, "streams may take long"


def test_mirror_to_the_version_that_answers_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["deploy", "gateway", "chat", "-o", str(tmp_path / "route.yaml")]
    assert run([*words, "--mirror", "20"]) == 0
    assert "RequestMirror" not in capsys.readouterr().err
    assert run([*words, "--promote"]) == 0
    note = "RequestMirror copies requests to chat-next, which answers clients now"
    assert note in capsys.readouterr().err


def test_rules_may_have_the_same_services_by_an_alias(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "route.yaml"
    content = changed("      backendRefs:\n", "      backendRefs: &both\n")
    path.write_text(content.replace("[{name: admin, port: 80}]", "*both"))
    gateway(capsys, "chat", "-o", str(path), "--share", "0.5%")
    assert backends(path) == [("chat-a", 9950), ("chat-b", 50)]
    assert path.read_text().count("weight: 9950") == 1


def test_full_disk_keeps_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "route.yaml"
    path.write_text(HAND_WRITTEN)

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    message = gateway(capsys, "chat", "-o", str(path), "--share", "0.5%", code=4)
    assert "The disk is full" in message
    assert path.read_text() == HAND_WRITTEN and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
def test_gateway_component_has_two_versions_behind_the_route(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "kubernetes")
    (folder / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        "resources: [base]\ncomponents: [components/gateway]\n"
    )
    route_file = folder / "components/gateway/httproute.yaml"
    assert run(["deploy", "gateway", "llmkit", "-o", str(route_file), "--share", "1%"]) == 0
    found: dict[tuple[str, str], Any] = {}
    for part in (folder, folder / "next"):
        made = subprocess.run(["kubectl", "kustomize", part], capture_output=True, check=True)
        for one in yaml.safe_load_all(made.stdout):
            key = (one["kind"], one["metadata"]["name"])
            assert key not in found, "both versions are applied beside each other"
            found[key] = one
    route = found["HTTPRoute", "llmkit"]["spec"]
    assert ("Gateway", route["parentRefs"][0]["name"]) in found
    weights = {}
    for backend in route["rules"][0]["backendRefs"]:
        service = found["Service", backend["name"]]["spec"]
        assert backend["port"] == service["ports"][0]["port"]
        deployment = found["Deployment", backend["name"]]["spec"]
        labels = deployment["template"]["metadata"]["labels"]
        assert service["selector"].items() <= labels.items()
        assert deployment["selector"]["matchLabels"] == service["selector"]
        selectors = [
            one["spec"]["selector"]["matchLabels"]
            for (kind, _), one in found.items()
            if kind == "Deployment"
        ]
        assert selectors.count(service["selector"]) == 1
        pod = deployment["template"]["spec"]
        config = pod["containers"][0]["envFrom"][0]["configMapRef"]["name"]
        weights[found["ConfigMap", config]["data"]["MODEL"]] = backend["weight"]
        assert ("ServiceAccount", pod["serviceAccountName"]) in found
        (claim,) = (one for one in pod["volumes"] if "persistentVolumeClaim" in one)
        assert ("PersistentVolumeClaim", claim["persistentVolumeClaim"]["claimName"]) in found
    assert weights == {"/models/model": 9900, "/models/next": 100}


def changed(old: str, new: str) -> str:
    assert old in HAND_WRITTEN
    return HAND_WRITTEN.replace(old, new)


BOTH_ZERO = changed("weight: 3", "weight: 0").replace("weight: 1,", "weight: 0,")
ONE_SERVICE = changed("        - {weight: 1, name: chat-b, port: 80}\n", "")


@pytest.mark.parametrize(
    ("content", "words", "code", "parts"),
    [
        (None, ["--share", "100%"], 2, ["is not a share"]),
        (None, ["--next", "b: c"], 2, ["--next: 'b: c' is not a name of a Service"]),
        (None, ["--share", "1%", "--promote"], 2, ["one of --share, --promote and --rollback"]),
        ("a: [", [], 3, ["is not valid YAML"]),
        ("kind: Service", [], 3, ["has 0 objects HTTPRoute with the name 'chat'", "One was"]),
        (HAND_WRITTEN, ["--mirror", "5"], 2, ["--mirror is for a new file"]),
        (changed("{weight: 1, ", "{"), [], 3, ["a backendRef", "has no weight"]),
        (changed("weight: 3", "weight: x"), [], 3, ["has no weight"]),
        (BOTH_ZERO, [], 3, ["both weights of 'chat' are 0"]),
        (changed("name: chat,", "name: chatty,"), [], 3, ["has 0 objects"]),
        (ONE_SERVICE, [], 3, ["no rule of the HTTPRoute 'chat' has two backendRefs"]),
        (HAND_WRITTEN, ["--next", "chat-c"], 2, ["chat-a and chat-b both have traffic"]),
        (changed("weight: 1,", "weight: 0,"), ["--next", "chat-a"], 2, ["has all traffic"]),
    ],
)
def test_gateway_refuses_what_it_cannot_change(
    content: str | None,
    words: list[str],
    code: int,
    parts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "route.yaml"
    if content is not None:
        path.write_text(content)
    message = gateway(capsys, "chat", "-o", str(path), *words, code=code)
    assert all(part in message for part in parts), message
    assert content is None or path.read_text() == content
    assert path.exists() == (content is not None)
