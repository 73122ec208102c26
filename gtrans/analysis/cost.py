"""What a node costs: bytes moved, floating-point operations, and seconds by the roofline.

    seconds(node) = slower(node) * max(flops / device.flops_per_s, bytes / device.bytes_per_s)
                    + device.launch_s

where slower(node) says how far kernels of its kind stay below the roofline of plain products and
copies: convolutions of few channels, attention, and reads and writes at computed places (pooling,
indexing).

Every count is one formula over sizes, so it gives a number for traced sizes and a sympy expression
of the dynamic dimensions alike:

    product [m,k] x [k,n]            2 m k n
    convolution                      2 numel(y) c_in/groups numel(window); transposed: of x
    its backward                     the same per wanted gradient of input and weight
    attention [b,h,q,d] x [b,h,k,d]  4 b h q k d, backward 10 b h q k d, causal or not
    LSTM layer x [t,b,n], d wide     8 t b d (n + d), backward twice as many; t kernels in a row
    recurrence x [t,b,g d]           2 t b g d d, backward three times as many; several a step
    anything else                    one per element written; views nothing

Source: the usual counts (as torch.utils.flop_counter); roofline: Williams et al. 2009.
"""

import hashlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import cycle
from math import prod
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from gtrans.analysis import kept
from gtrans.errors import OptionError, did_you_mean
from gtrans.ir import ops
from gtrans.ir.joint import JointGraph
from gtrans.ir.sizes import expression, hint
from gtrans.memory import Budget
from gtrans.runtime import (  # noqa: F401  # declare the operators that are priced here
    chunked_loss,
    fused_lstm,
    recurrence,
)

aten = torch.ops.aten

# How long each kernel is tried in a round of the calibration, and what more than the roofline is
# believed.
_PATIENCE_S, _SLOWEST = 0.04, 16.0
# Rounds of the calibration: at least, and at most while the machine is busy. It is not where the
# two fastest rounds of every kernel are this close, and the process had this share of its time.
_ROUNDS, _MOST_ROUNDS = 3, 8
_CLOSE, _SHARE = 1.15, 0.9
# How it is measured; another number makes the measurements kept on disk void.
_METHOD = 2

Count = Any
"""An int, or a sympy expression."""
Size = Callable[[Any], Count]


@dataclass(frozen=True)
class Device:
    """What a roofline needs to know of a machine.

    Attributes:
        name: as in `device_named`.
        bytes_per_s: memory bandwidth.
        flops_per_s: of float32 products as torch runs them by default.
        half_flops_per_s: of 16-bit products, dense.
        launch_s: fixed cost of one kernel.
        memory_bytes: how much it has; 0 if unknown.
        channels: convolutions of fewer channels fall short of the roofline in proportion.
        attention: how many times slower than the roofline attention kernels are.
        scattered: the same of operators that read or write at computed places.
        host_bytes_per_s: of a copy to the host or back; 0 where there is no other memory.
    """

    name: str
    bytes_per_s: float
    flops_per_s: float
    half_flops_per_s: float
    launch_s: float = 4e-6
    memory_bytes: int = 0
    channels: float = 1.0
    attention: float = 1.0
    scattered: float = 1.0
    host_bytes_per_s: float = 0.0


def _gpu(
    name: str, bytes_per_s: float, flops: float, half_flops: float, gigabytes: int, host: float
) -> Device:
    memory = gigabytes * 10**9
    rates = bytes_per_s, flops, half_flops
    return Device(name, *rates, memory_bytes=memory, host_bytes_per_s=host)


_FIELDS = tuple(f.name for f in fields(Device))

# Vendors' data sheets (dense products, no sparsity); the launch cost is a common figure for torch,
# and copies to the host reach about four fifths of what their bus is sold as.
# "cpu" is one ordinary core; `calibrated_cpu` replaces it by a measurement.
DEVICES = {
    d.name: d
    for d in (
        Device("cpu", 4.0e10, 1.0e11, 5.0e10, 3e-6, 0, 24.0, 2.0, 8.0),
        _gpu("t4", 3.2e11, 8.1e12, 6.5e13, 16, 1.2e10),
        _gpu("l4", 3.0e11, 3.03e13, 1.21e14, 24, 2.5e10),
        _gpu("rtx4090", 1.008e12, 8.26e13, 1.65e14, 24, 2.5e10),
        _gpu("a100", 2.039e12, 1.95e13, 3.12e14, 80, 2.5e10),
        _gpu("h100", 3.35e12, 6.7e13, 9.89e14, 80, 5.0e10),
        _gpu("h200", 4.8e12, 6.7e13, 9.89e14, 141, 5.0e10),
    )
}


def device_named(name: str) -> Device:
    """A device by name.

    Raises:
        OptionError: there is no such device; near names are offered.
    """
    if name not in DEVICES:
        raise OptionError(f"unknown device {name!r}{did_you_mean(name, DEVICES)}")
    return DEVICES[name]


