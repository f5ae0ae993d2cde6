"""What the emulator says of text that a GPU would not run as meant. See support/emulator/watch.h."""

from __future__ import annotations

import pytest
import torch

from sparcomm.kernels.cuda import texts
from sparcomm.kernels.cuda.launch import run
from support import emulator

pytestmark = pytest.mark.skipif(not emulator.available(), reason="needs g++")

# Bodies of kernels (u32* out, i64 n) for two blocks; what is wrong with the first, and the same put right.
SHARED = "__shared__ u32 room[THREADS]; u32& mine = out[first_item()];"
TURN = "const u32 t = threadIdx.x, next = (t + 1) % THREADS;"
WRONG = {
    "no barrier": f"{SHARED} {TURN} room[t] = t; mine = room[next];",
    "only a shuffle": f"{SHARED} {TURN} room[t] = t; __shfl_sync(ALL, t, 0); mine = room[t ^ 1];",
    "a warp's barrier": f"{SHARED} {TURN} room[t] = t; __syncwarp(); mine = room[next];",
    "used again": f"{SHARED} {TURN} for (int i = 0; i < 2; i++) {{ room[t] = t; __syncthreads(); mine = room[next]; }}",
    "one word": "if (threadIdx.x == 0) out[0] = blockIdx.x;",
    "read while others write": """
        const u32 x = out[1 - blockIdx.x];
        __syncthreads();
        if (threadIdx.x == 0) out[blockIdx.x] = x;""",
    "read while others add": "if (threadIdx.x == 0) atomicAdd(out, 1u); else if (out[0]) out[first_item()] = 1;",
    "no fence": """
        if (threadIdx.x == 1) out[2 + blockIdx.x] = 0;
        __syncthreads();
        if (threadIdx.x == 0 && atomicAdd(out, 1u) == 1) out[1] = out[2] + out[3];""",
    "behind the end": "if (first_item() == 0) out[n] = 0;",
    "before the start": "if (first_item() == 0) out[n - 1] = out[-1];",
}
RIGHT = {
    "a barrier": f"{SHARED} {TURN} room[t] = t; __syncthreads(); mine = room[next];",
    "a warp's barrier": f"{SHARED} {TURN} room[t] = t; __syncwarp(); mine = room[t ^ 1];",
    "bytes side by side": "((u8*)out)[first_item()] = 1;",
    "atomic": "atomicAdd(out, 1u); atomicOr(out, 1u);",
    "volatile": "if (threadIdx.x == 0) { atomicAdd(out, 1u); while (*(volatile u32*)out < 2) spin(); }",
    "a fence": """
        if (threadIdx.x == 1) out[2 + blockIdx.x] = 0;
        __threadfence(); __syncthreads();
        if (threadIdx.x == 0 && atomicAdd(out, 1u) == 1) { __threadfence(); out[1] = out[2] + out[3]; }""",
}


BODIES = [*WRONG.values(), *RIGHT.values()]


@pytest.fixture(autouse=True)
def bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of all of them."""
    common = (texts.folder() / "common.cuh").read_text().replace("#pragma once\n", "")
    kernels = (f"KERNEL body_{i}(u32* out, i64 n) {{ {body} }}\n" for i, body in enumerate(BODIES))
    text = "\n".join([common, *kernels])
    others = texts.source

    def source(name: str) -> str:
        return text if name == "races" else others(name)

    monkeypatch.setattr(texts, "source", source)


def ran(body: str) -> None:
    out = torch.zeros(1024, dtype=torch.int32)
    run("races", f"body_{BODIES.index(body)}", 512, out, out, 1024)


@pytest.mark.parametrize("what", WRONG)
def test_is_refused(what: str) -> None:
    where = "shared" if SHARED in WRONG[what] else "global"
    with pytest.raises(RuntimeError, match=f"race.* {where} memory|outside"):
        ran(WRONG[what])


@pytest.mark.parametrize("what", RIGHT)
def test_is_allowed(what: str) -> None:
    ran(RIGHT[what])
