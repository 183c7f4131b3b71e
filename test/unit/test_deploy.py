"""What lies in deploy/ is what Kubernetes, Compose and Ramet itself take, and its parts fit together."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose
from ramet.srt.command_line import parse_server_args
from ramet.srt.environ import cache_folder, envs
from ramet.srt.modelexpress.server import command_line as modelexpress_command_line
from ramet.srt.modelexpress.server.server import ServerOptions

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted(path for path in (DEPLOY / "kubernetes").glob("*.yaml") if path.name != "prometheus-adapter.yaml")
VERSIONS = ("1.30", kubernetes_validate.latest_version())  # of Kubernetes: the oldest that the manifests are for
BY_HAND = ("leaderworkerset.x-k8s.io/v1", "monitoring.coreos.com/v1")  # no package has these schemas
SHARED_LIBRARY = re.compile(rb"(?<=\0)lib[\w+.-]+\.so(?:\.\d+)*(?=\0)")
PACKAGES = {  # Debian's, and Ubuntu's
    "libcurl.so.4": "libcurl4",
    "libibverbs.so.1": "libibverbs1",
    "libnuma.so.1": "libnuma1",
    "librdmacm.so.1": "librdmacm1",
}
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
# What Kubernetes, LeaderWorkerSet and Compose put in the place of variables.
VALUES = {
    "POD_IP": "10.1.2.3",
    "LWS_GROUP_SIZE": "2",
    "LWS_WORKER_INDEX": "1",
    "LWS_LEADER_ADDRESS": "ramet-large-0.ramet-large.default",
    "RAMET_API_KEY": "secret",
    "MODEL": "org/model",
}


def documents() -> list[dict[str, Any]]:
    return [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())]


def name_of(document: dict[str, Any]) -> str:
    return f"{document['kind']}-{document['metadata']['name']}"


def pod_templates() -> Iterator[tuple[str, dict[str, Any]]]:
    """What the pods are made from, each with the name of what makes it."""
    for document in documents():
        spec = document["spec"]
        if "leaderWorkerTemplate" in spec:
            for role in ("leaderTemplate", "workerTemplate"):
                yield f"{name_of(document)}-{role}", spec["leaderWorkerTemplate"][role]
        elif "template" in spec:
            yield name_of(document), spec["template"]


PODS = dict(pod_templates())


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_the_manifests(version: str) -> None:
    """By its own published schemas, in which no field may be unknown. Other kinds' pods are held against a pod's."""
    for document in documents():
        if document["apiVersion"] not in BY_HAND:
            kubernetes_validate.validate(document, version, strict=True)
    for template in PODS.values():
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        kubernetes_validate.validate(pod, version, strict=True)
        misspelt = pod | {"template": {"spec": template["spec"] | {"container": []}}}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(misspelt, version, strict=True)


def fill_in(word: str) -> str:
    return re.sub(r"\$[({](\w+)[^)}]*[)}]", lambda match: VALUES[match[1]], word)


def commands() -> Iterator[tuple[str, list[str]]]:
    """What the containers run."""
    for name, template in PODS.items():
        for container in template["spec"]["containers"]:
            yield name, [fill_in(word) for word in container["args"]]
    for name, service in COMPOSE["services"].items():
        if service["image"].startswith("ramet:"):
            yield f"compose-{name}", [fill_in(word) for word in service["command"]]


OWN_COMMANDS = {name: words for name, words in commands() if words[0] in ("serve", "modelexpress-server")}


def test_all_commands_are_known() -> None:
    assert len(OWN_COMMANDS) == 7


@pytest.mark.parametrize("name", OWN_COMMANDS)
def test_ramet_takes_the_commands(name: str) -> None:
    command, *words = OWN_COMMANDS[name]
    if command == "serve":
        args = parse_server_args(words)
        assert args.host != "127.0.0.1" and args.remote_instance_weight_loader_backend == "modelexpress"
        return
    defaults = dict.fromkeys(modelexpress_command_line.FLAGS)
    values = vars(modelexpress_command_line.make_parser(defaults, "ramet").parse_args(words))
    given = {key: values[key] for key in modelexpress_command_line.FLAGS if values[key] is not None}
    assert ServerOptions(**given).host == "0.0.0.0"


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def found_by(selector: dict[str, str]) -> list[str]:
    """The names of the pods that a selector finds, once everything has been applied."""
    return [name for name, template in PODS.items() if selects(selector, template["metadata"]["labels"])]


def sets_of(names: list[str]) -> set[str]:
    """By what these pods are made: those of one serve one model."""
    return {re.sub("-(leader|worker)Template$", "", name) for name in names}


def ports_of(name: str) -> set[str | int]:
    return {value for one in PODS[name]["spec"]["containers"] for port in one["ports"] for value in port.values()}


SELECTORS = {
    "Service": lambda spec: spec["selector"],
    "Deployment": lambda spec: spec["selector"]["matchLabels"],
    "StatefulSet": lambda spec: spec["selector"]["matchLabels"],
    "PodDisruptionBudget": lambda spec: spec["selector"]["matchLabels"],
}


@pytest.mark.parametrize("kind", SELECTORS)
def test_selectors_find_the_pods_of_one_set(kind: str) -> None:
    """A Service over two would send requests to instances that don't serve their model."""
    found = {document["metadata"]["name"]: found_by(SELECTORS[kind](document["spec"]))
             for document in documents() if document["kind"] == kind}  # fmt: skip
    assert found
    for name, pods in found.items():
        assert len(sets_of(pods)) == 1, f"{kind} {name} selects {pods}"
        if kind in ("Deployment", "StatefulSet"):
            assert pods == [f"{kind}-{name}"]