def bytes_of(memory: str | int) -> int:
    """Reads an amount of memory: "80GiB", a number of bytes, or the name of a device.

    Raises:
        OptionError: it is none of these; a share of something unknown is none either.
    """
    if isinstance(memory, str) and memory in DEVICES:
        if not DEVICES[memory].memory_bytes:
            raise OptionError(f"how much memory {memory!r} has is not known; give it in bytes")
        return DEVICES[memory].memory_bytes
    budget = Budget.parse(memory)
    if budget.bytes is None:
        raise OptionError(f"{memory!r} is a share; give bytes ('80GiB') or a device ('h100')")
    return budget.bytes


def device_of(joint: JointGraph) -> Device:
    """The device that a graph's tensors are on; of an unknown GPU, a like one."""
    for node in joint.primals:
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor) and val.device.type == "cuda":
            name = torch.cuda.get_device_name(val.device).lower().replace(" ", "")
            return next((d for d in DEVICES.values() if d.name in name), DEVICES["a100"])
    return calibrated_cpu()


def calibrated_cpu() -> Device:
    """This machine's CPU as it was measured once; of a general one where nothing is kept on disk.

    Without the measurement kept, two runs on one machine could plan differently. One that was taken
    while the machine was busy with something else serves this process and is not kept.
    """
    if kept.folder() is None:
        return DEVICES["cpu"]
    parts = (_METHOD, platform.processor(), _model_name(), torch.get_num_threads(), *_FIELDS)
    key = hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()
    known = kept.load("devices", key)
    try:
        return Device(**known)
    except TypeError:
        found = measured_cpu()
        if found.steady:
            kept.save("devices", key, asdict(found.device))
        return found.device


def _model_name() -> str:
    """What Linux calls the processor; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("model name")), "")


@dataclass(frozen=True)
class Measured:
    """A device as it was measured.

    Attributes:
        device: with the fastest of several rounds of every kernel.
        steady: whether rounds agreed, and nothing else took the processor meanwhile.
    """

    device: Device
    steady: bool


@cache
def measured_cpu() -> Measured:
    """This machine's CPU, by a kernel of each kind, in a second or two."""
    with _disable_current_modes(), torch.no_grad():  # while torch traces, kernels only pretend
        return _measured_cpu()


def _measured_cpu() -> Measured:
    a, small = torch.ones(384, 384), torch.ones(1)
    big = cycle([torch.ones(1 << 21) for _ in range(8)])  # more than a cache holds
    image, window = torch.ones(4, 8, 64, 64), torch.ones(8, 8, 3, 3)
    heads = torch.ones(4, 4, 128, 32)
    seconds, steady = _fastest(
        launch=lambda: small.add(1.0),
        product=lambda: a @ a,
        copy=lambda: next(big).add(1.0),
        convolution=lambda: torch.conv2d(image, window, padding=1),
        attention=lambda: torch.nn.functional.scaled_dot_product_attention(heads, heads, heads),
        scattered=lambda: aten.max_pool2d_with_indices(image, [2, 2]),
    )
    launch_s = seconds["launch"]
    flops = 2 * a.numel() * len(a) / seconds["product"]
    bandwidth = 2 * next(big).nbytes / seconds["copy"]

    def slower(kernel: str, roofline_s: float) -> float:
        # More than the limit says that the machine was busy meanwhile.
        return min(max((seconds[kernel] - launch_s) / roofline_s, 1.0), _SLOWEST)

    window_flops = 2 * image.numel() * window[0].numel()
    device = Device(
        "cpu",
        bandwidth,
        flops,
        flops / 2,
        launch_s,
        channels=len(window) * slower("convolution", window_flops / flops),
        attention=slower("attention", 4 * heads.numel() * heads.shape[2] / flops),
        scattered=slower("scattered", 1.75 * image.nbytes / bandwidth),
    )
    return Measured(device, steady)


def _fastest(**kernels: Callable[[], object]) -> tuple[dict[str, float], bool]:
    """Typical seconds of each kernel in the fastest of several rounds, and whether to trust them.

    Another process that takes the processor makes rounds longer: all of a kernel's if it stays, but
    then the share of time that this thread ran is small.
    """
    taken: dict[str, list[float]] = {name: [] for name in kernels}
    steady = False
    for number in range(1, _MOST_ROUNDS + 1):
        wall, own = time.perf_counter(), time.thread_time()
        for name, run in kernels.items():
            taken[name] = sorted([*taken[name], _typical(run)])
        share = (time.thread_time() - own) / (time.perf_counter() - wall)
        close = all(len(t) > 1 and t[1] <= _CLOSE * t[0] for t in taken.values())
        steady = close and share >= _SHARE
        if steady and number >= _ROUNDS:
            break
    return {name: times[0] for name, times in taken.items()}, steady


