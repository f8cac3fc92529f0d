"""Compilation of the trained network by ``torch.compile``."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from vpr.common.errors import UserError


def compile_network(network: nn.Module) -> None:
    """Compile a network's forward and backward pass in place, at its first call; its weights keep their names.

    Each shape is compiled for itself: training, validation, and the last batch of the validation.
    """
    network.compile(dynamic=False)


@contextmanager
def reraise_compile_errors() -> Iterator[None]:
    """Raise errors of the compiler as :class:`UserError`."""
    try:
        yield
    except Exception as error:
        if not _is_compile_error(error):
            raise
        reason = str(error).strip().splitlines()[0][:300]
        fix = "Install g++ and the headers of Python, or leave out run.compile."
        raise UserError(f"run.compile: PyTorch cannot compile the network ({reason}). {fix}") from None


def _is_compile_error(error: BaseException) -> bool:
    """Return whether a compiler of PyTorch failed; its modules take seconds to import, and only failing needs them."""
    types = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    return any(name.startswith(("torch._dynamo.exc.", "torch._inductor.exc.")) for name in types)
