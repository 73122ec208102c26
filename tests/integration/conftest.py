"""Starts the two processes of a data-parallel step."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gtrans

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What both processes print for the module's `CASES`: case to one outcome per process."""
    cases = request.module.CASES
    rendezvous = tmp_path_factory.mktemp("processes") / "rendezvous"
    root = Path(str(gtrans.__file__)).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), cases, str(rank), str(rendezvous)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        answers = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, answers, strict=True):
        assert process.returncode == 0, errors
    found = [json.loads(printed.splitlines()[-1]) for printed, _ in answers]
    return {case: [one[case] for one in found] for case in found[0]}
