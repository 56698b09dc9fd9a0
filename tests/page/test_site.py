"""The documentation as it was built (`make docs`), in headless Chromium."""

from __future__ import annotations

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from tests.documents import ROOT
from tests.page.browser import look

SITE = ROOT / "build/site"


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    if not (SITE / "index.html").exists():
        pytest.skip("the site is not built: make docs does it")
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    # axe reads style sheets, which Chromium does not let a page of file:// do.
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(SITE))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        try:
            yield look("site.cjs", url, tmp_path_factory.mktemp("site"))
        finally:
            server.shutdown()


def test_its_pages_can_be_read_by_all(seen):
    for window in seen.values():
        assert window["problems"] == []
        for name, page in window["pages"].items():
            assert page["violations"] == [] and page["passes"] > 20, name
            assert not page["overflows"], name
    light, dark = (next(iter(seen[name]["pages"].values())) for name in ("desktop", "dark"))
    assert light["background"] != dark["background"]


def test_it_is_searched_without_a_network(seen):
    for window in seen.values():
        assert any("Speculation" in title for title in window["found"])
