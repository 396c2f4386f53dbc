#!/usr/bin/env python3
"""The stack of benches/scaling.rs under torch.utils.checkpoint. Prints seconds a step and of
the processor, or bytes and 0."""
import json
import math
import statistics
import sys
import time

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

work = json.loads(sys.argv[1])
stack, how = work["stack"], work["how"]
torch.set_num_threads(work["threads"])
torch.manual_seed(1)
d, heads = stack["width"], stack["heads"]


def parameter(*shape):
    return (torch.randn(shape) * 0.02).requires_grad_()


def vector(value):
    return torch.full((d,), value).requires_grad_()


weights = [
    [
        vector(1.0),
        vector(0.0),
        parameter(3 * d, d),
        parameter(d, d),
        vector(1.0),
        vector(0.0),
        parameter(4 * d, d),
        parameter(d, 4 * d),
    ]
    for _ in range(stack["blocks"])
]
inputs = torch.randn(stack["rows"], stack["length"], d)


def block(x, w):
    b, t, _ = x.shape
    qkv = F.linear(F.layer_norm(x, (d,), w[0], w[1]), w[2])
    q, k, v = qkv.view(b, t, 3, heads, d // heads).permute(2, 0, 3, 1, 4).unbind(0)
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + F.linear(attended.transpose(1, 2).reshape(b, t, d), w[3])
    inner = F.gelu(F.linear(F.layer_norm(x, (d,), w[4], w[5]), w[6]))
    return x + F.linear(inner, w[7])


def every_block(x, some, reentrant=False):
    for w in some:
        x = checkpoint(block, x, w, use_reentrant=reentrant)
    return x


def square_root(x):
    # Runs of as many blocks as there are runs, and within one that is computed again its blocks: the policy of
    # the same name.
    run = math.ceil(math.sqrt(len(weights)))
    for start in range(0, len(weights), run):
        x = checkpoint(every_block, x, weights[start : start + run], use_reentrant=False)
    return x


def step():
    # The reentrant form records nothing unless an input requires gradients.
    x = inputs.detach().requires_grad_() if how == "reentrant" else inputs
    if how == "none":
        for w in weights:
            x = block(x, w)
    elif how == "square_root":
        x = square_root(x)
    else:
        x = every_block(x, weights, how == "reentrant")
    x.square().mean().backward()


def status_bytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024


step()
if work["memory"]:
    before = status_bytes("VmRSS:")
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    step()
    print([status_bytes("VmHWM:") - before, 0])
else:
    seconds, cpu = [], time.process_time()
    for _ in range(work["steps"]):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    print([statistics.median(seconds), (time.process_time() - cpu) / work["steps"]])
