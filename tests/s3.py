"""A server that speaks S3 (moto's), in a process of its own: Flask's objects in a process that starts vLLM break it.

Run as a program it serves, until its stdin ends; lines "stop" and "start" close and open its port. What it holds stays.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

KEY = "AKIAIOSFODNN7EXAMPLE"
SECRET = "wJalrXUtnFEMI+K7MDENG+bPxRfiCYEXAMPLEKEY"


class S3Server:
    """The server, as others see it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address = self._answer()

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs to use it."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.address,
        }

    def stop(self) -> None:
        self._tell("stop")

    def start(self) -> None:
        self._tell("start")

    def _tell(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        assert self._answer() == self.address

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def s3_server() -> Iterator[S3Server]:
    command = [sys.executable, "-m", "tests.s3"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield S3Server(process)
        finally:
            process.kill()


def main() -> None:
    from moto.server import ThreadedMotoServer

    port, server = 0, None
    for word in _words():
        if word == "start":
            server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
            server.start()
            port = server.get_host_and_port()[1]
        elif server is not None:
            server.stop()
        print(f"http://127.0.0.1:{port}", flush=True)


def _words() -> Iterator[str]:
    yield "start"
    for line in sys.stdin:
        yield line.strip()


if __name__ == "__main__":
    main()
