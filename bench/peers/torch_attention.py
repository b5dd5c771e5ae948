#!/usr/bin/env python3
"""PyTorch's attention on the cases of bench_cuda_prefill that it has: torch_attention.py

Causal, bf16, 32 heads on 8 KV heads. FlashAttention 2 and cuDNN, each with the KV heads repeated beforehand, so that
the copy is not in the figure. Median of launches timed one by one. Needs torch with CUDA.
"""
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

LAUNCHES = 15
CASES = [(4, 2048, 128), (1, 8192, 128), (1, 16384, 128), (1, 8192, 64)]  # sequences, tokens, head_dim
BACKENDS = [("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)]


def median_us(launch):
    for _ in range(3):
        launch()
    times = []
    for _ in range(LAUNCHES):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        launch()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times)[LAUNCHES // 2]


def random(sequences, heads, tokens, head_dim):
    return torch.randn(sequences, heads, tokens, head_dim, device="cuda", dtype=torch.bfloat16)


print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
for sequences, tokens, head_dim in CASES:
    q = random(sequences, 32, tokens, head_dim)
    k, v = (random(sequences, 8, tokens, head_dim).repeat_interleave(4, 1).contiguous() for _ in range(2))
    flops = 4 * 32 * head_dim * sequences * tokens * (tokens + 1) / 2
    for name, backend in BACKENDS:
        with sdpa_kernel(backend):
            us = median_us(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
        case = f"{name:6s} causal {tokens} x {sequences}, head_dim {head_dim}"
        print(f"{case}: {us:.1f} us, {flops / us * 1e-6:.1f} TFLOP/s")