def test_services_send_to_ports_that_answer() -> None:
    services = [document for document in documents() if document["kind"] == "Service"]
    for service in services:
        for pod in found_by(service["spec"]["selector"]):
            assert {port.get("targetPort", port["port"]) for port in service["spec"]["ports"]} <= ports_of(pod)
            assert not pod.endswith("workerTemplate")  # answers no users
    reached = {pod for service in services for pod in found_by(service["spec"]["selector"])}
    assert reached == {name for name in PODS if not name.endswith("workerTemplate")}
    groups = {document["metadata"]["name"] for document in documents() if document["kind"] == "LeaderWorkerSet"}
    assert not groups & {service["metadata"]["name"] for service in services}  # its controller makes one of this name


def test_autoscalers_go_by_their_own_pods() -> None:
    rules = yaml.safe_load((DEPLOY / "kubernetes/prometheus-adapter.yaml").read_text())["rules"]["external"]
    autoscalers = [document["spec"] for document in documents() if document["kind"] == "HorizontalPodAutoscaler"]
    assert {spec["metrics"][0]["external"]["metric"]["name"] for spec in autoscalers} == {
        rule["name"]["as"] for rule in rules
    }
    for rule in rules:  # every series that it names is narrowed down
        series = re.findall(r"<<\.Series>>|ramet:\w+", rule["metricsQuery"])
        assert len(series) == rule["metricsQuery"].count("{<<.LabelMatchers>>}") > 0
    for spec in autoscalers:
        (metric,) = spec["metrics"]
        selector = metric["external"]["metric"]["selector"]["matchLabels"]
        pods = found_by(selector)
        assert sets_of(pods) == {f"{spec['scaleTargetRef']['kind']}-{spec['scaleTargetRef']['name']}"}
        for pod in pods:
            ((monitor, _),) = monitors_of(pod)
            assert selector.keys() <= set(monitor["podTargetLabels"])


