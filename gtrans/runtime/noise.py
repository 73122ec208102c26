"""Random numbers for rounding that leave torch's generators as they are.

    seeds = noise_seeds(some tensors of the step, salts)     once a step, in the forward
    u_i   = mix(i; seed)                                     a hash for one element or two

A pass that drew from torch's generator would shift every later dropout mask. Here the generator's
state is read, never advanced, so that `torch.manual_seed` still decides everything; a few elements
of a parameter and an input are mixed in, which change from step to step even in a model that never
draws. What is random is the seed; the draws of one step differ by their salts. Those are mixed in
here, and every seed is a tensor of its own: as constants in the kernels that use them they would
make each kernel a text of its own, to be compiled once more.

The mixing function is three rounds of xor-shift and multiplication of 32-bit words (the finaliser
family of MurmurHash3, with constants of lower bias). Products wrap around.
"""

from collections.abc import Sequence
from math import prod
from zlib import crc32

import torch

# Odd constants below 2**32, written as the signed words that torch multiplies.
_SPREAD, _FIRST, _SECOND, _THIRD = -1640531535, -312814405, -1404298415, 830770091
_RESOLUTION = 24  # bits of a number: what float32 holds exactly
_SAMPLE = 64
_LARGEST = 2**31


@torch.library.custom_op(
    "gtrans::noise_seeds", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def noise_seeds(fresh: Sequence[torch.Tensor], salts: Sequence[int]) -> list[torch.Tensor]:
    """Random 32-bit words that depend on the state of torch's generator and on some values.

    Args:
        fresh: tensors of one device that change from step to step; a few elements are read.
        salts: what `salt_of` returned, one for each draw of the step.

    Returns:
        [2] of int32 for every salt.
    """
    device = fresh[0].device
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    host = crc32(state.numpy().tobytes())
    words = torch.tensor([_signed(host), _signed(crc32(b"second", host))], dtype=torch.int32)
    words = words.to(device)
    for tensor in fresh:
        words = mix(words ^ _digest(tensor), words.flip(0))
    return [words ^ salt for salt in salts]


@noise_seeds.register_fake
def _(fresh: Sequence[torch.Tensor], salts: Sequence[int]) -> list[torch.Tensor]:
    return [torch.empty(2, dtype=torch.int32, device=fresh[0].device) for _ in salts]


NOISE_SEEDS = torch.ops.gtrans.noise_seeds.default


def salt_of(name: str) -> int:
    """A signed 32-bit word for a name, equal in every process."""
    return _signed(crc32(name.encode()))


def uniform(seed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Independent numbers in [0, 1), in plain ATen that backends fuse.

    Args:
        seed: one of those that `noise_seeds` returned.
        shape: of the result.

    Returns:
        [*shape] of float32, multiples of 2**-24.
    """
    numbers: torch.Tensor = _words(seed, shape) & (2**_RESOLUTION - 1)
    return numbers.to(torch.float32) * 2.0**-_RESOLUTION


def uniforms(seed: torch.Tensor, shape: Sequence[int], count: int) -> list[torch.Tensor]:
    """Independent numbers for several tensors of one shape, two from each word.

    Args:
        seed: as for `uniform`.
        shape: of each result.
        count: how many; one, or an even number.

    Returns:
        [*shape] of float32 each, odd multiples of 2**-17: their mean is one half, so that what is
        rounded with them is off by less than that.
    """
    if count == 1:
        return [uniform(seed, shape)]
    pairs = (_words(seed, shape, k) for k in range(count // 2))
    halves = (h for words in pairs for h in (words & (2**16 - 1), _right(words, 16)))
    return [h.to(torch.float32) * 2.0**-16 + 2.0**-17 for h in halves]


def _words(seed: torch.Tensor, shape: Sequence[int], number: int = 0) -> torch.Tensor:
    """Random words, [*shape]; those of different numbers are independent."""
    count = prod(shape)
    start, stop = number * count, (number + 1) * count
    wide = isinstance(stop, int) and stop >= _LARGEST
    dtype = torch.int64 if wide else torch.int32
    index = torch.arange(start, stop, device=seed.device, dtype=dtype)
    words = index.to(torch.int32).reshape(list(shape)) * _SPREAD
    return mix(words ^ seed[0], seed[1])


def mix(words: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Scrambles 32-bit words; every bit of the result depends on all bits of both arguments."""
    words = (words ^ _right(words, 17)) * _FIRST
    words = words ^ key
    words = (words ^ _right(words, 11)) * _SECOND
    words = (words ^ _right(words, 15)) * _THIRD
    scrambled: torch.Tensor = words ^ _right(words, 14)
    return scrambled


def _right(words: torch.Tensor, places: int) -> torch.Tensor:
    """The shift that fills with zeros; torch's own repeats the sign."""
    shifted: torch.Tensor = (words >> places) & (2 ** (32 - places) - 1)
    return shifted


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLE)
    some = flat[::step][:_SAMPLE]
    words = some.float().view(torch.int32) if some.is_floating_point() else some.to(torch.int32)
    place = torch.arange(1, words.numel() + 1, device=words.device, dtype=torch.int32)
    return mix(words, place * _SPREAD).sum().to(torch.int32)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def fixed_signs(like: torch.Tensor) -> torch.Tensor:
    """Plus and minus one in no order, the same in every step: a probe must draw nothing."""
    place = torch.ones_like(like, dtype=torch.float32).flatten().cumsum(0)
    scattered = (place * 12.9898).sin() * 43758.5453
    signs = torch.where(scattered - scattered.floor() < 0.5, -1.0, 1.0)
    return signs.to(like.dtype).view(like.shape)
