"""The border to libraries that read a user's files: whatever they raise over them becomes one line for the user."""

from collections.abc import Iterator
from contextlib import contextmanager

from streamslr.errors import InputError, StreamslrError, first_line, says_not_deterministic, says_out_of_memory


@contextmanager
def refusing(what: str, advice: str) -> Iterator[None]:
    """Turn every error of the body into an InputError: "WHAT: REASON; ADVICE". It also decorates a function.

    Each architecture and each tokenizer checks its own files in its own way, or not at all, so that any type of error
    can come. What passes through: memory that runs out, a GPU that fails or lacks an operator's deterministic form,
    errors of streamslr's own, and Ctrl-C.

    Args:
        what: What cannot be done, with the name of the file.
        advice: What to do about it.
    """
    try:
        yield
    except (StreamslrError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        if says_out_of_memory(error) or says_not_deterministic(error) or "CUDA error" in str(error):
            raise
        raise InputError(f"{what}: {first_line(error)}; {advice}") from error
