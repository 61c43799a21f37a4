# SPDX-FileCopyrightText: The FastMoE authors
# SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
"""torch_layers.py figures.json torch.json [--small]: the layers of device_bench composed of PyTorch's operators, forward and backward,
in two ways: an expert at a time, and by torch._grouped_mm over tokens that are sorted by expert. The second file gets their times,
and claims that hold device_bench's layers of figures.json to them. --small: tiny ones, on the CPU if there is no GPU, which only shows
that both ways compute one result.

Ends with 77, skipped, where there is no torch, or no GPU for it.
"""
import json
import sys

SHAPES = [(32768, 4096, 2048, 64, 4), (32768, 4096, 1024, 128, 8), (32768, 4096, 256, 256, 16), (24576, 1536, 256, 128, 8)]
SMALL = [(96, 64, 32, 4, 2), (64, 32, 64, 8, 3)]
# Ahead of the loop everywhere; of the grouped product on the first two.
GROUPED_CLAIMS = 2

try:
    import torch
    import torch.nn.functional as F
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)


class Layer(torch.nn.Module):
    """Softmax over the K chosen of E; SwiGLU experts whose gate and up lie one after the other."""

    def __init__(self, width, hidden, experts, k, device):
        super().__init__()
        parameter = lambda *shape: torch.nn.Parameter(torch.randn(*shape, device=device, dtype=torch.bfloat16) / shape[-1] ** 0.5)
        self.hidden, self.k = hidden, k
        self.gate = parameter(experts, width)
        self.up = parameter(experts, 2 * hidden, width)
        self.down = parameter(experts, width, hidden)

    def route(self, x):
        scores, chosen = (x @ self.gate.t()).float().topk(self.k, dim=-1)
        return scores.softmax(dim=-1).to(x.dtype), chosen

    def activate(self, pre):
        return F.silu(pre[..., : self.hidden]) * pre[..., self.hidden :]

    def loop(self, x):
        weights, chosen = self.route(x)
        y = torch.zeros_like(x)
        for e in range(self.gate.shape[0]):
            token, place = torch.where(chosen == e)
            if token.numel() == 0:
                continue
            rows = self.activate(x[token] @ self.up[e].t()) @ self.down[e].t()
            y = y.index_add(0, token, rows * weights[token, place].unsqueeze(-1))
        return y

    def grouped(self, x):
        weights, chosen = self.route(x)
        of_choice = chosen.reshape(-1)
        order = of_choice.argsort(stable=True)
        token = order // self.k
        ends = torch.bincount(of_choice, minlength=self.gate.shape[0]).cumsum(0).to(torch.int32)
        product = lambda rows, w: torch._grouped_mm(rows, w.transpose(-2, -1), offs=ends)
        rows = product(self.activate(product(x[token], self.up)), self.down)
        return torch.zeros_like(x).index_add(0, token, rows * weights.reshape(-1)[order].unsqueeze(-1))


def median_ms(call, rounds):
    """Between two events, after three rounds to warm up."""
    times = []
    for r in range(-3, rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if r >= 0:
            times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def compare(layer, x, dy):
    """Fails unless both ways give the same output and gradients but for rounding."""
    found = []
    for way in (layer.loop, layer.grouped):
        x.grad = None
        layer.zero_grad(set_to_none=True)
        y = way(x)
        y.backward(dy)
        found.append([y.detach()] + [t.grad for t in (x, layer.gate, layer.up, layer.down)])
    for name, a, b in zip("y x gate up down".split(), *found):
        off = (a.float() - b.float()).norm() / a.float().norm()
        if not off < 0.02:
            sys.exit(f"the two ways part in {name}: {off:.3g} of its norm")


def main():
    ours_path, out_path = sys.argv[1:3]
    small = "--small" in sys.argv
    if not torch.cuda.is_available() and not small:
        print("skipped: torch sees no GPU")
        sys.exit(77)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    try:
        with open(ours_path) as file:
            ours = {f["name"]: f["ms"] for f in json.load(file) if "ms" in f}
    except OSError:
        ours = {}
    figures = []

    def add(figure):
        figures.append(figure)
        with open(out_path, "w") as file:
            json.dump(figures, file, indent=1)
        print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in figure.items()), flush=True)

    for row, (tokens, width, hidden, experts, k) in enumerate(SMALL if small else SHAPES):
        name = f"T {tokens} D {width} H {hidden} E {experts} K {k}"
        layer = Layer(width, hidden, experts, k, device)
        x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn_like(x)
        compare(layer, x, dy)
        if device == "cpu":
            continue
        operations = 6.0 * tokens * k * hidden * width
        for label, way in (("grouped_mm", layer.grouped), ("loop", layer.loop)):
            rounds = 10 if label == "grouped_mm" else 5

            def both():
                x.grad = None
                layer.zero_grad(set_to_none=True)
                way(x).backward(dy)

            with torch.no_grad():
                forward = median_ms(lambda: way(x), rounds)
            total = median_ms(both, rounds)
            add({"name": f"{name} torch {label} forward", "ms": forward, "tflops": operations / forward * 1e-9})
            add({"name": f"{name} torch {label} forward + backward", "ms": total, "tflops": 3 * operations / total * 1e-9})
            mine = [ours.get(f"{name} hopper, interleaved {part}") for part in ("forward", "backward")]
            if None not in mine and (label == "loop" or row < GROUPED_CLAIMS):
                speed = total / sum(mine)
                add({"claim": f"{name}: speed / torch {label}", "measured": speed, "target": ">= 1", "holds": speed >= 1})
        del layer, x, dy
        if device == "cuda":
            torch.cuda.empty_cache()
    print("both ways are one")


main()
