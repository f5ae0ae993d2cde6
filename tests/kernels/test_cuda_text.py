"""All CUDA text compiles with nvcc for A100 and H100 without a warning; no kernel spills or takes too much.

For all GPUs that are supported: python launch/kernel_resources.py.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import kernel_resources as nvcc
import pytest
from kernel_resources import SHARED, CompileError, Resources, compiled, known_archs, label, parse, resources

from sparcomm.kernels.cuda import texts

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
VARIANTS = texts.variants()
ARCHS = (80, 90)  # of the four that are supported: each costs half a second of CPU a variant


@needs_nvcc
@pytest.mark.parametrize(("text", "types"), VARIANTS, ids=[f"{text}-{label(types)}" for text, types in VARIANTS])
def test_it_compiles_and_spills_nothing(text: str, types: texts.Types) -> None:
    # The first combination of each text is compiled for each capability as NVRTC would; of the others one result is
    # assembled for both: the text does not ask for the capability, and front ends are half of the time.
    first = types is texts.TEXTS[text][0]
    found = resources(text, types, ARCHS, once=not first)
    kernels = re.findall(r"^KERNEL (\w+)\(", texts.source(text), flags=re.MULTILINE)
    assert kernels
    assert {(row.kernel, row.arch) for row in found} == {(name, arch) for name in kernels for arch in ARCHS}
    assert [line for row in found for line in row.wrong] == []


@needs_nvcc
def test_nvcc_knows_them() -> None:
    assert set(ARCHS) <= set(known_archs())


def test_every_text_is_declared_and_asks_for_nothing() -> None:
    folder = texts.folder()
    assert sorted(texts.TEXTS) == sorted(path.stem for path in folder.glob("*.cu"))
    for path in folder.glob("*.cu*"):
        text = path.read_text(encoding="utf-8")
        assert "__CUDA_ARCH__" not in text, "compiled once for all of them"
        included = re.findall(r"^\s*#\s*include\s+(.*)", text, flags=re.MULTILINE)
        assert included == ([] if path.suffix == ".cuh" else ['"common.cuh"']), "NVRTC has no headers"


SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 1) spilling(float* x, int n) {
    float a[128], s = 0;
    for (int i = 0; i < 128; i++) a[i] = x[i * n + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < 128; i++)
        for (int j = 0; j < 128; j++) s += a[i] * a[j] / (a[(i + j) % 128] + s);
    for (int i = 0; i < 128; i++) x[i * n] = a[i] + s;
}
"""
UNUSED = 'extern "C" __global__ void unused(int* x) { int y = 3; x[0] = 1; }\n'


@needs_nvcc
@pytest.mark.parametrize(("source", "complaint"), [(SPILLING, "spilled"), (UNUSED, "never referenced")])
def test_spills_and_warnings_are_errors(source: str, complaint: str) -> None:
    with pytest.raises(CompileError, match=complaint):
        compiled("wrong", source, (), known_archs()[:1])


REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'emit' for 'sm_120'
ptxas info    : Function properties for emit
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 16 bytes cumulative stack size, 8232 bytes smem, 500 bytes cmem[0]
ptxas info    : Compiling entry function 'fill_up' for 'sm_75'
ptxas info    : Function properties for fill_up
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 368 bytes cmem[0]
"""


def test_the_report_is_read() -> None:
    assert list(parse(REPORT)) == [Resources("emit", 120, 64, 12, 16, 8232), Resources("fill_up", 75, 8, 0, 0, 0)]
    assert list(parse("")) == []
    with pytest.raises(ValueError, match="says nothing of emit"):
        list(parse("Compiling entry function 'emit' for 'sm_75'\n"))


def test_too_much_is_told() -> None:
    right = Resources("k", 80, 256, 0, 0, SHARED)
    assert right.wrong == []
    assert right._replace(spilled=4).wrong == ["k for sm_80: 4 bytes spilled"]
    assert "shared memory" in right._replace(shared=SHARED + 1).wrong[0]
    assert "257 registers" in right._replace(registers=257).wrong[0]


@needs_nvcc
def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert nvcc.main(["--texts", "compensate", "--archs", "80", "--quick"]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert "registers" in first
    assert len(rows) == 2 * len(texts.TEXTS["compensate"])
    assert nvcc.main(["--texts", "none"]) == 2


def test_without_a_compiler_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc, "nvcc", lambda: None)
    assert nvcc.main([]) == 2
    assert "no nvcc" in capsys.readouterr().err


def test_threads_are_those_of_the_text() -> None:
    common = Path(texts.folder() / "common.cuh").read_text(encoding="utf-8")
    assert f"#define THREADS {nvcc.THREADS}\n" in common
