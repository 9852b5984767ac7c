"""The SIMT executor itself: what it computes, and that it sees every kind of fault it is there to see."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from simt import Executor, build, guarded_call, load
from simt.mutate import mutants, tsan, written_places
from torch import Tensor

HERE = Path(__file__).parent


class Selftest(Executor):
    """The small kernels of simt/selftest.cu."""

    def __init__(self):
        super().__init__(build("selftest"))
        self.lib.selftest_run.restype = ctypes.c_char_p
        size, pointer = ctypes.c_size_t, ctypes.c_void_p
        self.lib.selftest_run.argtypes = [
            *(ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, size),
            *(pointer, pointer, ctypes.c_int64, ctypes.c_int),
        ]

    def run(self, kernel: str, x: Tensor, y: Tensor, *, blocks: int = 1, threads: int = 64, smem: int = 0,
            n: int = 0, variant: int = 0) -> Tensor:  # fmt: skip
        """Runs a kernel on guarded copies of x and y; y, which the kernel writes, is returned."""

        def selftest(x_copy: Tensor, y_copy: Tensor) -> None:
            y_copy.copy_(y)
            options = (blocks, threads, smem, x_copy.data_ptr(), y_copy.data_ptr(), n, variant)
            if report := self.lib.selftest_run(kernel.encode(), *options):
                raise RuntimeError(report.decode())

        guarded_call(self.lib, selftest, ("x", "y"), {"y"}, (x, y))
        return y


@pytest.fixture
def selftest() -> Iterator[Selftest]:
    executor = Selftest()
    executor.set_seed(1)
    yield executor
    executor.enable_all()


def empty(n: int) -> Tensor:
    return torch.full((n,), torch.nan)


# ---- what it computes ----


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_block_reduction(selftest: Selftest, threads: int, seed: int) -> None:
    selftest.set_seed(seed)
    x = torch.randn(5, 700)
    y = selftest.run("block_sum_kernel", x, empty(5), blocks=5, threads=threads, smem=256, n=700)
    torch.testing.assert_close(y, x.double().sum(1).float(), atol=1e-4, rtol=1e-4)


def test_barriers_order_shared_memory(selftest: Selftest) -> None:
    x = torch.randn(7, 96)
    y = selftest.run("reverse_kernel", x, empty(7 * 96), blocks=7, threads=96, smem=384)
    assert torch.equal(y.view(7, 96), x.flip(1))


def test_warp_barrier(selftest: Selftest) -> None:
    x = torch.randn(4, 32)
    y = selftest.run("warp_rotate_kernel", x, empty(128), threads=128, smem=512)
    assert torch.equal(y.view(4, 32), x.roll(-1, 1))


LANES = torch.arange(32)


def exchanged(variant: int, x: Tensor) -> Tensor:
    """What exchange_kernel computes, for x of one warp per row."""
    down = torch.where(LANES % 16 + 3 < 16, LANES + 3, LANES)
    source = {
        0: torch.full((32,), 5),
        1: LANES * 7 % 32,
        2: LANES // 8 * 8 + 3,
        3: torch.where(LANES + 4 < 32, LANES + 4, LANES),
        4: down,
        5: LANES ^ 16,
        6: LANES ^ 1,
        11: torch.where(LANES < 16, LANES ^ 8, LANES ^ 4),
        12: LANES ^ 2,
    }
    if variant in source:
        return x[:, source[variant]]
    if variant in (7, 8):  # butterfly sums
        offset = 16 if variant == 7 else 4
        while offset > 0:
            x, offset = x + x[:, LANES ^ offset], offset // 2
        return x
    if variant == 9:
        bits = ((x > 0).long() << LANES).sum(1, keepdim=True)
        return (bits >> 8 & 0xFFFF).float().expand(-1, 32)
    any_all = (x > 2.5).any(1).float() + 2 * (x > -2.5).all(1).float()
    return any_all[:, None].expand(-1, 32)


@pytest.mark.parametrize("variant", range(13))
def test_exchange(selftest: Selftest, variant: int) -> None:
    x = torch.randn(3, 32)
    x[0, 7], x[1, 9] = 3.0, -3.0
    y = selftest.run("exchange_kernel", x, empty(96), threads=96, variant=variant)
    assert torch.equal(y.view(3, 32), exchanged(variant, x))


def test_shuffle_from_a_lane_outside_the_mask_gives_poison(selftest: Selftest) -> None:
    y = selftest.run("foreign_lane_fault", torch.randn(32), empty(32), threads=32)
    assert y[:16].isnan().all()


def test_atomics(selftest: Selftest) -> None:
    x = torch.randint(-8, 9, (999,)).float()  # exact in any order
    y = selftest.run("atomic_sum_kernel", x, torch.zeros(1), blocks=16, n=999)
    assert y.item() == x.sum().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions(selftest: Selftest, dtype: torch.dtype) -> None:
    """Every 16-bit value, every midpoint between two, and what lies just beside them."""
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    wide = torch.cat([exact, (exact[:-1] + exact[1:]) / 2, torch.randn(4096) * 10.0 ** torch.randint(-9, 9, (4096,))])
    wide = torch.cat([wide, wide.nextafter(torch.tensor(torch.inf)), wide.nextafter(torch.tensor(-torch.inf))])
    y = selftest.run("convert_kernel", wide, empty(wide.numel()), n=wide.numel(), variant=int(dtype == torch.float16))
    torch.testing.assert_close(y, wide.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(y.signbit()[~y.isnan()], wide.signbit()[~y.isnan()])


def test_philox(selftest: Selftest) -> None:
    """The answers that the generator's authors publish (Random123, kat_vectors)."""
    for word, answer in [(0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"), (-1, "408f276d 41c83b0e a20bc7c6 6d5451fd")]:
        y = selftest.run("philox_kernel", torch.zeros(1), empty(4), threads=1, variant=word)
        assert [f"{v & 0xFFFFFFFF:08x}" for v in y.view(torch.int32).tolist()] == answer.split()


# ---- matrix instructions ----


def fragment(rows: int, columns: int, lane: tuple[int, int], element: tuple[int, ...]) -> Tensor:
    """[32, elements of a lane]: their places in a matrix by rows.

    Written as CuTe writes its layouts (cute/atom/mma_traits_sm80.hpp): the matrix lies by columns there; the steps are
    those of lane % 4 and lane // 4, and of the bits of the element's number from the lowest on.
    """
    numbers = torch.zeros(1, dtype=torch.long)
    for step in element:
        numbers = torch.cat([numbers, numbers + step])
    place = (LANES % 4 * lane[0] + LANES // 4 * lane[1])[:, None] + numbers
    assert torch.equal(place.flatten().sort().values, torch.arange(rows * columns))
    return place % rows * columns + place // rows


A_16X16, B_8X16 = fragment(16, 16, (32, 1), (16, 8, 128)), fragment(8, 16, (16, 1), (8, 64))
D_16X8, D_8X8 = fragment(16, 8, (32, 1), (16, 8)), fragment(8, 8, (16, 1), (8,))
MMA = {  # variant of mma_kernel, dtype of the operands, (M, N, K), places of a [M, K], b [N, K] and d [M, N]
    "bf16": (0, torch.bfloat16, (16, 8, 16), (A_16X16, B_8X16, D_16X8)),
    "f16": (1, torch.float16, (16, 8, 16), (A_16X16, B_8X16, D_16X8)),
    "tf32": (
        *(2, torch.float32, (16, 8, 8)),
        (fragment(16, 8, (16, 1), (8, 64)), fragment(8, 8, (8, 1), (32,)), D_16X8),
    ),
    "f64": (3, torch.float64, (8, 8, 4), (fragment(8, 4, (8, 1), ()), fragment(8, 4, (8, 1), ()), D_8X8)),
}


def run_mma(selftest: Selftest, kind: str, a: Tensor, b: Tensor, d: Tensor, times: int = 1) -> Tensor:
    """d + times * a b of each problem, one to a warp, through the lanes' registers."""
    variant, _, _, places = MMA[kind]
    problems = a.shape[0]
    parts = [t.flatten(1)[:, place].contiguous().view(torch.float32) for t, place in zip((a, b, d), places)]
    x = torch.cat([*parts, torch.zeros(problems, 32, 10)], dim=2)[:, :, :10].contiguous()
    y = selftest.run("mma_kernel", x, empty(problems * 128), blocks=problems // 2, n=times, variant=variant)
    out = torch.empty_like(d)
    out.flatten(1)[:, places[2].flatten()] = y.view(problems, -1).view(d.dtype)
    return out


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", MMA)
def test_mma(selftest: Selftest, kind: str, seed: int) -> None:
    """Bits as of a loop over k: the products are exact, and the sums are rounded one by one."""
    selftest.set_seed(seed)
    _, dtype, (m, n, k), _ = MMA[kind]
    acc = torch.float64 if kind == "f64" else torch.float32

    def operand(rows: int) -> Tensor:  # spread over the exponents, subnormal f16 among them
        return (torch.randn(40, rows, k) * 2.0 ** torch.randint(-18, 4, (40, rows, k))).to(dtype)

    a, b, d = operand(m), operand(n), torch.randn(40, m, n).to(acc)
    expected = d.clone()
    wide_a, wide_b = a.to(acc), b.to(acc)
    if kind == "tf32":
        wide_a, wide_b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
        assert not torch.equal(wide_a, a)
    for i in range(k):
        expected += wide_a[:, :, None, i] * wide_b[:, None, :, i]
    assert torch.equal(run_mma(selftest, kind, a, b, d), expected)


@pytest.mark.parametrize("kind", MMA)
def test_mma_accumulates(selftest: Selftest, kind: str) -> None:
    _, dtype, (m, n, k), _ = MMA[kind]
    a, b = (torch.randint(-4, 5, (2, rows, k)).to(dtype) for rows in (m, n))
    d = torch.randint(-4, 5, (2, m, n)).to(torch.float64 if kind == "f64" else torch.float32)
    expected = d.double() + 5 * a.double() @ b.double().mT
    assert torch.equal(run_mma(selftest, kind, a, b, d, times=5).double(), expected)


SHUFFLED_ROWS = torch.arange(64) * 13 % 64  # the row of shared memory of each thread


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_ldmatrix(selftest: Selftest, matrices: int, transpose: bool) -> None:
    variant = (matrices // 2) * 2 + transpose
    rows = torch.randint(-(2**15), 2**15, (3, 64, 8), dtype=torch.int16)  # any bits
    y = selftest.run("ldmatrix_kernel", rows.view(torch.float32), empty(3 * 256), blocks=3, smem=1024, variant=variant)
    registers = y.view(3, 64, 4).view(torch.int16).view(3, 2, 32, 4, 2)
    for block in range(3):
        for warp in range(2):
            for i in range(matrices):
                first = 32 * warp + 8 * i
                matrix = rows[block, SHUFFLED_ROWS[first : first + 8]]
                expected = (matrix.T if transpose else matrix).reshape(32, 2)  # lane 4 g + t has (g, 2 t), (g, 2 t + 1)
                assert torch.equal(registers[block, warp, :, i], expected)
    assert y.view(3, 64, 4)[:, :, matrices:].isnan().all()  # nothing else is written


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_stmatrix(selftest: Selftest, matrices: int, transpose: bool) -> None:
    variant = (matrices // 2) * 2 + transpose
    registers = torch.randint(-(2**15), 2**15, (3, 2, 32, 4, 2), dtype=torch.int16)
    x = registers.view(3, 64, 8).view(torch.float32)
    y = selftest.run("stmatrix_kernel", x, empty(3 * 256), blocks=3, smem=1024, variant=variant)
    expected = torch.full((3, 64, 8), -1, dtype=torch.int16)  # poison where nothing is stored
    for block in range(3):
        for warp in range(2):
            for i in range(matrices):
                first, matrix = 32 * warp + 8 * i, registers[block, warp, :, i].reshape(8, 8)
                expected[block, SHUFFLED_ROWS[first : first + 8]] = matrix.T if transpose else matrix
    assert torch.equal(y.view(3, 64, 4).view(torch.int16), expected)


# ---- asynchronous copies ----


@pytest.mark.parametrize("variant", range(3))
def test_cp_async(selftest: Selftest, variant: int) -> None:
    size = 2**variant
    for seed in range(8):
        selftest.set_seed(seed)
        x = torch.randn(3, 64, size)
        y = selftest.run("copy_kernel", x, empty(192 * size), blocks=3, smem=1024, variant=variant)
        x[:, torch.arange(64) % 3 == 1] = 0.0
        assert torch.equal(y.view(3, 64, size), x.flip(1))


def pipeline(selftest: Selftest, x: Tensor) -> Tensor:
    blocks, tiles, threads, _ = x.shape
    return selftest.run("pipeline_kernel", x, empty(blocks * threads), blocks=blocks, smem=3072, n=tiles)


@pytest.mark.parametrize("tiles", [1, 2, 9])
def test_pipeline_of_copies(selftest: Selftest, tiles: int) -> None:
    x = torch.randint(-8, 9, (3, tiles, 64, 4)).float()
    for seed in range(20):
        selftest.set_seed(seed)
        assert torch.equal(pipeline(selftest, x).view(3, 64), x.sum((1, 3)).flip(1)), seed


def test_copies_come_early_and_late(selftest: Selftest) -> None:
    """Read before the wait, a destination holds its poison or the copy; both happen."""
    x = torch.randn(64)
    assert torch.equal(selftest.run("early_fault", x, empty(64), smem=256), x)
    y = selftest.run("early_fault", x, empty(64), smem=256, variant=1)
    early = y == x
    assert (early | y.isnan()).all()
    assert 4 < early.sum() < 48
    for variant in (2, 3):  # the source, the destination is written before the wait
        y = selftest.run("early_fault", x, empty(64), smem=256, variant=variant)
        assert ((y == x) | (y == -1.0)).all()
        assert 4 < (y == x).sum() < 60


def test_missing_wait_or_barrier_of_a_pipeline_gives_wrong_results(selftest: Selftest) -> None:
    x = torch.randint(-8, 9, (3, 9, 64, 4)).float()
    selftest.record_sites(True)
    correct = pipeline(selftest, x)
    sites = selftest.sites()
    selftest.record_sites(False)
    assert sorted(site.what for site in sites) == ["cp_async_commit"] * 2 + ["cp_async_wait", "sync_block"]

    def is_missed(seed: int) -> bool:
        selftest.set_seed(seed)
        try:
            return not torch.equal(pipeline(selftest, x), correct)
        except RuntimeError as error:
            return "copies that it has not waited for" in str(error)

    for site in sites:
        selftest.disable(Path(site.file).name, site.line, site.kernel)
        assert all(is_missed(seed) for seed in range(8)), site
        selftest.enable_all()


def test_matrix_instruction_switched_off_gives_wrong_results(selftest: Selftest) -> None:
    x = torch.randn(3 * 64, 4)
    kernels = {"ldmatrix_kernel": ("ldmatrix", 4), "stmatrix_kernel": ("stmatrix", 4), "mma_kernel": ("mma", 2)}
    for kernel, (what, variant) in kernels.items():

        def run(kernel: str = kernel, variant: int = variant) -> Tensor:
            return selftest.run(kernel, x, empty(256), smem=1024, n=1, variant=variant)

        selftest.record_sites(True)
        correct = run()
        (site,) = [site for site in selftest.sites() if site.what == what]
        assert site.calls == 64
        selftest.record_sites(False)
        selftest.disable(Path(site.file).name, site.line)
        assert not torch.equal(run().view(torch.int32), correct.view(torch.int32))
        selftest.enable_all()


# ---- words that blocks exchange ----


def words(selftest: Selftest, x: Tensor, rounds: int, **options: int) -> Tensor:
    """y of words_kernel: the numbers of the blocks' threads, then the words."""
    y = selftest.run("words_kernel", x, torch.zeros(5 * x.numel()), blocks=x.shape[0], n=rounds, **options)
    return y[: x.numel()].view_as(x)


def test_blocks_exchange_words(selftest: Selftest) -> None:
    expected = x = torch.randint(0, 1000, (3, 64)).float()
    for _ in range(7):
        expected = (expected + expected.sum(0)) % 1009
    for seed in range(8):
        selftest.set_seed(seed)
        assert torch.equal(words(selftest, x, 7), expected), seed


def test_words_are_missed(selftest: Selftest) -> None:
    """Without the wait, without the store, and with words that are overwritten before all have read them."""
    x = torch.randint(1, 1000, (3, 64)).float()
    selftest.record_sites(True)
    correct = words(selftest, x, 7)
    sites = {site.what: site for site in selftest.sites()}
    selftest.record_sites(False)
    assert sites.keys() == {"await_stamped", "store_relaxed"}
    for seed in range(4):
        selftest.set_seed(seed)
        selftest.disable(Path(sites["await_stamped"].file).name, sites["await_stamped"].line)
        assert not torch.equal(words(selftest, x, 7), correct)
        selftest.enable_all()
        selftest.disable(Path(sites["store_relaxed"].file).name, sites["store_relaxed"].line)
        with pytest.raises(RuntimeError, match=r"deadlock: .*thread \(0,0,0\) of block \(.*polls at .*selftest.cu"):
            words(selftest, x, 7)
        selftest.enable_all()
        with pytest.raises(RuntimeError, match="deadlock: threads poll words that nobody writes"):
            words(selftest, x, 7, variant=1)
    assert torch.equal(words(selftest, x, 7), correct)


def test_deadlock_names_blocks_and_threads(selftest: Selftest) -> None:
    x = torch.ones(3, 64)
    with pytest.raises(RuntimeError, match=r"thread \(5,0,0\) of block \(\d,0,0\) and 2 more polls at .*cu"):
        words(selftest, x, 2, variant=2)
    # Blocks of a plain launch do not run together.
    with pytest.raises(RuntimeError, match="deadlock: threads poll words that nobody writes"):
        selftest.run("words_fault", x, torch.zeros(960), blocks=3, n=2)
    with pytest.raises(RuntimeError, match="the blocks of a cooperative launch must run together"):
        words(selftest, torch.ones(5, 64), 2)


def test_release_orders_words(selftest: Selftest) -> None:
    x = torch.randint(1, 1000, (64,)).float()

    def missed(variant: int) -> int:
        y = selftest.run("flag_kernel", x, torch.zeros(3 * 64 + 256), blocks=3, variant=variant)
        return int((y[:192].view(3, 64) != x).sum())

    for seed in range(8):
        selftest.set_seed(seed)
        assert missed(0) == 0
        assert sum(missed(1) for _ in range(4)) > 0


# ---- bank conflicts ----

CONFLICTS = {  # variant of conflict_kernel: what, extra wavefronts of the access of one warp
    0: ("ldmatrix", 4 * 7),  # rows 128 bytes apart
    1: ("ldmatrix", 0),  # the same, swizzled
    2: ("ldmatrix", 0),  # rows 144 bytes apart
    3: ("stmatrix", 4 * 7),
    4: ("load_vec", 0),  # 16 bytes, side by side
    5: ("load_vec", 4 * 7),  # 128 bytes apart
    6: ("load_vec", 2 * 3),  # 8 bytes, 32 apart
    7: ("load_vec", 0),  # all the same
    8: ("store_vec", 31),  # 4 bytes, 128 apart
    9: ("load_vec", 0),  # 2 bytes, two lanes to a bank's word
    10: ("cp_async", 0),
    11: ("cp_async", 4 * 7),
    12: ("load_vec", 15),  # half of the lanes
    13: (None, 0),  # global memory
}


@pytest.mark.parametrize("variant", CONFLICTS)
def test_bank_conflicts(selftest: Selftest, variant: int) -> None:
    what, extra = CONFLICTS[variant]
    selftest.record_bank_conflicts(True)
    for _ in range(2):
        selftest.run("conflict_kernel", torch.zeros(4), empty(32), blocks=3, threads=32, smem=4608, variant=variant)
    selftest.record_bank_conflicts(False)
    selftest.run("conflict_kernel", torch.zeros(4), empty(32), threads=32, smem=4608, variant=variant)
    found = selftest.bank_conflicts()
    assert [(c.kernel, c.what, c.accesses, c.extra) for c in found] == (
        [("conflict_kernel", what, 6, 6 * extra)] if what else []
    )


def test_bank_conflicts_are_counted_by_place(selftest: Selftest) -> None:
    selftest.record_bank_conflicts(True)
    pipeline(selftest, torch.zeros(3, 9, 64, 4))
    selftest.record_bank_conflicts(False)
    assert {(c.what, c.accesses, c.extra) for c in selftest.bank_conflicts()} == {
        ("cp_async", 3 * 2 * 9, 0),
        ("load_vec", 3 * 2 * 9, 0),
    }


# ---- the order of execution ----


def order(selftest: Selftest, seed: int) -> Tensor:
    selftest.set_seed(seed)
    return selftest.run("order_kernel", torch.zeros(1), torch.zeros(1 + 4 * 64), blocks=4)[1:]


def test_order_follows_the_seed(selftest: Selftest) -> None:
    orders = [order(selftest, seed) for seed in (1, 1, 2, 3)]
    assert all(torch.equal(o.sort().values, torch.arange(256.0)) for o in orders)
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[1], orders[2])
    first_blocks = {order(selftest, seed)[0].item() // 64 for seed in range(32)}
    assert len(first_blocks) == 4, "blocks start in random order too"


def test_missing_barrier_gives_wrong_results(selftest: Selftest) -> None:
    """Every barrier and exchange of the correct kernels, switched off at run time by its place."""
    kernels = {"block_sum_kernel": 5, "reverse_kernel": 7 * 64, "warp_rotate_kernel": 64}
    x = torch.randn(7 * 700)

    def run(kernel: str) -> Tensor:
        return selftest.run(kernel, x, empty(kernels[kernel]), blocks=kernels[kernel] // 64 or 5, smem=512, n=700)

    for kernel in kernels:
        selftest.record_sites(True)
        correct = run(kernel)
        sites = selftest.sites()
        selftest.record_sites(False)
        assert sites
        assert {site.kernel for site in sites} == {kernel}
        for site in sites:
            selftest.disable(Path(site.file).name, site.line, site.kernel)
            caught = []
            for seed in range(4):
                selftest.set_seed(seed)
                caught.append(not torch.equal(run(kernel), correct))
            selftest.enable_all()
            assert any(caught), f"{site} is not missed"
        assert torch.equal(run(kernel), correct)


# ---- faults ----

FAULTS = {
    "read_past_the_end": ("read_fault", {"variant": 1}, "invalid read .* 0 bytes past the end of x .256 bytes."),
    "write_past_the_end": ("write_fault", {"variant": 1}, "invalid write .* 0 bytes past the end of y"),
    "read_far_before": ("read_fault", {"variant": -1200}, "invalid read .* bytes before the start of x"),
    "write_just_before": ("write_fault", {"variant": -1}, "wrote 4 bytes next to y"),
    "write_to_an_input": ("write_input_fault", {}, "invalid write .* .read-only. of x"),
    "raw_vector_misaligned": ("raw_vector_fault", {"threads": 1}, "misaligned or null access at .*selftest.cu"),
    "vector_misaligned": ("vector_copy_kernel", {"n": 64}, "misaligned access: 16 bytes at 0x.* at .*selftest.cu"),
    "shared_memory_overrun": ("shared_overrun_fault", {"smem": 256, "variant": 1}, "write .* past the end of shared"),
    "array_index": ("array_index_fault", {"smem": 256, "threads": 32, "variant": 1}, "array index out of bounds at"),
    "no_shared_memory": ("array_index_fault", {"smem": 128}, "shared storage of 256 bytes in a launch with 128"),
    "barrier_skipped": ("divergent_barrier_fault", {"variant": 63}, r"thread \(63,0,0\) has exited.*sync_block at"),
    "two_barriers": ("two_barriers_fault", {"variant": 3}, "sync_block is reached at .* and at"),
    "lane_missing": ("missing_lane_fault", {"variant": 8}, "waits in a shuffle at .* with mask 0xffffffff"),
    "absent_lanes": ("exchange_kernel", {"threads": 48}, "mask 0xffffffff names absent lanes"),
    "stack_overflow": ("stack_overflow_fault", {"smem": 128}, "stack overflow"),
    "division_by_zero": ("division_fault", {}, "integer division by zero"),
    "empty_grid": ("read_fault", {"blocks": 0}, "cuda: launch of read_fault failed: the grid is empty"),
    "large_block": ("read_fault", {"threads": 1025}, "cuda: launch of read_fault failed: the block is too large"),
    "ldmatrix_misaligned": (
        "matrix_fault",
        {"smem": 1024, "variant": 0},
        "misaligned access: 16 bytes at 0x.* at .*cu",
    ),
    "ldmatrix_outside": (
        "matrix_fault",
        {"smem": 512, "threads": 32, "variant": 1},
        "outside of shared .* in ldmatrix at",
    ),
    "stmatrix_outside": ("matrix_fault", {"smem": 512, "variant": 2}, "row outside of shared memory in stmatrix at"),
    "mma_lane_missing": (
        "matrix_fault",
        {"threads": 32, "variant": 3},
        "thread .0,0,0. has exited; .*waits in an mma at",
    ),
    "two_mma": (
        "matrix_fault",
        {"threads": 32, "variant": 4},
        "divergence: another lane named in mask 0xffffffff waits",
    ),
    "ldmatrix_lane_missing": (
        "matrix_fault",
        {"smem": 512, "threads": 32, "variant": 5},
        "30 more waits in ldmatrix at",
    ),
    "mma_in_half_a_warp": ("matrix_fault", {"threads": 16, "variant": 4}, "mask 0xffffffff names absent lanes at"),
    "copy_outside": ("copy_fault", {"smem": 256, "variant": 0}, "cp_async to an address outside of shared memory at"),
    "copy_to_unaligned": ("copy_fault", {"smem": 2048, "variant": 1}, "misaligned access: 16 bytes at 0x.* at .*cu"),
    "copy_from_unaligned": ("copy_fault", {"smem": 256, "variant": 2}, "misaligned access: 8 bytes at 0x.* at .*cu"),
    "copy_from_outside": (
        *("copy_fault", {"smem": 256, "variant": 3}),
        r"invalid read .* 0 bytes past the end of x .* by cp_async at .*cu:\d+ \[block \(0,0,0\), thread \(63,0,0\)",
    ),
    "copy_uncommitted": ("copy_fault", {"smem": 256, "variant": 4}, "exits with 1 asynchronous .* by cp_async at .*cu"),
    "copy_unwaited": ("copy_fault", {"smem": 256, "variant": 5}, "exits with 1 asynchronous .* by cp_async at .*cu"),
    "large_shared": ("read_fault", {"smem": 228 << 10}, "failed: the block has too much shared memory"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_reported(selftest: Selftest, fault: str) -> None:
    kernel, options, report = FAULTS[fault]
    offset = 1 if "misaligned" in fault else 0
    x, y = torch.randn(65)[offset:][:64], empty(65)[offset:][:64]
    for _ in range(2):  # a launch that was abandoned leaves nothing behind
        with pytest.raises(RuntimeError, match=report) as caught:
            selftest.run(kernel, x, y, **options)
        if str(caught.value).startswith("simt: " + kernel):
            assert "block (0,0,0), thread (" in str(caught.value)
    y = selftest.run("block_sum_kernel", x, empty(1), smem=256, n=64)
    torch.testing.assert_close(y[0], x.sum())


def test_the_faulty_kernels_are_right_without_their_fault(selftest: Selftest) -> None:
    x = torch.randn(64)
    assert torch.equal(selftest.run("read_fault", x, empty(64)), x)
    for kernel in ("write_fault", "divergent_barrier_fault"):
        assert torch.equal(selftest.run(kernel, x, empty(64)), torch.ones(64))
    assert torch.equal(selftest.run("vector_copy_kernel", x, empty(64), n=64), x)
    assert torch.equal(selftest.run("shared_overrun_fault", x, empty(64), smem=256), torch.ones(64))


def test_uninitialised_shared_memory_shows(selftest: Selftest) -> None:
    for _ in range(2):
        y = selftest.run("uninitialised_shared_fault", torch.zeros(32), empty(32), threads=32, smem=128)
        assert y[0].isnan()
        assert torch.equal(y[1:], torch.zeros(31))
        selftest.run("shared_overrun_fault", torch.zeros(32), empty(32), threads=32, smem=128)  # writes it


def test_other_handlers_come_back() -> None:
    """A fault outside of kernels goes where it went before."""
    script = """
        import ctypes, faulthandler, sys
        faulthandler.enable()
        sys.path.insert(0, "tests")
        import torch
        from test_simt import Selftest, empty
        try:
            Selftest().run("read_fault", torch.zeros(64), empty(64), variant=1)
        except RuntimeError as error:
            print("reported", file=sys.stderr)
        ctypes.string_at(0)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=HERE.parent, capture_output=True, text=True
    )
    assert run.returncode < 0
    assert "reported\nFatal Python error: Segmentation fault" in run.stderr


# ---- guarded copies ----


def test_guarded_copies(selftest: Selftest) -> None:
    strided = torch.arange(35.0).view(5, 7)[:, 1:5]
    expanded = torch.arange(3.0).expand(4, 3)
    out, nothing = torch.zeros(3, dtype=torch.bfloat16), torch.zeros(0)

    def look(strided_copy: Tensor, expanded_copy: Tensor, out_copy: Tensor, empty_: Tensor, none: None, number: int):
        assert torch.equal(strided_copy, strided)
        assert strided_copy.stride() == strided.stride()
        assert strided_copy.data_ptr() % 16 == strided.data_ptr() % 16 == 4
        gap = torch.as_strided(strided_copy, (4, 3), (7, 1), strided_copy.storage_offset() + 4)
        assert gap.isnan().all()
        assert torch.equal(expanded_copy, expanded)
        assert out_copy.isnan().all()
        assert (empty_ is nothing, none, number) == (True, None, 7)
        out_copy.fill_(2.0)
        return "result"

    args = (strided, expanded, out, nothing, None, 7)
    names = ("strided", "expanded", "out", "nothing", "none")
    assert guarded_call(selftest.lib, look, names, {"out"}, args) == "result"
    assert torch.equal(out, torch.full((3,), 2.0, dtype=torch.bfloat16))


def test_fault_in_the_module_is_a_runtime_error() -> None:
    backend = load()
    x, weight = torch.randn(6, 32), torch.randn(32)
    address = backend.lib.simt_alloc(x.nbytes, 0, b"y")
    backend.lib.simt_seal(address)
    y = torch.frombuffer((ctypes.c_char * x.nbytes).from_address(address), dtype=x.dtype).view(6, 32)
    args = (x, None, weight, weight, None, y, None, None, None, 32, 1, 1e-5, 0.0, 0.0, False, 1)
    with pytest.raises(RuntimeError, match=r"layer_norm_fwd_kernel: invalid write .* \(read-only\) of y \(768 bytes\)"):
        backend.module.layer_norm_fwd(*args)
    del y, args
    assert backend.lib.simt_free(address) == 0


# ---- the equipment as a whole ----


@pytest.mark.full
def test_thread_sanitizer_is_silent_on_correct_kernels() -> None:
    program = build("tsan")
    kernels = ["block_sum_kernel", "reverse_kernel", "warp_rotate_kernel", "atomic_sum_kernel", "exchange_kernel"]
    kernels += ["mma_kernel", "ldmatrix_kernel", "stmatrix_kernel", "copy_kernel", "pipeline_kernel", "early_fault"]
    for kernel in kernels:
        assert tsan(program, "--selftest", kernel) == 0, kernel
        # The books that are kept while something is switched off are no race either.
        assert tsan(program, "--selftest", kernel, "--disable", kernel, "no_such_file", "1") == 0, kernel
    others = [("ldmatrix_kernel", "5"), ("stmatrix_kernel", "4"), ("copy_kernel", "2")]
    for kernel, variant in [*others, ("words_kernel", "0"), ("flag_kernel", "0"), ("flag_kernel", "2")]:
        assert tsan(program, "--selftest", kernel, "--variant", variant) == 0, kernel


@pytest.mark.full
def test_thread_sanitizer_sees_races(selftest: Selftest) -> None:
    program = build("tsan")
    assert tsan(program, "--selftest", "block_race_fault") == 66
    for variant in ("1", "2", "3"):  # destination read, source written, destination written before the wait
        assert tsan(program, "--selftest", "early_fault", "--variant", variant) == 66, variant
    assert tsan(program, "--selftest", "flag_kernel", "--variant", "3") == 66
    selftest.record_sites(True)
    x = torch.randn(3 * 64 * 64 * 4)
    kernels = ("block_sum_kernel", "reverse_kernel", "warp_rotate_kernel", "ldmatrix_kernel", "stmatrix_kernel")
    for kernel in (*kernels, "copy_kernel", "pipeline_kernel"):
        selftest.run(kernel, x, empty(768), blocks=3, smem=4096, n=64)
    ordering = [site for site in selftest.sites() if site.what.startswith(("sync", "cp_async"))]
    selftest.record_sites(False)
    assert len(ordering) == 4 + 1 + 1 + 3 + 4
    for site in ordering:
        options = ("--disable", site.kernel, Path(site.file).name, str(site.line))
        for seed in ("1", "2", "3"):
            assert tsan(program, "--seed", seed, "--selftest", site.kernel, *options) == 66, site


@pytest.mark.full
def test_every_mutant_of_the_kernels_is_caught() -> None:
    written = written_places()
    found = list(mutants())
    executed = {(Path(mutant.site.file).name, mutant.site.line) for mutant in found}
    assert not written - executed, "barriers and exchanges that no case of mutate.py reaches"
    survivors = [str(mutant) for mutant in found if not (mutant.caught or mutant.equivalent)]
    assert not survivors, "\n".join(survivors)
    races = [str(mutant) for mutant in found if mutant.tsan is False and not mutant.equivalent]
    assert not races, "ThreadSanitizer misses\n" + "\n".join(races)
