"""Rank normalisation + soft mask for 32 rows of 11008 units (the MLPs of Llama-7B), by sorting and by N×N comparison.

    python benchmarks/topk.py

The comparison is what the paper's public code does, a row at a time: all 32 at once would need 15 GB. Times are
medians of CPU seconds of one thread; memory is the largest tensor that the operator makes.
"""

import time

import torch
from tables import add_row
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dms.topk import soft_topk_mask


def by_comparison(importance, ratio):
    """c'_i = mean_j 1[c_i > c_j], then the sigmoid, as the public code has it."""
    rows = []
    for c, a in zip(importance, ratio):
        normalised = (c.unsqueeze(-1) - c.unsqueeze(-2) > 0).float().mean(-1)
        rows.append(torch.sigmoid(len(c) * (normalised - a)))
    return torch.stack(rows)


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


def measure(function, *args, repeats):
    with LargestTensor() as largest:
        function(*args)
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function(*args)
        times.append(time.process_time() - start)
    return sorted(times)[len(times) // 2], largest.bytes


def main():
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    for rows, units in ((32, 2752), (32, 5504), (32, 11008)):
        importance = torch.rand(rows, units, generator=generator)
        ratio = torch.rand(rows, generator=generator)
        ours, our_bytes = measure(soft_topk_mask, importance, ratio, repeats=15)
        theirs, their_bytes = measure(by_comparison, importance, ratio, repeats=3)
        cells = {"rows × units": f"{rows} × {units}", "sorting, ms": round(ours * 1e3, 1)}
        cells |= {"comparison, ms": round(theirs * 1e3), "times as fast": round(theirs / ours)}
        cells |= {
            "largest tensor, sorting, MiB": round(our_bytes / 2**20, 1),
            "comparison, MiB": round(their_bytes / 2**20),
        }
        add_row(__file__, cells)


if __name__ == "__main__":
    main()
