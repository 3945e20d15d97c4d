"""Errors for the user, one class for each thing to do next; the command line maps each to its exit code."""

import errno


class StreamslrError(Exception):
    """A failure with a message for the user: names the object, the values, and what to do next."""

    exit_code = 1
    said_already = False
    """Another rank tells people of it."""


class InputError(StreamslrError):
    """The model, the data or an option is wrong; the same line will fail again."""

    exit_code = 2


class BudgetError(StreamslrError):
    """The work does not fit the memory or the disk it was given."""

    exit_code = 3


class ResumeError(StreamslrError):
    """The output folder belongs to another run, or another process is writing it."""

    exit_code = 4


class HubError(StreamslrError):
    """The hub could not be reached or refused; trying again later may help."""

    exit_code = 5


def says_out_of_memory(error: BaseException) -> bool:
    """Return True for an error whose cause is memory that ran out, on the host or on a GPU.

    Not every allocator has an error type of its own: torch's on the CPU, cuBLAS, cuSOLVER, the linker and the start of
    threads say it in words.
    """
    words = (
        *("DefaultCPUAllocator", "ALLOC_FAILED", "out of memory"),
        *("annot allocate memory", "start new thread", "failed to map segment"),
    )
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def says_not_deterministic(error: BaseException) -> bool:
    """Return True for torch's refusal of an operator that has no deterministic form."""
    text = str(error)
    return (
        "does not have a deterministic implementation" in text or "is not deterministic because it uses CuBLAS" in text
    )


def says_disk_full(error: BaseException) -> bool:
    """Return True for an error whose cause is a disk, a quota or `ulimit -f` that is used up.

    safetensors says it in words. torch.save says no more than that it failed to write.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    words = ("No space left on device", "File too large", "Disk quota exceeded", "PytorchStreamWriter failed writing")
    return any(word in str(error) for word in words)


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, at most 200 characters, or the error's type if it is empty.

    A line that ends in a colon has the next one with it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    whole = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return whole[:200] or type(error).__name__
