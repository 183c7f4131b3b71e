"""One start with every flag that there is, all of them from one file, but for those that contradict others."""

import json
import re
from pathlib import Path
from typing import Any

import httpx
from every_flag import ADMIN_KEY, API_KEY, LEFT_OUT, ROOT_PATH, every_flag, write_config
from lora_adapters import make_adapter
from ramet.srt.server_flags import NEEDLESS, sectioned_fields
from random_models import make_model
from server_process import ServerProcess
from tls_server import make_certificates, trust

MADE_AT_THE_START = ("port", "engine_info_bootstrap_port", "modelexpress_config")  # what was asked for is 0
SECRETS = ("api_key", "admin_api_key", "ssl_keyfile_password")


def test_all_flags_of_a_file_count(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama2")
    certificates = make_certificates(tmp_path)
    values = every_flag(model, certificates, make_adapter(tmp_path / "poet", model), tmp_path)
    fields = {field.name: field for _, fields in sectioned_fields() for field in fields}
    assert values.keys() | LEFT_OUT.keys() == fields.keys()
    assert not [name for name, value in values.items() if value is False or value in (None, (), "")]
    write_config(tmp_path / "all.yaml", values)
    flags = ("--config", str(tmp_path / "all.yaml"), "--served-model-name", *values["served_model_name"])
    with ServerProcess(model, tmp_path / "log", *flags, fake=False, verify=trust(certificates)) as server:
        server.wait_ready()
        assert_all_is_as_asked(server, values)
        assert_it_serves(server)
    lines = [json.loads(line) for line in server.output.splitlines()]
    needless = [line["message"].split()[0] for line in lines if " is not needed: " in line["message"]]
    assert needless == list(NEEDLESS)
    assert server.process.returncode == 0


def assert_all_is_as_asked(server: ServerProcess, values: dict[str, Any]) -> None:
    url = f"{server.url}{ROOT_PATH}/server_info"
    headers = {"Authorization": f"Bearer {API_KEY}"}
    info = httpx.get(url, headers=headers, verify=server.verify, timeout=30).json()
    for name, value in values.items():
        if name not in (*MADE_AT_THE_START, *SECRETS, "served_model_name"):
            assert info[name] == (list(value) if isinstance(value, tuple) else value), name
    assert not set(SECRETS) & info.keys() and API_KEY not in re.split(r"\W", str(info))
    assert info["max_total_num_tokens"] == values["max_total_tokens"] and len(info["ranks"]) == values["tp_size"]


def assert_it_serves(server: ServerProcess) -> None:
    with httpx.Client(base_url=server.url, verify=server.verify, timeout=30) as http:
        assert http.get("/v1/models").status_code == 401
        http.headers["Authorization"] = f"Bearer {API_KEY}"
        for model in ("tiny", "tiny-alias", "poet"):
            messages = [{"role": "user", "content": "a"}]
            answer = http.post("/v1/chat/completions", json={"model": model, "messages": messages, "max_tokens": 3})
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3, answer.text
        page = http.options(
            "/v1/models", headers={"Origin": "https://ui.example", "Access-Control-Request-Method": "GET"}
        )
        assert page.headers["access-control-allow-origin"] == "https://ui.example"
        http.headers["Authorization"] = f"Bearer {ADMIN_KEY}"
        assert http.post("/release_memory_occupation").status_code == 200
        assert http.get("/ready").status_code == 503
        assert http.post("/resume_memory_occupation").status_code == 200
