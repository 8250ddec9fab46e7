"""A request to a Prefect API: again while its database is busy, and not for ever where nobody answers."""

from __future__ import annotations

import threading
import time
import urllib.error
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from flows import service


class Api(ThreadingHTTPServer):
    """Says 503 so many times before it answers, after so many seconds each time."""

    busy, slow, asked = 0, 0.0, 0

    def handle_error(self, *_: Any) -> None:
        """Whoever asked has gone."""


class Handler(BaseHTTPRequestHandler):
    server: Api

    def do_GET(self) -> None:
        self.server.asked += 1
        time.sleep(self.server.slow)
        self.send_response(503 if self.server.asked <= self.server.busy else 200)
        self.end_headers()
        self.wfile.write(b'{"well": true}')

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    # A hundredth of the true ones, in the same proportions.
    for name in ("ANSWER_SECONDS", "BUSY_SECONDS"):
        monkeypatch.setattr(service, name, getattr(service, name) / 100)
    with Api(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(api: Api) -> Any:
    return service.ask(f"http://127.0.0.1:{api.server_port}", "GET", "/health")


def test_a_busy_database_is_asked_again_however_long_it_takes_to_say_so(api: Api) -> None:
    api.busy, api.slow = 1, service.DATABASE_SECONDS / 100
    assert ask(api) == {"well": True} and api.asked == 2


def test_a_database_that_stays_busy_is_an_error(api: Api) -> None:
    api.busy = 10**6
    with pytest.raises(urllib.error.HTTPError, match="503"):
        ask(api)
    assert api.asked > 1


def test_who_does_not_answer_is_not_waited_for(api: Api) -> None:
    api.slow = 2 * service.ANSWER_SECONDS
    with pytest.raises(TimeoutError):
        ask(api)
