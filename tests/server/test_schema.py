"""The server keeps to its own OpenAPI: schemathesis makes requests of it.

A few cases here; ``PROXYTUNE_FUZZ=1`` makes 2,000 and more, in all of schemathesis' phases.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("schemathesis", reason="the package schemathesis is not installed")

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_schema_conformance"
)
THOROUGH = os.environ.get("PROXYTUNE_FUZZ") == "1"


def test_random_requests_get_documented_answers(server, tmp_path):
    amount = ["--max-examples", "150"] if THOROUGH else ["--max-examples", "5", "--phases=fuzzing"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
            *("--checks", CHECKS, "--request-timeout", "30", "--seed", "7", *amount),
        ],
        capture_output=True, text=True, check=False, timeout=1800, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert found is not None and found[1] == found[2]
    assert int(found[1]) >= (2000 if THOROUGH else 20)
    server.wait_idle()


def test_every_answer_is_documented_and_no_other(server):
    schema = json.loads(server.ask("/openapi.json")[1])
    documented = {
        f"{method} {path}": sorted(operation["responses"])
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    }
    generation = ["200", "400", "401", "404", "413", "429", "500", "503"]
    tokens = ["200", "400", "401", "404", "413", "500"]
    assert documented == {
        "post /v1/completions": generation,
        "post /v1/chat/completions": generation,
        "get /v1/models": ["200", "401"],
        "get /v1/models/{name}": ["200", "401", "404"],
        "post /tokenize": tokens,
        "post /detokenize": tokens,
        "get /": ["200"],
        "get /health": ["200", "503"],
        "get /metrics": ["200", "401"],
    }