def _typical(run: Callable[[], object]) -> float:
    """Median seconds of many calls: of the fastest, all memory is in a cache."""
    end = time.perf_counter() + _PATIENCE_S
    taken: list[float] = []
    while not taken or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return max(statistics.median(taken), 1e-9)


def node_flops(node: fx.Node) -> int:
    """Floating-point operations of a node, by traced sizes."""
    return int(_flops(node, hint))


def flops_expression(node: fx.Node) -> sympy.Expr:
    """The same as an expression of the dynamic dimensions."""
    return sympy.sympify(_flops(node, expression))


def node_bytes(node: fx.Node) -> int:
    """Bytes a node reads and writes, by traced sizes; a view moves none."""
    return int(_moved(node, hint))


def bytes_expression(node: fx.Node) -> sympy.Expr:
    """The same as an expression of the dynamic dimensions."""
    return sympy.sympify(_moved(node, expression))


def node_seconds(node: fx.Node, device: Device) -> float:
    """Seconds of a node by the roofline; views, tuples and inputs take none."""
    if _is_free(node):
        return 0.0
    tensors = _tensors(node.meta.get("val"))
    half = bool(tensors) and tensors[0].dtype in (torch.float16, torch.bfloat16)
    flops_per_s = device.half_flops_per_s if half else device.flops_per_s
    if not ops.is_contraction(node):
        flops_per_s = max(device.flops_per_s / 8, 1.0)  # no matrix units
    moved, computed = node_bytes(node) / device.bytes_per_s, node_flops(node) / flops_per_s
    roofline = computed + moved if node.target in _IN_TURNS else max(computed, moved)
    kernels = _IN_A_ROW[node.target](node, hint) if node.target in _IN_A_ROW else 1
    return _slower(node, device) * roofline + kernels * device.launch_s


def _slower(node: fx.Node, device: Device) -> float:
    if node.target in _SCATTERED:
        return device.scattered
    if node.target in _CONVOLUTIONS:
        weight = _value(node, 1 if node.target is aten.convolution.default else 2)
        return max(1.0, device.channels / min(hint(size) for size in weight.shape[:2]))
    return device.attention if node.target in _ATTENTION else 1.0


def total_seconds(nodes: Iterable[fx.Node], device: Device) -> float:
    """Seconds of some nodes, one after another."""
    return sum(node_seconds(n, device) for n in nodes)


def _is_free(node: fx.Node) -> bool:
    """Whether a node takes the processor no time; copies to the host and back run beside it."""
    free = node.op != "call_function" or ops.is_view(node) or ops.is_getitem(node)
    return free or ops.is_host_copy(node)


def _moved(node: fx.Node, size: Size) -> Count:
    if _is_free(node):
        return 0
    values = [node.meta.get("val"), *(n.meta.get("val") for n in ops.tensor_inputs(node))]
    moved = sum(t.element_size() * _numel(t, size) for v in values for t in _tensors(v))
    return moved + (_IN_TURNS[node.target](node, size) if node.target in _IN_TURNS else 0)


def _flops(node: fx.Node, size: Size) -> Count:
    if _is_free(node):
        return 0
    formula = _FORMULAS.get(node.target)
    if formula is not None:
        return formula(node, size)
    return sum(_numel(t, size) for t in _tensors(node.meta.get("val")))


def _tensors(val: Any) -> list[torch.Tensor]:
    if isinstance(val, torch.Tensor):
        return [val]
    if isinstance(val, (tuple, list)):
        return [t for v in val for t in _tensors(v)]
    return []


def _numel(t: torch.Tensor, size: Size) -> Count:
    return prod((size(s) for s in t.shape), start=1)


def _value(node: fx.Node, position: int) -> torch.Tensor:
    argument: Any = node.args[position]
    found: torch.Tensor = argument.meta["val"]
    return found


def _product(position: int) -> Callable[[fx.Node, Size], Count]:
    """A product whose left factor is the argument at this position; its last size is summed."""

    def flops(node: fx.Node, size: Size) -> Count:
        return 2 * _numel(node.meta["val"], size) * size(_value(node, position).shape[-1])

    return flops


def _one_convolution(
    x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, transposed: bool, size: Size
) -> Count:
    # The weight is [c_out, c_in/groups, ...], of a transposed one [c_in, c_out/groups, ...].
    per_element = prod((size(s) for s in w.shape[1:]), start=1)
    return 2 * _numel(x if transposed else y, size) * per_element


def _convolution(node: fx.Node, size: Size) -> Count:
    x, w = _value(node, 0), _value(node, 1)
    return _one_convolution(x, w, node.meta["val"], bool(node.args[6]), size)


