"""The server as a process: signals, a kill, the port; and the page of the documentation."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
import threading
from contextlib import closing
from functools import partial
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

import proxytune_kernels.server
from benchmarks.load import load, port_of, start
from proxytune_kernels import Decoder, load_trio
from proxytune_kernels.server.process import DecoderProcess
from proxytune_kernels.server.run import listen
from tests.cli import assert_one_sentence, invoke
from tests.documents import examples, run_example
from tests.server.serving import PROMPT, wait_for

LONG = {"model": "shipped", "prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": True}


def stream(port):
    """A stream that goes on for long; its first token is there."""
    headers = {"content-type": "application/json"}
    request = Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(LONG).encode(), headers)
    answer = urlopen(request, timeout=60)
    assert answer.readline().startswith(b"data: ")
    return answer


def child_of(pid):
    """The process in which a server's decoder is."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    [child] = [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return int(child)


def has_ended(pid):
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX"


def test_signals_end_it_and_a_kill_leaves_nothing_behind():
    processes = [start("--trio", "shipped") for _ in range(3)]
    try:
        killed, stopped, lost = processes
        ports = [port_of(process) for process in processes]
        with stream(ports[0]):
            decoder = child_of(killed.pid)
            killed.kill()
            assert killed.wait(10) == -signal.SIGKILL
        listen("127.0.0.1", ports[0]).close()  # the port is free at once
        wait_for(lambda: has_ended(decoder))

        with stream(ports[2]) as running:
            os.kill(child_of(lost.pid), signal.SIGKILL)
            last = running.read().strip().split(b"\n")[-1]
            assert b"the decoder failed" in last
        assert lost.wait(20) == 1

        with stream(ports[1]) as running:
            stopped.terminate()
            # It takes nothing new, and goes on with what runs.
            while True:
                try:
                    socket.create_connection(("127.0.0.1", ports[1]), timeout=5).close()
                except OSError:
                    break
            assert running.readline() == b"\n" and running.readline().startswith(b"data: ")
            assert stopped.poll() is None
            stopped.terminate()
            assert stopped.wait(5) == 128 + signal.SIGTERM  # a second signal ends it at once
    finally:
        for process in processes:
            process.kill()
            process.wait(30)


def test_an_event_loop_does_not_wait_for_a_step():
    """However much it sends: a decoder that is stopped is in its step for long."""
    with DecoderProcess(partial(Decoder, load_trio("shipped"))) as served:
        assert served.wait() is None
        served.start(lambda *message: None)
        os.kill(served.pid, signal.SIGSTOP)
        sender = threading.Thread(target=served.put, args=("cancel", "x" * 2**23), daemon=True)
        sender.start()
        sender.join(30)
        waits = sender.is_alive()
        os.kill(served.pid, signal.SIGCONT)
    assert not waits


@pytest.mark.skipif(shutil.which("curl") is None, reason="the documentation's commands use curl")
def test_the_commands_of_the_documentation_run(tmp_path):
    pytest.importorskip("openai", reason="the package openai is not installed")
    with closing(listen("127.0.0.1", 0)) as bound:
        port = str(bound.getsockname()[1])
    commands = "\n".join(examples("docs/serving.md", "sh")).replace("8000", port)
    [client] = examples("docs/serving.md", "python")
    (tmp_path / "client.py").write_text(client.replace("8000", port))
    commands = f"trap 'kill $(jobs -p) 2> /dev/null || true' EXIT\n{commands}"
    printed = run_example(tmp_path, commands, "bash", "-ec")
    assert printed.count("3 + 4 = 7") >= 3, printed  # curl, Python's client, chat
    assert "the server ended with 0" in printed


def test_load_loses_nothing_and_answers_nothing_twice(server):
    seen = asyncio.run(load(server.port, clients=20, requests=range(60), max_tokens=6))
    assert sorted(seen.answers.values()) == list(range(60))
    assert seen.tokens == 360 and seen.statuses == {200: 60}
    server.wait_idle()


def test_mistakes_at_the_command_line_are_one_sentence(tmp_path, monkeypatch):
    serve = ["serve", "--trio", "shipped"]
    with closing(listen("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
        bound.listen()
        assert_one_sentence(invoke(*serve, "--port", port), 1, "in use")
    key = tmp_path / "key"
    key.write_text("a")
    both = ("--api-key", "b", "--api-key-file", key)
    assert_one_sentence(invoke(*serve, *both), 2, "--api-key-file")
    assert_one_sentence(invoke(*serve, "--api-key-file", tmp_path / "none"), 1, "No such file")
    assert_one_sentence(invoke(*serve, PROXYTUNE_API_KEY="\n"), 2, "printable")
    assert_one_sentence(invoke("serve", "--port", "0"), 2, "no models")


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "proxytune_kernels.server.app", None)
    monkeypatch.delattr(proxytune_kernels.server, "app")
    assert_one_sentence(invoke("serve", "--trio", "shipped"), 1, "[serve]")
