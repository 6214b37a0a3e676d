"""examples/deployment/nginx.conf: nodes get through it, whoever wants to start a run does not."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tomli_w

from cgfedllm.config import Config
from cgfedllm.runs import RunFolder

from .deployment import EXAMPLE, Deployment, Process, deployed, free_port, make_keys, until

NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
# what a distribution's /etc/nginx/nginx.conf has around a file of conf.d, kept in the test's folder
AROUND = """
daemon off;
{user}
pid nginx.pid;
events {{}}
http {{
    access_log access.log;
    client_body_temp_path temp/body;
    proxy_temp_path temp/proxy;
    fastcgi_temp_path temp/fastcgi;
    uwsgi_temp_path temp/uwsgi;
    scgi_temp_path temp/scgi;
    include {example};
}}
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not Path(NGINX).exists(), reason="nginx is not installed"),
]


class Proxy:
    """nginx with the example's file, for keys and ports of this test."""

    def __init__(self, behind: Deployment) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.behind = behind
        text = (EXAMPLE / "nginx.conf").read_text()
        for ours, theirs in {
            "listen 443 ssl;": f"listen {self.address} ssl;",
            "/srv/cgfedllm/keys/": f"{behind.keys}/",
            "https://127.0.0.1:9443;": f"https://{behind.address};",
        }.items():
            assert ours in text
            text = text.replace(ours, theirs)
        example, self.config = behind.folder / "cgfedllm.conf", behind.folder / "nginx.conf"
        (behind.folder / "temp").mkdir()
        example.write_text(text)
        # started by root, its workers would be somebody who may not read this folder
        user = "user root;" if os.geteuid() == 0 else ""
        self.config.write_text(AROUND.format(user=user, example=example))
        self.command = (NGINX, "-p", str(behind.folder), "-e", "stderr", "-c", str(self.config))

    def node(self, name: str, data: Path, key: Path) -> Process:
        return self.behind.supernode(
            str(key),
            *("--superlink", self.address),
            *("--root-certificates", str(self.behind.keys / "ca.crt")),
            name=name,
            data=data,
        )


def status(deployment: Deployment, address: str, path: str) -> int:
    """What a POST of nothing is answered; the path is sent as it is."""
    trust = ssl.create_default_context(cafile=str(deployment.keys / "ca.crt"))
    connection = http.client.HTTPSConnection(address, context=trust, timeout=60)
    try:
        connection.putrequest("POST", path)
        connection.putheader("Content-Length", "0")
        connection.endheaders()
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with deployed(tmp_path_factory.mktemp("deployment"), "north", "south") as deployment:
        proxy = Proxy(deployment)
        with deployment.process(*proxy.command, "-t", log="check.log") as check:
            assert check.wait() == 0, check.log
            assert "warn" not in check.log
        with deployment.process(*proxy.command, log="nginx.log") as nginx:
            # checking left the file behind, empty
            pid = deployment.folder / "nginx.pid"
            until(lambda: nginx.ended or pid.stat().st_size > 0, "nginx")
            assert not nginx.ended, nginx.log
            yield proxy


def test_a_run_whose_nodes_come_through_the_proxy(
    proxy: Proxy, tiny_config: Callable[..., Config], tiny_data: Path
) -> None:
    deployment = proxy.behind
    rows = [json.loads(line) for line in tiny_data.read_text().splitlines()]
    for client in ("north", "south", "west"):
        own = [json.dumps(row) for row in rows if row["client"] == client]
        (deployment.folder / f"{client}.jsonl").write_text("\n".join(own) + "\n")
    config = tiny_config(
        "data.source=node",
        f'data.heldout_source="{deployment.folder / "west.jsonl"}"',
        "federation.rounds=1",
        "federation.clients=2",
        "federation.min_clients=2",
        "evaluation.clients=false",
    )
    north, south = (
        proxy.node(name, deployment.folder / f"{name}.jsonl", deployment.keys / "nodes" / name)
        for name in ("north", "south")
    )
    with north, south, deployment.submit(config) as run:
        assert run.wait(900) == 0, run.log
    last = RunFolder(config.run_dir).records()[-1]
    assert [client.client for client in last.clients] == ["north", "south"]
    assert not last.failures
    seen = (deployment.folder / "access.log").read_text()
    assert '"POST /v1/fleet/push-messages HTTP/1.1" 200' in seen


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/list-runs",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/..%2fcontrol/list-runs",
        "//v1/control/list-runs",
        "/health",
        "/",
    ],
)
def test_nothing_but_the_fleet_api_is_behind_the_proxy(proxy: Proxy, path: str) -> None:
    assert status(proxy.behind, proxy.address, path) in (400, 404)


def test_what_the_proxy_keeps_back_is_there_without_it(proxy: Proxy) -> None:
    for path in ("/v1/control/list-runs", "/v1/fleet/pull-messages"):
        assert status(proxy.behind, proxy.behind.address, path) not in (404, 405)
    assert status(proxy.behind, proxy.address, "/v1/fleet/pull-messages") not in (404, 405)


def test_a_run_cannot_be_started_through_the_proxy(
    proxy: Proxy, tiny_config: Callable[..., Config]
) -> None:
    deployment = proxy.behind
    config = tiny_config("data.source=node", "name=intruder")
    job = deployment.folder / "intruder.toml"
    job.write_text(config.to_toml())
    settings = deployment.folder / "flower" / "config.toml"
    before = settings.read_text()
    through = {"address": proxy.address, "root-certificates": str(deployment.keys / "ca.crt")}
    settings.write_text(before + tomli_w.dumps({"superlink": {"outside": through}}))
    try:
        with deployment.process(
            *("cgfedllm", "run", str(job), "--superlink", "outside"), log="intruder.log"
        ) as run:
            assert run.wait(300) != 0
        assert "404 Not Found" in run.log
    finally:
        settings.write_text(before)
    assert not config.run_dir.exists()


def test_a_node_without_a_registered_key_does_not_get_in(proxy: Proxy, tmp_path: Path) -> None:
    make_keys(tmp_path / "keys", "stranger")
    key = tmp_path / "keys" / "nodes" / "stranger"
    with proxy.node("stranger", tmp_path, key) as node:
        until(node.answered, "an answer")
        assert node.ended
        assert "SuperNode ID" not in node.log
