"""Where the forward of a recurrence pays in sweeps: sweeps to settle, and a map over sizes."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.chain_parts.recurrent import Recurrent, fastest
from benchmarks.table import Table
from gtrans.runtime.recurrence import METHODS, Recurrence
from gtrans.runtime.stacks import parallel_dense, parallel_stack

_LARGEST_NEWTON = 1 << 23
"""Elements of all Jacobians that the map lets Newton's method make."""


def sweeps_to_settle(quick: bool, device: str) -> tuple[bool, str]:
    """Prints how many sweeps each method takes; whether none takes more than there are steps."""
    print("sweeps until the states settle, at a tolerance of 1e-4 / 1e-8 (d = 16, float64)")
    methods = [m for m in METHODS if m != "gauss-seidel"]
    table = Table(["cell, gain", "T", *methods], [12, 6, *[14] * len(methods)])
    cases = [("gru", 1.0, 256), ("gru", 4.0, 256), ("lstm", 1.0, 256)]
    cases += [] if quick else [("gru", 1.0, 1024), ("gru", 10.0, 256), ("rnn_tanh", 1.0, 256)]
    ok = True
    for kind, gain, steps in cases:
        chain = _chain(kind, gain, steps, 16, device)
        exact, cells = chain.loop(), []
        for method in methods:
            counts = []
            for tolerance in (1e-4, 1e-8):
                found = chain.solve(method, tolerance, 0, 16)
                counts.append(str(found.sweeps))
                ok &= found.sweeps <= steps
                # A chaotic recurrence magnifies what is left, so only the others are compared.
                ok &= gain > 4 or float((found.states - exact).abs().max()) < 1e3 * tolerance
            cells.append("/".join(counts))
        table.row(f"{kind}, {gain:g}", steps, *cells)
    _stacks(device)
    return ok, "every method settles within T sweeps"


def _chain(kind: str, gain: float, steps: int, width: int, device: str) -> Recurrence:
    torch.manual_seed(0)
    gates = {"gru": 3, "lstm": 4, "rnn_tanh": 1}[kind]
    bound = gain / width**0.5
    x = torch.randn(steps, 1, gates * width, dtype=torch.float64, device=device)
    uniform = torch.rand(gates * width, width, dtype=torch.float64, device=device)
    start = x.new_zeros(1, (2 if kind == "lstm" else 1) * width)
    return Recurrence(kind, x, start, bound * (2 * uniform - 1), None)


def _stacks(device: str) -> None:
    """Residual blocks and a dense block of random weights."""
    table = Table(["stack", "depth", "jacobi", "picard"], [12, 6, 14, 14])
    for depth in (24, 48):
        torch.manual_seed(0)
        blocks = nn.ModuleList(_Residual(32) for _ in range(depth)).to(device).double()
        x = torch.randn(4, 32, dtype=torch.float64, device=device)
        cells = []
        with torch.no_grad():
            for method in ("jacobi", "picard"):
                found = (
                    parallel_stack(list(blocks), x, method=method, tolerance=t)[1] for t in _LIMITS
                )
                cells.append("/".join(str(how.sweeps) for how in found))
        table.row("residual", depth, *cells)
    for depth in (12, 24):
        torch.manual_seed(0)
        layers = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Conv2d(8 * (i + 1), 8, 3, padding=1)) for i in range(depth)
        )
        image = torch.randn(1, 8, 6, 6, dtype=torch.float64, device=device)
        layers = layers.to(device).double()
        with torch.no_grad():
            found = (
                parallel_dense(list(layers), image, method="jacobi", tolerance=t)[1]
                for t in _LIMITS
            )
            table.row("dense", depth, "/".join(str(how.sweeps) for how in found), "-")


_LIMITS = (1e-4, 1e-8)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.inner(x)
        return out


def crossover(quick: bool, device: str) -> tuple[bool, str]:
    """Prints the map over sizes; it has no target of its own."""
    print(
        "ms (sweeps) of the forward of a GRU at a tolerance of 1e-4; torch: its own layer, loop: "
        "that of\ngtrans; *: faster than both"
    )
    methods = ["jacobi", "gs-jacobi", "gate", "quasi-newton", "newton"]
    table = Table(["T", "B", "d", "torch", "loop", *methods], [6, 4, 5, 9, 9, *[15] * len(methods)])
    sizes = [(t, b, d) for t in (256, 1024, 4096) for b in (1, 8) for d in (1, 8, 32)]
    wins = []
    for steps, batch, width in sizes[:6] if quick else sizes:
        case = Recurrent("gru", steps, batch, width, device)
        with torch.no_grad():
            own = partial(case.layer, case.x, case.hx)
            w_ih, w_hh, b_ih, b_hh = case.layer.parameters()
            start = torch.zeros(batch, width, device=device)
            chain = Recurrence("gru", F.linear(case.x, w_ih, b_ih), start, w_hh, b_hh)
            torchs, loop = fastest([own, chain.loop], 2)
            cells = []
            for method in methods:
                if method == "newton" and steps * batch * width**2 > _LARGEST_NEWTON:
                    cells.append("too large")
                    continue
                solve = partial(chain.solve, method, 1e-4, 0, 64)
                sweeps = solve().sweeps
                (ms,) = fastest([solve], 2)
                faster = ms < min(torchs, loop)
                cells.append(f"{ms:.1f} ({sweeps}){'*' if faster else ' '}")
                if faster:
                    wins.append(min(torchs, loop) / ms)
        table.row(steps, batch, width, f"{torchs:.1f}", f"{loop:.1f}", *cells)
    best = f"at most {max(wins):.1f}x faster" if wins else "never faster"
    return True, f"forward in sweeps {best} than step by step (no target)"
