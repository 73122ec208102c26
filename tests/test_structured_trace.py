"""Graphs and passes in torch's structured trace, which tlparse makes pages of."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

CODE = """
import torch, gtrans
from torch import nn
model = gtrans.optimize(nn.Sequential(nn.Linear(4, 64), nn.ReLU()), backend="eager")
(model(torch.randn(128, 4)) * torch.randn(64)).sum().backward()
"""


def test_the_trace_has_the_graph_before_and_after_each_pass_that_changed_it(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", CODE], env=environment, check=True, timeout=120)

    (log,) = tmp_path.glob("*.log")
    lines = log.read_text().splitlines()
    records = [json.loads(m[0]) for line in lines if (m := re.search(r"\{.*\}$", line))]
    names = [r["artifact"]["name"] for r in records if "artifact" in r]
    ours = [name for name in names if name.startswith("gtrans_")]
    assert (ours[0], ours[-1]) == ("gtrans_0_joint", "gtrans_0_passes")
    assert len(ours) > 2
    assert ours[-2] == f"gtrans_0_{len(ours) - 2:02}_after_plan"
    text = "\n".join(lines)
    assert "aten.threshold_backward.default" in text
    assert "plan: matched" in text
