"""A SuperLink on loopback, and SuperNodes with TLS and keys, as processes.

benchmarks/engines.py starts its SuperLink with this, too.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import httpx
import psutil
import tomli_w

from cgfedllm.config import Config

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "deployment"
BIN = Path(sys.executable).parent
_START_SECONDS = 180.0  # importing torch on a busy machine


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def until(what: Callable[[], bool], wanted: str, seconds: float = _START_SECONDS) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            raise AssertionError(f"{wanted} did not come within {seconds:g} s")
        time.sleep(0.2)


def make_keys(folder: Path, *nodes: str) -> None:
    named = [argument for node in nodes for argument in ("--node", node)]
    subprocess.run(
        [sys.executable, str(EXAMPLE / "make_keys.py"), str(folder), *named],
        check=True,
        stdout=subprocess.DEVNULL,
    )


class Process:
    """A program with its log; it and what it started end with the block."""

    def __init__(self, *command: str, folder: Path, log: str, environment: dict[str, str]) -> None:
        self.log_path = folder / log
        program = shutil.which(command[0], path=environment["PATH"]) or command[0]
        with self.log_path.open("wb") as out:
            self._process = subprocess.Popen(
                [program, *command[1:]],
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def answered(self) -> bool:
        """Whether a SuperNode was let in, or has given up."""
        return self.ended or "SuperNode ID" in self.log

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, seconds: float | None = _START_SECONDS) -> int:
        """Its exit status; None waits for good."""
        return self._process.wait(seconds)

    def kill(self) -> None:
        """As when the power fails: it and what it started, at once."""
        with suppress(psutil.Error):
            for one in psutil.Process(self._process.pid).children(recursive=True):
                one.kill()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._process.wait()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()


class Loopback:
    """An address for a SuperLink, and a home of its own for Flower.

    Parameters
    ----------
    folder : Path
        For logs and Flower's home.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{free_port()}"
        self.environment = {
            **os.environ,
            # Flower starts its own programs by name
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "XDG_STATE_HOME": str(folder / "state"),
        }

    def connect(self, name: str, **how: str | bool) -> None:
        """Let Flower's command line know the SuperLink by a name."""
        home = Path(self.environment["FLWR_HOME"])
        home.mkdir()
        settings = {"superlink": {"default": name, name: {"address": self.address, **how}}}
        (home / "config.toml").write_text(tomli_w.dumps(settings))

    def process(self, *command: str, log: str) -> Process:
        return Process(*command, folder=self.folder, log=log, environment=self.environment)

    def start(self, *options: str, trust: ssl.SSLContext | None = None) -> Process:
        """A SuperLink that answers; with `trust`, over TLS."""
        host, port = self.address.split(":")
        where = ("--host", host, "--port", port)
        process = self.process("flower-superlink", *where, *options, log="superlink.log")
        try:
            until(lambda: process.ended or self._healthy(trust), "the SuperLink")
            assert not process.ended, process.log
        except AssertionError:
            process.kill()
            raise
        return process

    def _healthy(self, trust: ssl.SSLContext | None) -> bool:
        protocol = "http" if trust is None else "https"
        try:
            url = f"{protocol}://{self.address}/health"
            return httpx.get(url, verify=trust or True).is_success
        except httpx.HTTPError:
            return False


class Deployment(Loopback):
    """A SuperLink with TLS that knows its nodes' keys, and what it takes to connect to it.

    Parameters
    ----------
    folder : Path
        For keys, logs, Flower's own home and the nodes' memory.
    nodes : tuple of str
        Whose keys the SuperLink is told.
    """

    def __init__(self, folder: Path, nodes: tuple[str, ...]) -> None:
        super().__init__(folder)
        self.keys = folder / "keys"
        self.environment |= {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        self._nodes = nodes

    def superlink(self) -> Process:
        self._superlink = self.start(
            *("--ssl-ca-certfile", str(self.keys / "ca.crt")),
            *("--ssl-certfile", str(self.keys / "server.crt")),
            *("--ssl-keyfile", str(self.keys / "server.key")),
            "--enable-supernode-auth",
            trust=ssl.create_default_context(cafile=str(self.keys / "ca.crt")),
        )
        return self._superlink

    def kill_server_app(self) -> None:
        """As when the process of the run dies and the SuperLink lives on."""
        started = psutil.Process(self._superlink.pid).children(recursive=True)
        servers = [one for one in started if "flwr-serverapp" in " ".join(one.cmdline())]
        assert servers
        for one in servers:
            one.kill()

    def supernode(
        self, key: str | None, *extra: str, name: str, data: Path, programs: Path | None = None
    ) -> Process:
        """Start a SuperNode; with `programs`, a folder of those it has in place of Flower's own."""
        own = () if key is None else ("--auth-supernode-private-key", key)
        environment = dict(self.environment)
        if programs is not None:
            environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
        return Process(
            "flower-supernode",
            *("--superlink", self.address),
            *("--port", str(free_port())),
            *("--node-config", f'data="{data}" name="{name}"'),
            *own,
            *(extra or ("--root-certificates", str(self.keys / "ca.crt"))),
            folder=self.folder,
            log=f"{name}.log",
            environment=environment,
        )

    def node(self, name: str, data: Path, programs: Path | None = None) -> Process:
        """A SuperNode, started until it is let in, as a service manager would.

        Flower takes one that was killed, by an earlier test too, for connected until heartbeats
        have been missing for a while.
        """
        key = str(self.keys / "nodes" / name)
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            process = self.supernode(key, name=name, data=data, programs=programs)
            until(process.answered, "an answer")
            if not process.ended:
                return process
            process.kill()
            time.sleep(5)
        raise AssertionError(f"{name} was not let in")

    def submit(self, config: Config) -> Process:
        """Start a run as a user does."""
        path = self.folder / f"{config.name}.toml"
        path.write_text(config.to_toml())
        return self.process("cgfedllm", "run", str(path), "--superlink", "tls", log="run.log")

    def prepare(self) -> None:
        """Keys, and a connection called `tls`."""
        make_keys(self.keys, *self._nodes)
        self.connect("tls", **{"root-certificates": str(self.keys / "ca.crt")})

    def register(self) -> None:
        """Tell the SuperLink whom to let in."""
        for node in self._nodes:
            public = str(self.keys / "nodes" / f"{node}.pub")
            with self.process(
                "flwr", "supernode", "register", public, "tls", log="register.log"
            ) as done:
                assert done.wait() == 0, done.log


@contextmanager
def deployed(folder: Path, *nodes: str) -> Iterator[Deployment]:
    """A SuperLink that knows these nodes."""
    deployment = Deployment(folder, nodes)
    deployment.prepare()
    with deployment.superlink():
        deployment.register()
        yield deployment


def in_process(config: Config, rows: Iterable[Path], folder: Path) -> Config:
    """The experiment of nodes with rows of their own, where one process has everybody's.

    Parameters
    ----------
    rows : iterable of Path
        A file a node.
    folder : Path
        For copies of them, and the run.
    """
    together = folder / "rows"
    together.mkdir()
    for path in rows:
        shutil.copy(path, together)
    return config.with_overrides(
        {
            "data.source": str(together / "*.jsonl"),
            "data.partition.kind": "files",
            "output": str(folder / "in-process"),
        }
    )
