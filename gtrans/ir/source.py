"""Where in the user's model a node comes from."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import fx

# The frame that `gtrans.capture` puts around torch's own modules is nobody's model.
_ENTRY = str(Path(__file__).parents[1] / "capture.py")

_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n(?P<code>[^\n]*)'
)


@dataclass(frozen=True)
class Location:
    """A line of the user's model, and the module that ran it.

    Attributes:
        file: path of the source file, "" if unknown.
        line: line number, 0 if unknown.
        function: name of the function.
        code: the source line.
        module: path of the module within the model ("encoder.layers.3.mlp"), "" for the model.
        kind: class name of that module.
    """

    file: str = ""
    line: int = 0
    function: str = ""
    code: str = ""
    module: str = ""
    kind: str = ""

    def __str__(self) -> str:
        if not self.file:
            return self.module or "unknown source"
        place = f"{Path(self.file).name}:{self.line}"
        owner = f"{self.kind}.{self.function}" if self.kind else self.function
        return f"{place}, in {owner}"


def location(node: fx.Node) -> Location:
    """The innermost line of the user's code that made this node, as far as torch recorded it."""
    trace = node.meta.get("stack_trace") or ""
    frames = [f for f in _FRAME.finditer(trace) if f["file"] != _ENTRY]
    module, kind = _module(node)
    if not frames:
        return Location(module=module, kind=kind)
    last = frames[-1]
    return Location(
        file=last["file"],
        line=int(last["line"]),
        function=last["function"],
        code=last["code"].strip(),
        module=module,
        kind=kind,
    )


def _module(node: fx.Node) -> tuple[str, str]:
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return "", ""
    path, kind = list(stack.values())[-1]
    kind_name = kind if isinstance(kind, str) else kind.__name__
    return readable_path(path), kind_name.rsplit(".", 1)[-1]


def common_path(paths: Iterable[str]) -> str:
    """Several modules as one pattern: ``h.0.mlp`` and ``h.1.mlp`` give ``h.*.mlp``."""
    split = [path.split(".") for path in dict.fromkeys(paths)]
    if not split:
        return ""
    length = min(map(len, split))
    parts = [at[0] if len(set(at)) == 1 else "*" for at in zip(*split, strict=False)]
    longer = any(len(path) > length for path in split) and parts[-1:] != ["*"]
    return ".".join([*parts, "*"] if longer else parts)


def readable_path(source: str) -> str:
    """Turns Dynamo's ``L['self']._modules['a']._parameters['w']`` into ``a.w``."""
    path = re.sub(r"^L\['\w+'\](?=\._(?:modules|parameters|buffers)\[)", "", source)
    path = re.sub(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", r".\1", path)
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path)
    path = re.sub(r"getattr\(([^,]+), '([^']+)'\)", r"\1.\2", path)
    return path.removeprefix("L.").removeprefix("self.").lstrip(".")
