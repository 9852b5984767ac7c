"""Measures one case: every provider verified, interleaved with the others, and set against the machine's own peak.

What a number means here:
- Providers run round-robin in one process, in an order that changes every round, so that drift of the machine (clocks,
  neighbours) meets all of them. Reported: median and quartiles of the time per call.
- Inputs rotate through enough sets to exceed twice the cache that a layer would find cold: the L2 of a GPU, the L2 of
  the cores in use on a CPU (a CPU's last level is often shared by a whole host and may hold everything; the copy peak
  is therefore measured at the same footprint, and the two compare like with like). Outputs stay alive for a batch.
- CPU outputs come from memory that the process already owns: malloc keeps what is freed. With `fresh=True` it returns
  it, and every large output pays its page faults (up to 7 times the kernel's own time on a virtual machine).
- `fwd` runs under no_grad, `bwd` is the backward pass alone (its graphs are built before the clock starts),
  `fwd_bwd` is both. `host_*` is the cost per call of a tiny tensor on one thread.
- Each provider gets output gradients in the layout of its own output.
- Outputs and gradients are compared with float64 before and after the timing, on fresh random inputs; tensors are
  filled with NaN before our own kernels write them. A provider that is wrong is timed, but is nobody's yardstick.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable

import torch

from .case import DTYPE_NAMES, Case, InputSet, Judge, Provider

SAMPLE_NS = 200_000
HOST_SAMPLE_NS = 2_000_000


class Clock:
    """Nanoseconds of `run`, on the CPU. `prepare` returns `run` after what must not be timed is done."""

    def __init__(self, device: torch.device):
        self.synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def __call__(self, prepare: Callable[[], Callable[[], None]]) -> float:
        run = prepare()
        self.synchronize()
        start = time.perf_counter_ns()
        run()
        elapsed = time.perf_counter_ns() - start
        self.synchronize()
        return elapsed


class CudaClock:
    """Nanoseconds of `run` on the GPU. A spinning kernel goes first, so that the work is queued before it starts and
    the host's own cost stays out; the spin is lengthened until that is so."""

    def __init__(self):
        self.cycles = 500_000

    def __call__(self, prepare: Callable[[], Callable[[], None]]) -> float:
        for _ in range(8):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            run = prepare()
            torch.cuda.synchronize()
            torch.cuda._sleep(self.cycles)
            start.record()
            run()
            end.record()
            queued_in_time = not start.query()
            torch.cuda.synchronize()
            if queued_in_time:
                break
            self.cycles = min(2 * self.cycles, 100_000_000)
        return start.elapsed_time(end) * 1e6


def batch(mode: str, provider: Provider, chosen: list[InputSet], keep: Callable) -> Callable[[], None]:
    """The timed loop over `chosen`. `keep` receives what a call returns, and so decides how long it lives."""
    fn, grad = provider.fn, torch.autograd.grad
    calls = [(s.args, s.wrt, None if mode.endswith("fwd") else s.grads_like(provider.strides)) for s in chosen]

    def forward():
        with torch.no_grad():
            for args, _, _ in calls:
                keep(fn(*args))

    def forward_backward():
        for args, wrt, grads in calls:
            outputs = fn(*args)
            keep((outputs, grad(outputs, wrt, grads)))

    if mode.endswith("fwd"):
        return forward
    if mode.endswith("fwd_bwd"):
        return forward_backward
    pending = [(fn(*args), wrt, grads) for args, wrt, grads in calls]

    def backward():
        for outputs, wrt, grads in pending:
            keep(grad(outputs, wrt, grads))

    return backward