def _convolution_backward(node: fx.Node, size: Size) -> Count:
    dy, x, w = (_value(node, i) for i in range(3))
    wanted: Any = node.args[10]
    return sum(wanted[:2]) * _one_convolution(x, w, dy, bool(node.args[7]), size)


def _attention(first: int, products: int) -> Callable[[fx.Node, Size], Count]:
    """Attention whose query, key and value start at this argument: its number of products."""

    def flops(node: fx.Node, size: Size) -> Count:
        q, k = _value(node, first), _value(node, first + 1)
        return 2 * products * _numel(q, size) * size(k.shape[-2])

    return flops


def _linear_loss(node: fx.Node, size: Size) -> Count:
    """Logits, and what is wanted of their gradients by the rows and by the weight."""
    wanted: Any = node.args[-1]
    return 2 * (1 + sum(wanted[:2])) * _logits(node, size) * size(_value(node, 1).shape[1])


def _logits(node: fx.Node, size: Size) -> Count:
    return size(_value(node, 0).shape[0]) * size(_value(node, 1).shape[0])


def _logits_moved(node: fx.Node, size: Size) -> Count:
    return _PASSES_OVER_LOGITS * _value(node, 0).element_size() * _logits(node, size)


def _lstm(first: int, products: int) -> Callable[[fx.Node, Size], Count]:
    """A fused LSTM whose x, W_ih and W_hh start at this argument: its number of products."""

    def flops(node: fx.Node, size: Size) -> Count:
        x, *weights = (_value(node, first + i) for i in range(3))
        rows = size(x.shape[0]) * size(x.shape[1])
        return 2 * products * rows * sum(_numel(w, size) for w in weights)

    return flops


def _recurrence(first: int, products: int) -> Callable[[fx.Node, Size], Count]:
    """A recurrence whose x, start and U start at this argument: its number of products."""

    def flops(node: fx.Node, size: Size) -> Count:
        x, weight = _value(node, first), _value(node, first + 2)
        return 2 * products * _numel(x, size) * size(weight.shape[1])

    return flops


def _steps(first: int, each: int) -> Callable[[fx.Node, Size], Count]:
    """Kernels that run one after another over the x at this argument: so many a step."""
    return lambda node, size: each * size(_value(node, first).shape[0])


# Reads and writes of each logit between the products of a chunked loss.
_PASSES_OVER_LOGITS = 8
_LINEAR_LOSS: Any = torch.ops.gtrans.linear_cross_entropy.default
_LSTM: Any = torch.ops.gtrans.fused_lstm.default
_LSTM_BACKWARD: Any = torch.ops.gtrans.fused_lstm_backward.default
_RECURRENCE: Any = torch.ops.gtrans.recurrence.default
_RECURRENCE_BACKWARD: Any = torch.ops.gtrans.recurrence_backward.default
# Kernels made of products and of passes over memory, one after the other, and the bytes that these
# move besides inputs and outputs.
_IN_TURNS: dict[Any, Callable[[fx.Node, Size], Count]] = {_LINEAR_LOSS: _logits_moved}

_CONVOLUTIONS = {
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
}
_ATTENTION = {
    aten._scaled_dot_product_flash_attention.default: _attention(0, 2),
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention(0, 2),
    aten._scaled_dot_product_efficient_attention.default: _attention(0, 2),
    aten._scaled_dot_product_cudnn_attention.default: _attention(0, 2),
    aten._scaled_dot_product_flash_attention_backward.default: _attention(1, 5),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention(1, 5),
    aten._scaled_dot_product_efficient_attention_backward.default: _attention(1, 5),
    aten._scaled_dot_product_cudnn_attention_backward.default: _attention(1, 5),
}
_FORMULAS: dict[Any, Callable[[fx.Node, Size], Count]] = {
    aten.mm.default: _product(0),
    aten.bmm.default: _product(0),
    aten.addmm.default: _product(1),
    aten.baddbmm.default: _product(1),
    **_CONVOLUTIONS,
    **_ATTENTION,
    _LINEAR_LOSS: _linear_loss,
    _LSTM: _lstm(0, 1),
    _LSTM_BACKWARD: _lstm(3, 2),
    _RECURRENCE: _recurrence(0, 1),
    _RECURRENCE_BACKWARD: _recurrence(2, 3),
}
# How many kernels each of these runs one after another.
_IN_A_ROW: dict[Any, Callable[[fx.Node, Size], Count]] = {
    _LSTM: _steps(0, 1),
    _LSTM_BACKWARD: _steps(3, 1),
    _RECURRENCE: _steps(0, 8),
    _RECURRENCE_BACKWARD: _steps(2, 2),
}
_SCATTERED = {
    aten.max_pool2d_with_indices.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten._unsafe_index_put.default,
    aten.gather.default,
    aten.scatter.src,
    aten.scatter.value,
    aten.scatter_add.default,
}
