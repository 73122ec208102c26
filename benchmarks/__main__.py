"""Runs one benchmark: `python -m benchmarks NAME [--quick] [--device cuda]`.

Exit code 0 where the target holds, 1 where it is missed, 2 for a name that does not exist.
"""

import argparse
import warnings
from importlib import import_module
from pathlib import Path

from gtrans.capture import capture_settings

_NOT_BENCHMARKS = {
    "__init__",
    "__main__",
    "minifier",
    "networks",
    "planted",
    "rivals",
    "table",
    "training_tasks",
    "zoo",
}


def names() -> list[str]:
    """The benchmarks there are, as they are called on the command line."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(f.stem.replace("_", "-") for f in files if f.stem not in _NOT_BENCHMARKS)


def main() -> int:
    """Parses the command line and runs the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=names())
    parser.add_argument("--quick", action="store_true", help="a part of it, within a minute")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    module = import_module(f"benchmarks.{options.name.replace('-', '_')}")
    with capture_settings():  # for torch.compile, too: what is compared is what is made of a graph
        code: int = module.main(options.quick, options.device)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
