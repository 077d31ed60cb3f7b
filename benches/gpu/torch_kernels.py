"""What torch reaches on this GPU in the same run: the copy's rate, matmuls by cuBLAS, attention by each back end.

Times are those of events around replays of a CUDA graph whose calls take their inputs in turn from more memory than the L2
cache holds. On a machine without a GPU (--quick) the wall clock stands in.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# More than an H200's L2 cache of 50 MB, several times.
ROTATED_BYTES = 256 << 20


def show(name, value, unit, **more):
    print(json.dumps({"name": name, "value": value, "unit": unit, **more}), flush=True)


def seconds(calls, device, budget):
    """Median seconds of one of `calls`, which are run one after the other."""
    for call in calls:
        call()
    if device == "cpu":
        begin = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begin) / len(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times, end = [], time.monotonic() + budget
    while len(times) < 5 or (time.monotonic() < end and len(times) < 200):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 1e3 / len(calls))
    return statistics.median(times)


def copies(one_bytes):
    return max(2, ROTATED_BYTES // one_bytes + 1)


def copy(device, quick):
    count = (1 << 20) if quick else (512 << 20)
    source = torch.empty(count, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    taken = seconds([lambda: target.copy_(source)] * 2, device, 1.0)
    show("copy", 2 * count / taken / 1e9, "GB/s")


def norms(device, quick):
    rows, width = (8, 256) if quick else (4_096, 4_096)
    n = 2 if quick else copies(rows * width * 4)
    inputs = [torch.randn(rows, width, device=device) for _ in range(n)]
    weight = torch.ones(width, device=device)
    calls = [lambda x=x: F.rms_norm(x, (width,), weight, 1e-5) for x in inputs]
    taken = seconds(calls, device, 0.3)
    show(f"torch rms norm f32 {rows} x {width}", 2 * rows * width * 4 / taken / 1e9, "GB/s")


def matmuls(device, quick):
    shapes = [(64, 64)] if quick else [(4_096, 6_144), (4_096, 28_672), (14_336, 4_096)]
    for inner, outer in shapes:
        n = 2 if quick else copies(inner * outer * 2)
        weights = [torch.randn(outer, inner, device=device).to(torch.bfloat16) for _ in range(n)]
        for rows in [1, 4] if quick else [1, 8, 16, 64, 2_048]:
            x = torch.randn(rows, inner, device=device).to(torch.bfloat16)
            taken = seconds([lambda w=w: x @ w.T for w in weights], device, 0.3)
            name = f"cuBLAS bf16 {rows} x {inner} to {outer}"
            show(name, taken * 1e6, "us", note=f"{2 * rows * inner * outer / taken / 1e12:.1f} TFLOP/s")


def fp8_matmuls(device, quick):
    """With one scale per matrix, as cuBLASLt multiplies 8-bit floats."""
    inner, outer = (64, 64) if quick else (4_096, 28_672)
    n = 2 if quick else copies(inner * outer)
    one = torch.ones((), device=device)
    for rows in [16] if quick else [16, 64, 2_048]:
        name = f"cuBLAS fp8 {rows} x {inner} to {outer}"
        try:
            weights = [torch.randn(outer, inner, device=device).to(torch.float8_e4m3fn) for _ in range(n)]
            x = torch.randn(rows, inner, device=device).to(torch.float8_e4m3fn)
            calls = [lambda w=w: torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
                     for w in weights]
            taken = seconds(calls, device, 0.3)
            show(name, taken * 1e6, "us", note=f"{2 * rows * inner * outer / taken / 1e12:.1f} TFLOP/s")
        except Exception as error:  # Older versions of torch refuse some: that is a result.
            print(json.dumps({"name": name, "note": f"{type(error).__name__}: {error}"[:300]}), flush=True)


def attention(device, quick):
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
                "math": SDPBackend.MATH}
    cases = [("decode", 2, 1, 64)] if quick else [("decode", 32, 1, 4_096), ("decode", 64, 1, 2_048)]
    cases += [("prefill", 1, 64, 64)] if quick else [("prefill", 1, 8_192, 8_192)]
    heads, kv_heads, width = (4, 2, 32) if quick else (32, 8, 128)
    for what, batch, queries, keys in cases:
        for name, backend in backends.items():
            # torch's own way is only there to try the script.
            if (name == "math") != quick:
                continue
            label = f"{name} {what} {batch} x {keys}"
            try:
                q = torch.randn(batch, heads, queries, width, device=device, dtype=torch.bfloat16)
                n = 2 if quick else copies(2 * batch * kv_heads * keys * width * 2)
                kv = [[torch.randn(batch, kv_heads, keys, width, device=device, dtype=torch.bfloat16) for _ in range(2)]
                      for _ in range(n)]
                with sdpa_kernel(backend):
                    calls = [lambda k=k, v=v: F.scaled_dot_product_attention(
                        q, k, v, is_causal=what == "prefill", enable_gqa=True) for k, v in kv]
                    taken = seconds(calls, device, 0.3)
                moved = 2 * batch * kv_heads * keys * width * 2
                flops = 4 * batch * heads * queries * keys * width / (2 if what == "prefill" else 1)
                note = f"{moved / taken / 1e9:.0f} GB/s" if what == "decode" else f"{flops / taken / 1e12:.0f} TFLOP/s"
                show(label, taken * 1e6, "us", note=note)
            except Exception as error:  # A back end may refuse a shape: that is a result.
                print(json.dumps({"name": label, "note": f"{type(error).__name__}: {error}"[:300]}), flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.quick:
        raise SystemExit("torch sees no GPU")
    torch.manual_seed(0)
    for part in (copy, norms, matmuls, fp8_matmuls, attention):
        part(device, args.quick)


if __name__ == "__main__":
    main()
