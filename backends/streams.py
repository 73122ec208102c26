"""Run a backward on several lanes, by the schedule that the pass `pareprop` wrote onto its nodes.

On CUDA a lane is a stream: lanes wait for each other by events on the device, never on the host, so
that a step can be captured into a CUDA graph. On a CPU the pieces run one after the other, or (with
`options={"lanes": "threads"}`) on one thread a lane.

A half without a schedule is handed to another backend as a whole; so is each piece: to "eager", or
with `options={"pieces": "inductor"}` to that.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from gtrans.analysis.lanes import LaneSchedule, lane_schedule
from gtrans.backends.eager import Eager
from gtrans.backends.inductor import Inductor
from gtrans.errors import OptionError, did_you_mean
from gtrans.ir.half import Backend, Half, Runnable, boxed
from gtrans.ir.joint import TAG, Unit, tag

log = logging.getLogger("gtrans")

_CHOICES = {"pieces": ("eager", "inductor"), "lanes": ("auto", "threads", "sequential")}


class Streams:
    """Lowers pieces of a backward one by one, and lays those of different blocks side by side.

    Args:
        pieces: the backend of a piece, "eager" or "inductor".
        lanes: "auto" (streams on CUDA, else one after the other), "threads" or "sequential".
    """

    name = "streams"
    overwrites_saved = False
    slack = 0.0

    def __init__(self, pieces: str = "eager", lanes: str = "auto") -> None:
        self.inner: Backend = Inductor() if pieces == "inductor" else Eager()
        self.lanes = lanes

    def configured(self, mode: str | None, options: Mapping[str, Any] | None) -> "Streams":
        """The same lowering with other pieces or lanes.

        Raises:
            OptionError: there is no such option or value, or a mode is given.
        """
        if mode not in (None, "default"):
            raise OptionError(f"backend 'streams' has no modes, got {mode!r}; leave it out")
        for key, value in (options or {}).items():
            if key not in _CHOICES:
                raise OptionError(
                    f"backend 'streams' has no option {key!r}{did_you_mean(key, _CHOICES)}"
                )
            if value not in _CHOICES[key]:
                known = did_you_mean(str(value), _CHOICES[key])
                raise OptionError(f"option {key!r} of backend 'streams': {value!r}{known}")
        return Streams(**(options or {}))

    def unavailable(self) -> str | None:
        """Says what the backend of the pieces is missing."""
        return self.inner.unavailable()

    def prepare(self, half: Half) -> Half:
        """Pieces are prepared one by one; a half without a schedule as a whole."""
        return half if _units(half.module) else self.inner.prepare(half)

    def compile(self, half: Half) -> Runnable:
        """Compiles the pieces and lays out when each may run."""
        units = _units(half.module)
        if not units:
            return self.inner.compile(half)
        on_cuda = any(_device(n).type == "cuda" for n in units)
        parallel = self.lanes == "threads" or (self.lanes == "auto" and on_cuda)
        program = _program(half, units, parallel, self._piece)
        if program is None:
            return self.inner.compile(self.inner.prepare(half))
        run = _on_streams if on_cuda and parallel else _on_threads if parallel else _in_order

        @boxed
        def run_half(arguments: list[Any]) -> Any:
            with torch.no_grad():
                values = _Values(program, arguments)
                run(program, values)
            return values.results()

        return run_half

    def _piece(self, half: Half) -> Runnable:
        return self.inner.compile(self.inner.prepare(half))


@dataclass(frozen=True)
class _Piece:
    """What one `Work` runs: a function of named values."""

    run: Runnable
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class _Program:
    """The pieces of a backward, by the number of their work; number -1 comes before all."""

    schedule: LaneSchedule
    pieces: dict[int, _Piece]
    arguments: tuple[str, ...]
    outputs: tuple[Any, ...]
    reads: Counter[str]


class _Values:
    """The values of one run, each dropped after its last read.

    Args:
        program: what runs.
        arguments: of the backward; the list is emptied, so that they can be dropped.
    """

    def __init__(self, program: _Program, arguments: list[Any]) -> None:
        self.program = program
        named = zip(program.arguments, arguments, strict=True)
        self.held: dict[str, Any] = {name: value for name, value in named if program.reads[name]}
        arguments.clear()
        self.home: dict[str, int] = {}
        self.left = Counter(program.reads)
        self.lock = threading.Lock()
        self.run(-1, 0)

    def run(self, number: int, lane: int, cross: Callable[[Any], None] | None = None) -> None:
        """Runs a piece, if there is one of this number.

        Args:
            number: of the piece.
            lane: where it runs.
            cross: called with each tensor that was made on another lane.
        """
        piece = self.program.pieces.get(number)
        if piece is None:
            return
        arguments = []
        for name in piece.inputs:
            value = self.held[name]
            if cross is not None and self.home.get(name, 0) != lane:
                cross(value)
            arguments.append(value)
            del value
            self._read(name)
        results = piece.run(arguments)
        with self.lock:
            for name, value in zip(piece.outputs, results, strict=True):
                self.held[name] = value
                self.home[name] = lane

    def _read(self, name: str) -> None:
        with self.lock:
            self.left[name] -= 1
            if not self.left[name]:
                del self.held[name]

    def results(self) -> tuple[Any, ...]:
        """What the backward returns."""
        return tuple(
            self.held[o.name] if isinstance(o, fx.Node) else o for o in self.program.outputs
        )


def _in_order(program: _Program, values: _Values) -> None:
    for number, work in enumerate(program.schedule.works):
        values.run(number, work.lane)


def _on_threads(program: _Program, values: _Values) -> None:
    """One thread a lane. After an error all waits are lifted, and the error is raised here."""
    schedule = program.schedule
    ended = [threading.Event() for _ in schedule.works]
    failed = threading.Event()

    def run_lane(lane: int) -> None:
        try:
            with torch.no_grad():  # of each thread
                for number in schedule.on_lane(lane):
                    for other in schedule.works[number].waits:
                        ended[other].wait()
                    if failed.is_set():
                        return
                    values.run(number, lane)
                    ended[number].set()
        except BaseException:
            failed.set()
            raise
        finally:
            if failed.is_set():
                for event in ended:
                    event.set()

    with ThreadPoolExecutor(max(1, schedule.lanes)) as pool:
        for done in [pool.submit(run_lane, lane) for lane in range(schedule.lanes)]:
            done.result()


def _on_streams(program: _Program, values: _Values) -> None:
    """The caller's stream is the first lane; the others start behind it, and it ends behind them.

    The caching allocator gives a freed block to its own stream at once, so it is told of every
    tensor that another lane reads.
    """
    schedule = program.schedule
    main = torch.cuda.current_stream()
    lanes = [main, *(_side_stream(main.device, i) for i in range(1, schedule.lanes))]
    start = main.record_event()
    for lane in lanes[1:]:
        lane.wait_event(start)
    ended: dict[int, torch.cuda.Event] = {}
    for number, work in enumerate(schedule.works):
        lane = lanes[work.lane]
        for other in work.waits:
            lane.wait_event(ended[other])
        with torch.cuda.stream(lane):
            values.run(number, work.lane, partial(_used_on, stream=lane))
        if number in schedule.signals:
            ended[number] = lane.record_event()
    for lane in lanes[1:]:
        main.wait_event(lane.record_event())
    for value in values.results():
        _used_on(value, main)


def _used_on(value: Any, stream: torch.cuda.Stream) -> None:
    if isinstance(value, torch.Tensor) and value.is_cuda:
        value.record_stream(stream)


_streams: dict[tuple[torch.device, int], torch.cuda.Stream] = {}


def _side_stream(device: torch.device, number: int) -> torch.cuda.Stream:
    key = (device, number)
    if key not in _streams:
        _streams[key] = torch.cuda.Stream(device)
    return _streams[key]


# ------------------------------------------------------------------------------- laying out


def _units(module: fx.GraphModule) -> dict[fx.Node, Unit]:
    """The nodes of a half that belong to a piece of work."""
    found = {
        n: tag(n).unit for n in module.graph.nodes if n.op == "call_function" and TAG in n.meta
    }
    return {n: unit for n, unit in found.items() if unit is not None}


def _program(
    half: Half,
    units: dict[fx.Node, Unit],
    parallel: bool,
    compile_piece: Callable[[Half], Runnable],
) -> _Program | None:
    """The pieces and their schedule; None, with a warning, if it does not fit the half."""
    blocks = 2 + max(u.block for u in units.values())  # numbers start at -1
    look_ahead = next(iter(units.values())).look_ahead if parallel else 0
    schedule = lane_schedule(blocks, look_ahead)
    schedule.check()
    number = {(w.kind, w.block - 1): i for i, w in enumerate(schedule.works)}
    nodes = [n for n in half.module.graph.nodes if n.op not in ("placeholder", "output")]
    piece_of = {n: number[u.kind, u.block] if (u := units.get(n)) else -1 for n in nodes}
    before = schedule.before()
    for node, piece in piece_of.items():
        for source in node.all_input_nodes:
            early = piece_of.get(source, -1)
            if early not in (-1, piece) and (piece == -1 or early not in before[piece]):
                log.warning(
                    "gtrans: the backward runs on one lane: %s reads %s too early", node, source
                )
                return None
    outputs: Any = half.module.graph.output_node().args[0]
    pieces, reads = {}, Counter[str]()
    for piece in sorted(set(piece_of.values())):
        inside = [n for n in nodes if piece_of[n] == piece]
        inputs = list(
            dict.fromkeys(i for n in inside for i in n.all_input_nodes if i not in inside)
        )
        made = [n for n in inside if any(piece_of.get(u) != piece for u in n.users)]
        pieces[piece] = _Piece(
            compile_piece(_part(half, inside, inputs, made)),
            tuple(n.name for n in inputs),
            tuple(n.name for n in made),
        )
        reads.update(n.name for n in inputs)
    reads.update(o.name for o in outputs if isinstance(o, fx.Node))
    arguments = tuple(n.name for n in half.module.graph.find_nodes(op="placeholder"))
    return _Program(schedule, pieces, arguments, tuple(outputs), reads)


def _part(half: Half, inside: list[fx.Node], inputs: list[fx.Node], made: list[fx.Node]) -> Half:
    """A half of its own for some of the nodes."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in inside:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output([copies[n] for n in made])
    return replace(
        half,
        module=fx.GraphModule(half.module, graph),
        inputs=[n.meta["val"] for n in inputs],
        visible_outputs=(),
        static_inputs=(),
    )


def _device(node: fx.Node) -> torch.device:
    val = node.meta.get("val")
    return val.device if isinstance(val, torch.Tensor) else torch.device("cpu")
