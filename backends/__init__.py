"""The lowerings: how a finished half of a training step is made to run."""

if __name__ != "gtrans.backends":
    raise ImportError(f"import 'gtrans.backends', not {__name__!r}")

BACKENDS: dict[str, str] = {
    "eager": "gtrans.backends.eager:Eager",
    "inductor": "gtrans.backends.inductor:Inductor",
    "streams": "gtrans.backends.streams:Streams",
}
