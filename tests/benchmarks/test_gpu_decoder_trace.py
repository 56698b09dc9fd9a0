"""Profiles of the decoder: what is read from a trace, and the pictures."""

import json
import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch.profiler import ProfilerActivity

from benchmarks.gpu.decoder import trace
from benchmarks.gpu.decoder.trace import NoKernels, Trace, Work, idle, merged


def kernel(start, end, stream=7, name="k"):
    return Work(name, "kernel", start, end, stream)


def event(name, cat, ts, dur, **args):
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "args": args}


class TestTrace:
    def test_read(self, tmp_path):
        path = tmp_path / "trace.json"
        events = [
            {"ph": "M", "name": "process_name", "cat": "kernel"},
            event("late", "kernel", 30.5, 2, stream=7),
            event("early", "kernel", 10, 5, stream=13),
            event("Memcpy DtoH", "gpu_memcpy", 12, 1, stream=7),
            event("Memset", "gpu_memset", 11, 1, stream=7),
            event("aten::mm", "cpu_op", 0, 99),
            event("cudaGraphLaunch", "cuda_runtime", 1, 1),
            event("cudaEventSynchronize", "cuda_runtime", 2, 1),
            event("cudaEventSynchronize", "cuda_runtime", 4, 1),
            event("cuStreamSynchronize", "cuda_driver", 5, 1),
            event("cudaStreamSynchronize", "cpu_op", 5, 1),
        ]
        path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": events}))
        found = trace.read(path)
        assert found.work == (
            Work("early", "kernel", 10.0, 15.0, 13),
            Work("Memset", "fill", 11.0, 12.0, 7),
            Work("Memcpy DtoH", "copy", 12.0, 13.0, 7),
            Work("late", "kernel", 30.5, 32.5, 7),
        )
        assert [k.name for k in found.kernels] == ["early", "late"]
        assert found.waits == Counter(cudaEventSynchronize=2, cuStreamSynchronize=1)

    def test_a_profile_of_this_processor_has_no_kernels(self, tmp_path):
        ran = []

        def run():
            ran.append(torch.ones(4) + 1)

        found = trace.record(run, tmp_path / "trace.json", ProfilerActivity.CPU)
        assert len(ran) == 1
        written = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        assert "aten::add" in {e["name"] for e in written}
        assert found.work == ()
        with pytest.raises(NoKernels):
            idle(found.kernels)

    def test_merged_is_the_union(self):
        rng = random.Random(0)
        for _ in range(200):
            starts = rng.choices(range(40), k=rng.randint(1, 9))
            spans = [(start, start + rng.randint(1, 6)) for start in starts]
            covered = set().union(*(range(start, end) for start, end in spans))
            union = merged(spans)
            assert set().union(*(range(int(a), int(b)) for a, b in union)) == covered
            assert all(a[1] < b[0] for a, b in pairwise(union))

    def test_idle(self):
        # busy in [10, 20) on two streams, [21, 24), [24, 30): idle for 1 of 20
        spans = [(10, 18, 7), (12, 20, 8), (13, 14, 7), (21, 24, 7), (24, 30, 7)]
        kernels = [kernel(*span) for span in spans]
        found = idle(kernels)
        assert (found.microseconds, found.share) == (20, 1 / 20)
        assert found.gaps == ((20, 21),)
        assert found.longest == 1
        assert idle(kernels[:3]).share == 0.0
        assert idle(kernels[:3]).longest == 0.0

    def test_middle(self):
        ten_steps = Trace(tuple(kernel(100 + 10 * i, 109 + 10 * i) for i in range(10)), Counter())
        start, end = trace.middle(ten_steps, 10, 3)
        # 99 in all, around 149.5
        assert (start, end) == pytest.approx((149.5 - 1.5 * 9.9, 149.5 + 1.5 * 9.9))


NAMES = {
    "nvjet_tst_64x8_64x16_4x1_v_bz_TNT": "products",
    "void cutlass::Kernel2<cutlass_80_tensorop>": "products",
    "void gemv2T_kernel_val": "products",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
    "void flash_fwd_splitkv_kernel": "attention",
    "_scan_kernel": "sampling",
    "_finish_kernel": "sampling",
    "void proxytune::cluster_sample<__nv_bfloat16>": "sampling",
    "void at::native::vectorized_elementwise_kernel<4>": "rest",
}


class TestPictures:
    def test_kinds(self):
        plots = pytest.importorskip("benchmarks.gpu.decoder.plots")
        got = {name: plots.kind_of(kernel(0, 1, name=name)) for name in NAMES}
        assert got == NAMES
        assert plots.kind_of(Work("Memcpy DtoH", "copy", 0, 1, 7)) == "copies"

    def test_bars_are_cut_to_what_is_shown(self):
        plots = pytest.importorskip("benchmarks.gpu.decoder.plots")
        from matplotlib.figure import Figure

        axes = Figure().subplots()
        spans = [(0, 500), (900, 1500), (1800, 3000), (2500, 2600)]
        plots._bars(axes, 1, spans, (1000, 2000), "#000000")
        [bars] = axes.collections
        boxes = [path.get_extents() for path in bars.get_paths()]
        # milliseconds from the window's start
        assert [x for b in boxes for x in (b.x0, b.x1)] == pytest.approx([0.0, 0.5, 0.8, 1.0])
        assert {(b.y0, b.y1) for b in boxes} == {(0.6, 1.4)}

    def test_timeline(self, tmp_path):
        plots = pytest.importorskip("benchmarks.gpu.decoder.plots")
        work = [kernel(10 * i, 10 * i + 8, 7 + i % 2, "nvjet") for i in range(40)]
        found = Trace((*work, Work("Memcpy", "copy", 401, 402, 7)), Counter())
        plots.plot_trace(found, (100.0, 300.0), tmp_path / "trace.png", "title")
        assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
