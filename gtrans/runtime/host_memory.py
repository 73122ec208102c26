"""Values that wait in the host's memory for the backward: four operators and a pool.

    host  = to_host(x)             starts to copy x; whoever reads x meanwhile may go on
    kept  = sent(host, x)          from here on x may be overwritten: the copy has been made
    x'    = to_device(kept, d)     starts to copy back
    x''   = arrived(x')            from here on it may be read

On CUDA the copies run on two streams of their own, one for each direction, so that they pass each
other and what is computed; `sent` and `arrived` let the stream that computes wait for them, on the
device. Nothing waits on the host. Elsewhere a copy is made where it starts.

Host memory is page-locked and allocated once. A piece is taken again as soon as no tensor refers to
it, so that two forwards before a backward, or two backwards, find their own values; a copy into it
waits on the device for the copies out of it.
"""

import threading
from collections import defaultdict
from dataclasses import dataclass

import torch

aten = torch.ops.aten

# How often the pool and the owner of a tensor just made refer to a storage.
_ONLY_THE_POOL = 1


@dataclass
class _Piece:
    """A piece of host memory, and the event behind the last copy into or out of it."""

    storage: torch.UntypedStorage
    event: torch.cuda.Event | None = None

    @property
    def is_free(self) -> bool:
        count: int = torch._C._storage_Use_Count(self.storage._cdata)
        return count == _ONLY_THE_POOL


class HostPool:
    """Pieces of host memory by size; page-locked ones apart.

    Attributes:
        allocated_bytes: of all pieces.
    """

    def __init__(self) -> None:
        self.allocated_bytes = 0
        self._pieces: dict[tuple[int, bool], list[_Piece]] = defaultdict(list)
        self._by_address: dict[int, _Piece] = {}
        self._lock = threading.Lock()  # the backward runs on a thread of autograd's

    def take(self, like: torch.Tensor) -> tuple[torch.Tensor, _Piece]:
        """A tensor on the host with the sizes and strides of another one, and its piece."""
        size, pinned = _bytes_spanned(like), like.is_cuda
        with self._lock:
            pieces = self._pieces[size, pinned]
            piece = next((p for p in pieces if p.is_free), None)
            if piece is None:
                made = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
                piece = _Piece(made.untyped_storage())
                pieces.append(piece)
                self._by_address[made.data_ptr()] = piece
                self.allocated_bytes += size
                del made
            host = torch.empty(0, dtype=like.dtype)
            host.set_(piece.storage, 0, like.shape, like.stride())
        return host, piece

    def piece_of(self, host: torch.Tensor) -> _Piece:
        """The piece that a tensor of this pool lies in."""
        return self._by_address[host.data_ptr()]

    def release(self) -> None:
        """Gives back the pieces that nobody refers to."""
        with self._lock:
            for pieces in self._pieces.values():
                for piece in [p for p in pieces if p.is_free]:
                    pieces.remove(piece)
                    self.allocated_bytes -= piece.storage.nbytes()
                    del self._by_address[piece.storage.data_ptr()]


POOL = HostPool()
"""The pool of this process."""


@dataclass
class _Lanes:
    """The two streams of a CUDA device that copy, and what is on its way."""

    out: torch.cuda.Stream
    back: torch.cuda.Stream
    coming: dict[int, torch.cuda.Event]


_lanes: dict[torch.device, _Lanes] = {}


def _lanes_of(device: torch.device) -> _Lanes:
    if device not in _lanes:
        _lanes[device] = _Lanes(torch.cuda.Stream(device), torch.cuda.Stream(device), {})
    return _lanes[device]


@torch.library.custom_op("gtrans::to_host", mutates_args=())
def to_host(x: torch.Tensor) -> torch.Tensor:
    """Starts to copy a tensor to the host; the copy has its sizes and strides."""
    host, piece = POOL.take(x)
    if not x.is_cuda:
        return host.copy_(x)
    lanes = _lanes_of(x.device)
    lanes.out.wait_stream(torch.cuda.current_stream(x.device))
    if piece.event is not None:
        lanes.out.wait_event(piece.event)  # somebody may still be reading it
    with torch.cuda.stream(lanes.out):
        host.copy_(x, non_blocking=True)
        piece.event = lanes.out.record_event()
    return host


@to_host.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")


@torch.library.custom_op("gtrans::to_device", mutates_args=())
def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Starts to copy a tensor of the pool back to a device."""
    x = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=device)
    if not x.is_cuda:
        return x.copy_(host)
    piece, lanes = POOL.piece_of(host), _lanes_of(x.device)
    lanes.back.wait_stream(torch.cuda.current_stream(x.device))  # x may be somebody's old memory
    if piece.event is not None:
        lanes.back.wait_event(piece.event)
    with torch.cuda.stream(lanes.back):
        x.copy_(host, non_blocking=True)
        piece.event = lanes.coming[x.data_ptr()] = lanes.back.record_event()
    return x


@to_device.register_fake
def _(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=device)


_library = torch.library.Library("gtrans", "FRAGMENT")
_library.define("sent(Tensor(a) host, Tensor x) -> Tensor(a)")
_library.define("arrived(Tensor(a) x) -> Tensor(a)")


def _sent(host: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if x.is_cuda:
        event = POOL.piece_of(host).event
        assert event is not None  # `to_host` has left one
        torch.cuda.current_stream(x.device).wait_event(event)
    ready: torch.Tensor = aten.alias.default(host)
    return ready


def _arrived(x: torch.Tensor) -> torch.Tensor:
    if x.is_cuda:
        event = _lanes_of(x.device).coming.pop(x.data_ptr(), None)
        if event is not None:
            torch.cuda.current_stream(x.device).wait_event(event)
    ready: torch.Tensor = aten.alias.default(x)
    return ready


for _name, _function, _fake in (
    ("sent", _sent, lambda host, x: aten.alias.default(host)),
    ("arrived", _arrived, lambda x: aten.alias.default(x)),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gtrans::{_name}", _fake, lib=_library)

TO_HOST = torch.ops.gtrans.to_host.default
SENT = torch.ops.gtrans.sent.default
TO_DEVICE = torch.ops.gtrans.to_device.default
ARRIVED = torch.ops.gtrans.arrived.default


def _bytes_spanned(x: torch.Tensor) -> int:
    """Bytes from the first element of a tensor to its last."""
    if x.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()
