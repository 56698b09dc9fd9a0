"""The CPU's Team is what csrc/cuda/team.h says, and finds what would be undefined on a device."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.cluster import build

pytestmark = pytest.mark.skipif(build.COMPILER is None, reason="needs g++")

# The other two are not built with sanitizers.
BUILDS = ("plain",) if build.SANITIZE else ("plain", "races", "ucontext")
BLOCKS = (1, 2, 4, 8, 16)


def run(name, blocks=4, threads=64, seed=0, kind="plain"):
    """What a kernel of primitives.cpp wrote, a number a thread, and what was wrong."""
    program = build.library("primitives", races=kind == "races", ucontext=kind == "ucontext")
    program.cluster_run.restype = ctypes.c_char_p
    out = np.zeros(blocks * threads, np.uint64)
    error = program.cluster_run(
        name.encode(), blocks, threads, ctypes.c_uint64(seed), out.ctypes.data_as(ctypes.c_void_p)
    )
    return out, error and error.decode()


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize("threads", (32, 64, 256))
@pytest.mark.parametrize("blocks", BLOCKS)
def test_barriers_shuffles_and_shared_memory(blocks, threads, kind):
    for seed in range(3):
        out, error = run("everything", blocks, threads, seed, kind)
        n = blocks * threads
        assert error is None
        assert (out == n * (n + 1) // 2).all()


REACHES = {
    "lane to lane": lambda i: i // 32 * 32 + (i + 1) % 32,
    "warp to warp": lambda i: i // 64 * 64 + (i + 32) % 64,
    "block to block": lambda i: (i + 192) % 256,
}
MISSING = ("no sync_warp", "no sync", "no await")


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize(("name", "missing"), list(zip(REACHES, MISSING, strict=True)))
def test_a_missing_barrier_shows(name, missing, kind):
    """In what comes out, and as what it is where accesses are checked."""
    wanted = REACHES[name](np.arange(256))
    shown = 0
    for seed in range(20):
        out, error = run(name, seed=seed, kind=kind)
        assert error is None and (out == wanted).all()
        out, error = run(missing, seed=seed, kind=kind)
        shown += bool((out != wanted).any())
        assert (error is None) if kind != "races" else error.startswith("race: ")
    assert shown == 20


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("half a block", "32 of the 64 threads of block 3 wait at sync (primitives.cpp:"),
        ("one block", "64 of the 256 threads of the cluster wait at arrive_cluster"),
        ("one block", "192 threads have returned"),
        ("half a warp", "16 of the 32 threads of warp 1 of block 2 wait at ballot"),
        ("two places", "are at different barriers: sync_warp ("),
        ("lane 32", "shuffle: lane, or number of lanes, 32"),
        ("message: to block 4", "send: block 4 of a cluster of 4"),
        ("message: outside", "send: byte 4224 is outside the 4096 bytes of block"),
        ("message: off 8", "no multiple of 8"),
        ("message: parity", "waits for the end of a phase of parity 1, but has seen the end of 0"),
        ("message: not announced", "0 blocks have announced messages, -8 bytes are missing"),
        ("message: not awaited", "has returned, but not awaited all messages"),
        ("no box", "has not opened this box"),
        ("opens late", "open: after the arrival at the cluster's barrier"),
        ("not started", "has not waited at the cluster's barrier: it may not have started"),
        ("arrives twice", "has arrived at the cluster's barrier already"),
        ("only waits", "has not arrived at the cluster's barrier"),
        ("only arrives", "returns without waiting at the cluster's barrier"),
        ("misaligned", "is not a multiple of 16"),
    ],
)
def test_what_is_undefined_is_an_error(name, error, kind):
    for seed in range(5):
        assert error in (run(name, seed=seed, kind=kind)[1] or "")


def test_messages_need_two_blocks():
    assert "undefined in a cluster of one block" in (run("message: alone", blocks=1)[1] or "")


def test_one_box_is_not_enough_for_turns():
    """A block that is quick announces its next turn to the box of one that still waits."""
    assert any(run("no second box", seed=seed)[1] for seed in range(40))


def test_a_message_to_a_block_that_has_returned_is_an_error():
    for seed in range(5):
        error = run("message: to who is gone", seed=seed)[1] or ""
        assert "which has returned" in error or "not awaited all messages" in error


@pytest.mark.skipif(build.SANITIZE, reason="AddressSanitizer would end the process there")
def test_a_write_past_the_end_of_shared_memory_is_found():
    assert "shared memory of 4096 bytes was written to" in (run("past the end")[1] or "")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("past the end", "byte 4096 of block"),
        ("unwritten", "that nothing has written"),
        ("adds without order", "updates byte 0 of block"),
        ("adds and reads", "with no barrier after"),
        ("no acquire", "with no release and acquire after"),
        ("no last acquire", "with no barrier after thread"),
        ("no turn between", "with no release and acquire after"),
        ("no release", "with no release and acquire after"),
    ],
)
@pytest.mark.skipif(build.SANITIZE, reason="accesses are checked by other means there")
def test_accesses_that_only_their_check_finds(name, error):
    found = [run(name, seed=seed, kind="races")[1] for seed in range(20)]
    assert any(error in (one or "") for one in found), found[0]


def test_what_a_seed_did_it_does_again():
    orders = [run("order", 2, 64, seed)[0].tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(128))
