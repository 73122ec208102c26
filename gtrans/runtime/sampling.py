"""Sampling from an autoregressive model many tokens at a time.

    y[i] = argmax(logits(y[.. i-1]) / temperature + noise[i])

With the noise fixed beforehand this is a chain of whole numbers: the model is run over a guess of
all tokens, each run corrects the guess, and what is unchanged from the front is what sampling token
by token gives from the same noise. Gumbel noise makes the tokens samples, none makes them greedy.

Source: Song et al., ICML 2021, arXiv:2002.03629 (MADE, PixelCNN++), Jacobi decoding for language
models. There is no cache of keys and values: each run reads the prompt and the tokens so far.
"""

from collections.abc import Callable
from typing import Any

import torch

from gtrans.errors import OptionError
from gtrans.runtime.solve import Solution, solve_forward

Logits = Callable[[torch.Tensor], Any]
"""Tokens [B, n] to logits [B, n, V], or an object that has them as `logits`."""


def gumbel_noise(
    steps: int, batch: int, classes: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Noise [steps, B, V] with which `parallel_generate` draws samples."""
    uniform = torch.rand(steps, batch, classes, generator=generator, dtype=torch.float64)
    return -(-uniform.clamp(min=1e-300).log()).log()


@torch.no_grad()
def parallel_generate(
    model: Logits,
    prompt: torch.Tensor,
    steps: int,
    *,
    noise: torch.Tensor | None = None,
    temperature: float = 1.0,
    window: int | None = 16,
    shifted: bool = True,
    vocabulary_first: int = 0,
) -> tuple[torch.Tensor, Solution]:
    """Continues sequences by several tokens a run of the model.

    Args:
        model: in evaluation mode; the logits of a place may depend on the tokens before it only
            (`shifted=False`), or on it as well, and then are those of the next place, as language
            models have them.
        prompt: [B, p]; p may be 0 where the logits are those of the place itself.
        steps: how many tokens.
        noise: [steps, B, V] from `gumbel_noise`; greedy without.
        temperature: divides the logits.
        window: how many tokens are guessed at a time; all with None, 1 is token by token.
        shifted: see `model`.
        vocabulary_first: the token that the guess consists of.

    Returns:
        [B, p + steps], the same as with `window=1`, and how it was found.

    Raises:
        OptionError: the prompt is empty, but the first token needs one; or the temperature is not
            positive.
    """
    if shifted and prompt.shape[1] == 0:
        raise OptionError("the logits of the first token are those of the prompt's last; give one")
    if temperature <= 0:
        raise OptionError(f"temperature must be positive, got {temperature}; leave out noise")
    start = prompt.shape[1] - int(shifted)

    def evaluate(states: torch.Tensor, part: slice) -> torch.Tensor:
        first, stop, stride = part.indices(steps)
        tokens = torch.cat([prompt, states[:stop].t()], 1)[:, : start + stop]
        found = model(tokens)
        every: torch.Tensor = found if isinstance(found, torch.Tensor) else found.logits
        logits = every[:, start + first : start + stop : stride]
        scores = logits.transpose(0, 1) / temperature
        if noise is not None:
            scores = scores + noise[part].to(scores)
        return scores.argmax(-1)

    guess = prompt.new_full((steps, len(prompt)), vocabulary_first)
    solution = solve_forward(evaluate, guess, window=window)
    return torch.cat([prompt, solution.states.t()], 1), solution