@contextlib.contextmanager
def _silenced_stderr():
    """The profiler of some torch versions writes a line per start and stop straight to file descriptor 2."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def peak_memory(device: torch.device, prepare: Callable[[], Callable[[], None]]) -> int:
    """Bytes that `run` adds at its highest point, by torch's allocators: all that torch.empty gives, ours included."""
    run = prepare()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - base
    cpu = torch.profiler.ProfilerActivity.CPU
    with _silenced_stderr(), torch.profiler.profile(activities=[cpu], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    running = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        running += event.nbytes()
        peak = max(peak, running)
    return peak


def set_count(nbytes: int, cache_bytes: int) -> int:
    """How many input sets of `nbytes` per call exceed twice the cache."""
    return max(2, min(64, math.ceil(2 * cache_bytes / max(nbytes, 1)) + 1))


def reuse_freed_memory() -> None:
    """Tells glibc to keep what is freed, so that outputs do not pay for page faults."""
    m_trim_threshold, m_mmap_max = -1, -4
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


class Bench:
    """The settings of one run, its clocks, and the peaks that the machine reaches in it."""

    def __init__(self, device: str, quick: bool = False, threads: int | None = None, fresh: bool = False):
        self.device = torch.device(device)
        self.rounds = 7 if quick else 15
        self.threads = threads or torch.get_num_threads()
        self.fresh = fresh
        cuda = self.device.type == "cuda"
        if cuda:
            self.cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        else:
            l2 = os.sysconf("SC_LEVEL2_CACHE_SIZE") if "SC_LEVEL2_CACHE_SIZE" in os.sysconf_names else 0
            self.cache_bytes = (l2 if l2 > 0 else 2 << 20) * self.threads
            if not fresh and os.name == "posix" and hasattr(ctypes.CDLL(None), "mallopt"):
                reuse_freed_memory()
        self.host_clock = Clock(self.device)
        self.clock = CudaClock() if cuda else self.host_clock
        self.copy_peaks: dict[int, float] = {}
        self.matmul_peaks: dict[str, float] = {}

    def _best(self, nbytes_or_flops: int, prepare: Callable, calls: int) -> float:
        times = [self.clock(prepare) for _ in range(4 * self.rounds)]
        return nbytes_or_flops * calls / min(times)  # per nanosecond: GB/s or GFLOP/s

    def copy_peak(self, nbytes: int) -> float:
        """GB/s, read plus written, of a copy that moves about `nbytes` per call, cold by the same rule as the cases."""
        bucket = 1 << max(16, round(math.log2(max(nbytes, 1))))
        if bucket not in self.copy_peaks:
            count = set_count(bucket, self.cache_bytes)
            source, target = ([torch.rand(bucket // 8, device=self.device) for _ in range(count)] for _ in range(2))
            calls = max(count, math.ceil((4 << 20) / bucket))

            def run():
                for k in range(calls):
                    target[k % count].copy_(source[k % count])

            self.copy_peaks[bucket] = self._best(bucket, lambda: run, calls)
        return self.copy_peaks[bucket]

    def matmul_peak(self, dtype: torch.dtype) -> float:
        """GFLOP/s of a large square matrix product on random data."""
        name = DTYPE_NAMES[dtype]
        if name not in self.matmul_peaks:
            n = 8192 if self.device.type == "cuda" else 1536
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            self.matmul_peaks[name] = self._best(2 * n**3, lambda: lambda: a @ b, 1)
        return self.matmul_peaks[name]

    def floor_ns(self, case: Case, mode: str) -> float | None:
        """The time below which this machine cannot do it: bytes at copy speed or FLOPs at matmul speed."""
        if mode.startswith("host") or not case.nbytes.get(mode):
            return None
        return max(
            case.nbytes[mode] / self.copy_peak(case.nbytes[mode]),
            case.flops.get(mode, 0) / self.matmul_peak(case.dtype),
        )

    def measure(self, case: Case, mode: str, providers: list[Provider]) -> dict:
        """One entry of the JSON file: `case` in `mode`, by every provider."""
        host = mode.startswith("host")
        torch.set_num_threads(1 if host else self.threads)
        try:
            return self._measure(case, mode, providers, host)
        finally:
            torch.set_num_threads(self.threads)

    def _measure(self, case: Case, mode: str, providers: list[Provider], host: bool) -> dict:
        first = InputSet(case, 1, self.device)
        count = 1 if host else set_count(min(case.nbytes.values()), self.cache_bytes)
        judge = Judge(case, mode, 1001, self.device)
        for provider in providers:
            self._guarded(provider, lambda p: judge.verify(p, poison=p.ours))
        sets = [first] + [InputSet(case, 1 + k, self.device, first.output_shapes) for k in range(1, count)]
        calls = self._time(mode, [p for p in providers if p.strides], sets, host)
        judge = Judge(case, mode, 1002, self.device)
        for provider in providers:
            if provider.samples:
                self._guarded(provider, judge.verify)
                self._guarded(provider, lambda p: self._peak_memory(p, mode, first))
        return self._entry(case, mode, providers, len(sets), calls)

    @staticmethod
    def _guarded(provider: Provider, step: Callable[[Provider], object]) -> None:
        try:
            step(provider)
        except Exception as error:  # whatever a provider raises is its result, not the end of the run
            text = str(error).strip().splitlines()
            provider.fail(f"{type(error).__name__}: {text[0] if text else ''}")

    def _peak_memory(self, provider: Provider, mode: str, given: InputSet) -> None:
        held: list = []
        provider.peak_bytes = peak_memory(self.device, lambda: batch(mode, provider, [given], held.append))

    def _time(self, mode: str, providers: list[Provider], sets: list[InputSet], host: bool) -> int:
        clock = self.host_clock if host else self.clock
        held: list | deque = deque(maxlen=0) if host else []
        position = 0

        def sample(provider: Provider, calls: int) -> float:
            nonlocal position
            chosen = [sets[(position + k) % len(sets)] for k in range(calls)]
            position += calls  # shared: the next provider must not find these inputs in the cache
            elapsed = clock(lambda: batch(mode, provider, chosen, held.append))
            held.clear()
            return elapsed / calls

        def attempt(provider: Provider, calls: int) -> float:
            times: list[float] = []
            self._guarded(provider, lambda p: times.append(sample(p, calls)))
            return times[0] if times else math.inf

        gc.collect()
        gc.disable()
        try:
            warm = 20 if host else 2
            fastest = min((min(attempt(p, warm) for _ in range(3)) for p in providers), default=math.inf)
            target, most = (HOST_SAMPLE_NS, 2000) if host else (SAMPLE_NS, 256)
            if self.device.type == "cuda":
                most = 100 if host else 32  # launches wait in a queue of limited length
            calls = max(1, min(most, math.ceil(target / fastest)))
            if mode == "bwd" or (self.device.type == "cuda" and not host):
                calls = max(calls, len(sets))  # so that a batch cycles through more than the cache
            for turn in range(-1, self.rounds):  # round -1 warms up
                k = turn % max(len(providers), 1)
                order = providers[k:] + providers[:k]
                for provider in order if turn % 2 else order[::-1]:
                    elapsed = attempt(provider, calls)
                    if turn >= 0 and elapsed < math.inf:
                        provider.samples.append(elapsed)
        finally:
            gc.enable()
        return calls

    def _entry(self, case: Case, mode: str, providers: list[Provider], sets: int, calls: int) -> dict:
        floor = self.floor_ns(case, mode)
        entry = {
            "op": case.op,
            "function": case.function,
            "group": case.group,
            "name": case.name,
            "shape": list(case.shape),
            "params": case.params,
            "dtype": DTYPE_NAMES[case.dtype],
            "mode": mode,
            "bytes": case.nbytes.get(mode),
            "flops": case.flops.get(mode),
            "threads": 1 if mode.startswith("host") else self.threads,
            "input_sets": sets,
            "calls_per_sample": calls,
            "floor_us": None if floor is None else floor / 1e3,
            "providers": {},
        }
        for p in providers:
            report = {"ours": p.ours, "correct": not p.failure, "failure": p.failure, "errors": p.errors}
            report["peak_bytes"] = p.peak_bytes
            report |= {"min_us": None, "q25_us": None, "median_us": None, "q75_us": None, "samples": len(p.samples)}
            if len(p.samples) > 1:
                quartiles = statistics.quantiles(p.samples, n=4, method="inclusive")
                times = [min(p.samples), *quartiles]
                report |= dict(zip(("min_us", "q25_us", "median_us", "q75_us"), (t / 1e3 for t in times)))
                if floor is not None:
                    report["gb_per_s"] = case.nbytes[mode] / quartiles[1]
                    report["percent_of_peak"] = 100 * floor / quartiles[1]
            entry["providers"][p.name] = report
        return entry
