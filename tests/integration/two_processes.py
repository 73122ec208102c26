"""One of two processes of a data-parallel step; a test starts both and reads what each prints.

    python two_processes.py CASES RANK RENDEZVOUS_FILE

Every case trains for three steps on half of a batch, and compares each gradient with that of the
untouched model on the whole batch. The last line printed is a JSON object: per case the largest
difference from the single process, a fingerprint of the gradients of the last step, and the
parameters of every captured graph.
"""

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gtrans

STEPS = 3
ROWS = 2  # of each process


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.down(nn.functional.gelu(self.up(self.norm(x))))
        return x + torch.relu(hidden)


class Model(nn.Module):
    """Two blocks between a first and a last layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.last = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        answer: torch.Tensor = self.last(x)
        return answer


@dataclass
class Outcome:
    """What a case found."""

    difference: float = 0.0
    fingerprint: list[float] = field(default_factory=list)
    graphs: list[list[str]] = field(default_factory=list)


def optimized(model: nn.Module) -> nn.Module:
    return gtrans.optimize(model, backend="eager", on_error="raise")


def whole(gradient: torch.Tensor | None) -> torch.Tensor:
    assert gradient is not None
    gather: Callable[[], torch.Tensor] | None = getattr(gradient, "full_tensor", None)
    return gradient if gather is None else gather()


def run(width: int, arrange: Callable[[Model], tuple[nn.Module, list[nn.Module]]]) -> Outcome:
    """Trains; `arrange` makes a model parallel and says which modules it optimized."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(width).double()
    alone = copy.deepcopy(model)
    names = [name for name, _ in model.named_parameters()]
    parallel, parts = arrange(model)
    outcome = Outcome()
    mine = slice(dist.get_rank() * ROWS, (dist.get_rank() + 1) * ROWS)
    for step in range(STEPS):
        x = torch.randn(2 * ROWS, 6, generator=torch.Generator().manual_seed(step)).double()
        alone.zero_grad()
        parallel.zero_grad()
        alone(x).square().mean().backward()
        parallel(x[mine]).square().mean().backward()
        assert [name for name, _ in model.named_parameters()] == names
        outcome.fingerprint = []
        for p, q in zip(alone.parameters(), model.parameters(), strict=True):
            found = whole(q.grad)
            error = (whole(p.grad) - found).abs().max().item()
            outcome.difference = max(outcome.difference, error)
            outcome.fingerprint.append(found.sum().item())
        for m in (alone, model):  # the next step starts from other weights
            with torch.no_grad():
                for p in m.parameters():
                    assert p.grad is not None
                    p.sub_(0.1 * p.grad)
    outcome.graphs = [
        sorted(graph.original.parameters)
        for part in parts
        for graph in gtrans.report(part).training
        if graph.original is not None
    ]
    return outcome


def ddp_around(bucket_mb: float) -> Callable[[Model], tuple[nn.Module, list[nn.Module]]]:
    def arrange(model: Model) -> tuple[nn.Module, list[nn.Module]]:
        optimized(model)
        return DistributedDataParallel(model, bucket_cap_mb=bucket_mb), [model]

    return arrange


def ddp_inside(bucket_mb: float) -> Callable[[Model], tuple[nn.Module, list[nn.Module]]]:
    def arrange(model: Model) -> tuple[nn.Module, list[nn.Module]]:
        parallel = optimized(DistributedDataParallel(model, bucket_cap_mb=bucket_mb))
        return parallel, [parallel]

    return arrange


def fsdp(*, by_blocks: bool, first: bool) -> Callable[[Model], tuple[nn.Module, list[nn.Module]]]:
    def arrange(model: Model) -> tuple[nn.Module, list[nn.Module]]:
        parts: list[nn.Module] = list(model.blocks) if by_blocks else [model]
        if first:
            for part in parts:
                optimized(part)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if not first:
            for part in parts:
                optimized(part)
        return model, parts

    return arrange


# 320 x 320 doubles are 0.8 MB: with buckets of 1 MB, DDP reduces every layer on its own.
CASES: dict[str, dict[str, Callable[[], Outcome]]] = {
    "ddp": {
        "around": lambda: run(8, ddp_around(25)),
        "inside": lambda: run(8, ddp_inside(25)),
        "around, buckets": lambda: run(320, ddp_around(1)),
        "inside, buckets": lambda: run(320, ddp_inside(1)),
    },
    "fsdp": {
        "blocks, then shard": lambda: run(8, fsdp(by_blocks=True, first=True)),
        "shard, then blocks": lambda: run(8, fsdp(by_blocks=True, first=False)),
        "whole, then shard": lambda: run(8, fsdp(by_blocks=False, first=True)),
        "shard, then whole": lambda: run(8, fsdp(by_blocks=False, first=False)),
    },
}


def main(cases: str, rank: int, rendezvous: Path) -> dict[str, Any]:
    """Runs all cases of a kind in this process."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    try:
        return {name: asdict(case()) for name, case in CASES[cases].items()}
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
