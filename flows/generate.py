"""`peftflow generate`: one prompt to a registered version, with its heads and without."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from flows.home import Home
from flows.screen import Screen
from tasks.register.named import named


@dataclass(frozen=True)
class Asked:
    """What the command line says. temperature 0: greedy."""

    version: str
    prompt: str
    max_new_tokens: int | None
    temperature: float
    top_p: float
    seed: int
    turbo: bool


def generate(home: Home, asked: Asked, screen: Screen) -> None:
    """Stream the answer to standard output, and say on the screen how fast it came.

    Raises:
        UserError: no such version, or one that writes no text.
    """
    home.open()
    record = named(home.root, asked.version)
    with screen.waiting(f"loading {asked.version}"):
        from tasks.register.answer import Sampling, Version

        version = Version(home.root, record)
    sampling = Sampling(asked.temperature, asked.top_p, asked.seed)

    def tell(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    heads = asked.turbo and version.has_heads
    # Once unheard: the first pass of a process compiles and allocates, and would be timed.
    with screen.waiting("warming up"):
        for with_heads in {heads, False}:
            version.write(
                asked.prompt, min(asked.max_new_tokens or 16, 16), sampling, heads=with_heads
            )
    found = version.write(asked.prompt, asked.max_new_tokens, sampling, heads=heads, listener=tell)
    tell("\n")
    count = len(found.tokens)
    screen.line(f"{count} tokens in {found.seconds:.2f} s: {found.rate:,.0f} tokens/s", style="dim")
    if not heads:
        why = "left out" if version.has_heads else "this version has none: finish.turbo trains some"
        screen.line(f"without Turbo heads ({why})", style="dim")
        return
    plain = version.write(asked.prompt, asked.max_new_tokens, sampling, heads=False)
    same = "the same text" if plain.tokens == found.tokens else "another text, from a near tie on"
    screen.line(
        f"{found.tokens_per_pass:.2f} tokens a pass of the model; without heads "
        f"{plain.rate:,.0f} tokens/s and {same}: {found.rate / plain.rate:.2f} × as fast with them",
        style="dim",
    )
