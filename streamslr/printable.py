"""Text from outside made fit for a terminal, a log or a message of one line."""


def printable(text: str, keep: str = "") -> str:
    r"""Escape what does not print: control characters, newlines, bidi controls, halves of surrogate pairs.

    >>> printable("a\x1b[31mb\n")
    'a\\x1b[31mb\\n'

    Args:
        text: Any text.
        keep: Characters that stay, such as "\n".
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)
