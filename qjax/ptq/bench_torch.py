"""The loop of the GPTQ paper in torch, for `qjax.ptq.bench`; needs torch and numpy, not qjax.

Frantar et al., 2022 (arXiv:2210.17323), algorithm 1, with static groups and act-order: with U the
upper Cholesky factor of the inverse of H + 0.01 mean(diag H), columns are rounded one by one, and

  w_j -= U_ij / U_ii (w_i - q_i)   for j > i,

at once inside a block of 128 columns, by one matmul beyond it.
"""

import argparse
import json
import pathlib
import time

import numpy as np
import torch  # pyright: ignore[reportMissingImports]: runs in another environment

_BLOCK = 128


def quantize(w, H, *, bits, group, symmetric, act_order, damping=0.01):
    """Returns the quantized W [N, K] (the paper's layout)."""
    W = w.clone()
    N, K = W.shape
    levels = 2**bits - 1
    grouped = W.view(N, K // group, group)
    if symmetric:
        scale = 2 * grouped.abs().amax(2) / levels
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        scale = (high - low) / levels
        zero = torch.round(-low / scale)
    order = torch.arange(K)
    if act_order:
        order = torch.argsort(H.diagonal(), descending=True)
    group_of = (order // group).tolist()
    W = W[:, order]
    H = H[order][:, order]
    H.diagonal().add_(damping * H.diagonal().mean())
    H = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(H, upper=True)
    Q = torch.empty_like(W)
    for start in range(0, K, _BLOCK):
        end = min(start + _BLOCK, K)
        block = W[:, start:end].clone()
        errors = torch.empty_like(block)
        inside = U[start:end, start:end]
        for i in range(end - start):
            s, z = scale[:, group_of[start + i]], zero[:, group_of[start + i]]
            column = block[:, i]
            q = (torch.clamp(torch.round(column / s) + z, 0, levels) - z) * s
            error = (column - q) / inside[i, i]
            block[:, i:] -= torch.outer(error, inside[i, i:])
            Q[:, start + i], errors[:, i] = q, error
        W[:, end:] -= errors @ U[start:end, end:]
    return Q[:, torch.argsort(order)]


def memory(name):
    """Returns a figure of this process in MB. (`ru_maxrss` is no less than the parent's.)"""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("layer")
    parser.add_argument("out")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--act-order", action="store_true")
    chosen = parser.parse_args()
    arrays = np.load(chosen.layer)
    w, H = torch.from_numpy(arrays["w"].T.copy()), torch.from_numpy(arrays["H"])
    before = memory("VmRSS")
    seconds, Q = [], w
    for _ in range(chosen.repeats):
        start = time.process_time()
        Q = quantize(
            w, H, bits=chosen.bits, group=chosen.group,
            symmetric=chosen.symmetric, act_order=chosen.act_order,
        )  # fmt: skip
        seconds.append(time.process_time() - start)
    np.save(chosen.out, Q.numpy().T)
    print(json.dumps({"cpu_s": seconds, "peak_mb": memory("VmHWM") - before}))


if __name__ == "__main__":
    main()