def monitors_of(pod: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The PodMonitors that select a pod, each with its way to scrape it."""
    specs = [document["spec"] for document in documents() if document["kind"] == "PodMonitor"]
    return [
        (spec, way) for spec in specs if pod in found_by(spec["selector"]["matchLabels"])
        for way in spec["podMetricsEndpoints"]
    ]  # fmt: skip


def test_every_pod_that_has_metrics_is_scraped_once_with_the_key_that_it_wants() -> None:
    for pod, template in PODS.items():
        (container,) = template["spec"]["containers"]
        if container["args"][0] not in ("serve", "modelexpress-server") or pod.endswith("workerTemplate"):
            assert monitors_of(pod) == []
            continue
        ((_, way),) = monitors_of(pod)
        assert way["port"] in ports_of(pod) and way["honorLabels"]
        environment = {one["name"]: one.get("valueFrom", {}) for one in container.get("env", ())}
        wanted = [
            environment[name]["secretKeyRef"]
            for word in container["args"] for name in re.findall(r"^--api-key=\$\((\w+)\)$", word)
        ]  # fmt: skip
        assert wanted == ([way["authorization"]["credentials"]] if "authorization" in way else [])
        assert len(wanted) == (container["args"][0] == "serve")
        annotations = template["metadata"].get("annotations", {})
        assert not [one for one in annotations if one.startswith("prometheus.io/")]  # a job that goes by it has no key


def test_prometheus_in_compose_sends_the_key() -> None:
    jobs = {job["job_name"]: job for job in yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]}
    (names,) = [one["names"] for one in jobs["ramet"]["dns_sd_configs"]]
    with_key = [name for name, service in COMPOSE["services"].items()
                if any(word.startswith("--api-key=") for word in service.get("command", ()))]  # fmt: skip
    assert names == with_key
    (secret,) = COMPOSE["services"]["prometheus"]["secrets"]
    assert jobs["ramet"]["authorization"] == {"credentials_file": f"/run/secrets/{secret}"}
    assert all(f"${{{COMPOSE['secrets'][secret]['environment']}:?}}" in " ".join(COMPOSE["services"][name]["command"])
               for name in with_key)  # fmt: skip


def peers(rules: list[dict[str, Any]], side: str) -> Iterator[tuple[dict[str, str], list[int]]]:
    """The pods of this namespace that a policy names, and the ports."""
    for rule in rules:
        for peer in rule[side]:
            if "podSelector" in peer and "namespaceSelector" not in peer:
                yield peer["podSelector"]["matchLabels"], [port["port"] for port in rule.get("ports", ())]


def test_the_network_s_policies_let_through_what_has_to_pass() -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in documents() if one["kind"] == "NetworkPolicy"}
    apps = {template["metadata"]["labels"]["app"] for template in PODS.values()}
    assert {spec["podSelector"]["matchLabels"]["app"] for spec in policies.values()} == apps == set(policies)
    allowed = {
        side: {(name, peer["app"], *ports) for name, spec in policies.items() if side in spec
               for peer, ports in peers(spec[side], "from" if side == "ingress" else "to") if "app" in peer}
        for side in ("ingress", "egress")
    }  # fmt: skip
    both = allowed["egress"]
    assert both == {(source, target, *ports) for target, source, *ports in allowed["ingress"]}
    assert both == {
        ("ramet", "ramet"), ("ramet", "ramet-modelexpress", 8001), ("ramet-modelexpress", "ramet-redis", 6379)
    }  # fmt: skip


def test_all_instances_are_probed_and_drain() -> None:
    for name, template in PODS.items():
        (container,) = template["spec"]["containers"]
        if container["args"][0] != "serve":
            continue
        probes = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
        ready = "/health" if name.endswith("workerTemplate") else "/ready"  # a worker answers nothing else
        assert probes == {"startup": "/health", "readiness": ready, "liveness": "/health"}
        (drain_s,) = [
            float(word.partition("=")[2]) for word in container["args"] if word.startswith("--drain-timeout=")
        ]
        grace_s = template["spec"]["terminationGracePeriodSeconds"]
        assert grace_s >= drain_s + container["lifecycle"]["preStop"]["sleep"]["seconds"] + 10


def test_compose_takes_the_file() -> None:
    """By a library that knows the Compose specification, once YAML has put the shared part where it is named."""
    compose = PyCompose.from_yaml(yaml.safe_dump(COMPOSE))
    compose.validate()
    with pytest.raises(ValueError, match="retrys"):
        PyCompose.from_yaml(yaml.safe_dump({"services": {"a": {"image": "x", "healthcheck": {"retrys": 1}}}}))
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (DEPLOY / source).exists()
        assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])
        assert set(service.get("depends_on", ())) <= set(COMPOSE["services"])
        if isinstance(service.get("build"), dict):
            assert f" AS {service['build']['target']}\n" in (DEPLOY / "Dockerfile").read_text()


def test_compose_starts_again_what_has_ended() -> None:
    """With 0, too, as an instance does that was told to end by something else than Compose."""
    assert {service.get("restart") for service in COMPOSE["services"].values()} == {"unless-stopped"}


def image_environments() -> dict[str, dict[str, str]]:
    """What the images set, by their names."""
    stages = re.split(r"^FROM \S+ AS (\w+)$", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    return {
        f"ramet:{name}": dict(re.findall(r"(\w+)=(\S+)", " ".join(re.findall(r"^ENV (.*)$", text, re.MULTILINE))))
        for name, text in zip(stages[::2], stages[1::2], strict=True)
    }


CACHES = ("HF_HOME", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")


def instances() -> Iterator[tuple[str, str, dict[str, str], list[str]]]:
    """Of each set of instances: its name, its image, its own environment, and where it has volumes."""
    for name, template in PODS.items():
        for one in template["spec"]["containers"]:
            if one["args"][0] == "serve":
                environment = {entry["name"]: entry.get("value", "") for entry in one["env"]}
                mounts = [mount["mountPath"] for mount in one["volumeMounts"] if not mount.get("readOnly")]
                yield name, one["image"], environment, mounts
    for name, service in COMPOSE["services"].items():
        if service.get("command", [""])[0] == "serve":
            mounts = [volume.split(":")[1] for volume in service["volumes"]]
            yield f"compose-{name}", service["image"], service["environment"], mounts


@pytest.mark.parametrize("instance", list(instances()), ids=lambda instance: instance[0])
def test_what_instances_keep_is_on_volumes(instance: tuple[str, str, dict[str, str], list[str]]) -> None:
    """Elsewhere the file system may be read-only, and is gone with the container."""
    _, image, own, mounts = instance
    environment = image_environments()[image] | own
    folders = {name: Path(environment[name]) for name in CACHES}
    assert not [name for name, folder in folders.items() if not any(folder.is_relative_to(one) for one in mounts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", environment["XDG_CACHE_HOME"])
        patch.delenv("RAMET_DIGEST_DIR", raising=False)
        assert cache_folder("digests", envs.RAMET_DIGEST_DIR).is_relative_to("/cache")


def test_prometheus_takes_its_file() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool, of the package prometheus")
    command = ["promtool", "check", "config", "--syntax-only", str(DEPLOY / "prometheus.yml")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_images_are_made_of_what_there_is() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    copied = [
        word for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE) for word in shlex.split(line)[:-1]
    ]
    assert copied and all((ROOT / word).exists() and any(fnmatch(word, one) for one in kept) for word in copied)
    setup = (ROOT / "setup.py").read_text()
    extras = {one for group in re.findall(r"\.whl\)\[([^\]]+)\]", text) for one in group.split(",")} - {"$EXTRA"}
    extras |= set(re.findall(r"ARG EXTRA=(\w+)", text))
    assert extras == {"cpu", "cuda13", "modelexpress", "cudnn", "otel"}
    assert all(f'"{one}": [' in setup for one in extras)


def libraries_of_mooncake() -> set[str]:
    """The system's libraries that Mooncake's engine names and that come neither with it nor with every Debian."""
    package = Path(find_spec("mooncake").submodule_search_locations[0])
    names = {name.decode() for name in SHARED_LIBRARY.findall((package / "engine.so").read_bytes())}
    shipped = {re.split(r"[-.]", path.name)[0] for path in package.parent.glob("mooncake*/*.so*")}
    shipped |= {"libc", "libdl", "libgcc_s", "libm", "libpthread", "librt", "libstdc++"}
    return {name for name in names if re.split(r"[-.]", name)[0] not in shipped}


def test_mooncake_finds_its_libraries_wherever_ramet_is_set_up() -> None:
    """An image without one of them would serve, and its weights would reach no other container."""
    if find_spec("mooncake") is None:
        pytest.skip("needs Mooncake")
    needed = libraries_of_mooncake()
    assert {"libcurl.so.4", "libibverbs.so.1"} <= needed <= PACKAGES.keys()
    stages = re.findall(r"apt-get install[^&]*", (DEPLOY / "Dockerfile").read_text())
    setups = [*stages, *((ROOT / name).read_text() for name in ("scripts/setup_env.sh", "docs/dependencies.md"))]
    assert len(setups) == 4
    for setup in setups:
        assert not [PACKAGES[name] for name in needed if PACKAGES[name] not in setup], setup


@pytest.mark.parametrize(
    "path", [DEPLOY / "Dockerfile", DEPLOY / "compose.yaml", *(DEPLOY / "kubernetes").glob("*.yaml")]
)
def test_the_first_lines_say_what_was_not_run(path: Path) -> None:
    head = path.read_text()[:900]
    assert re.search(r"Not run|not run", head)
