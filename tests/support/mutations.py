"""Mutations of files: bytes flipped, cut and moved; JSON with values of other types and sizes, names lost, doubled."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

_DEEP, _HUGE, _INFINITE = "@DEEP@", "@HUGE@", "@INFINITE@"
_RAW = {f'"{_DEEP}"': "[" * 1000 + "]" * 1000, f'"{_HUGE}"': "9" * 400, f'"{_INFINITE}"': "1e999"}
"""JSON that Python's encoder does not write, by the text that stands for it."""

ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    3,
    0.5,
    10**6,
    2**31,
    2**63,
    10**30,
    float("nan"),
    1e308,
    _DEEP,
    _HUGE,
    _INFINITE,
    "",
    "x",
    "\ud83d",
    "a\x1b[31mb\u202e",
    "[/b]\n</script>",
    "../../x",
    "/etc/passwd",
    "x" * 100_000,
    [],
    {},
    [None],
    [-1, 2**70],
    {"a": 1},
)


def mutate(content: bytes, kind: str, random: Random) -> tuple[str, bytes]:
    """Change a file in one way, or now and then in two.

    Args:
        content: The file.
        kind: "json"; "header" for a safetensors file, of which the header is changed; "weights" for one of which the
            tensors' bytes are; "bit" for one bit of any file; "text" and all else for any file.
        random: Source of all choices.

    Returns:
        What was done, in words, and the changed file.
    """
    if kind == "bit":
        at = random.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[at // 8] ^= 1 << at % 8
        return f"bit {at} flipped", bytes(flipped)
    if kind == "weights":
        start = 8 + int.from_bytes(content[:8], "little")
        done, data = _mutate_bytes(content[start:], random, same_length=True)
        return done, content[:start] + data
    change = {"json": _mutate_json, "header": _mutate_header}.get(kind, _mutate_bytes)
    if change is not _mutate_bytes and random.random() < 0.25:
        change = _mutate_bytes
    done, changed = change(content, random)
    if random.random() < 0.1:
        more, changed = _mutate_bytes(changed, random)
        done = f"{done}; {more}"
    return done, changed


def _mutate_bytes(content: bytes, random: Random, same_length: bool = False) -> tuple[str, bytes]:
    a, b = sorted(random.randrange(len(content) + 1) for _ in range(2))
    b = min(b, a + 64)
    part, noise = content[a:b], random.randbytes(random.randint(1, 16))
    bit = bytearray(content)
    if bit:
        at = random.randrange(len(bit))
        bit[at] ^= 1 << random.randrange(8)
    flipped = (f"a bit of byte {at if bit else 0} flipped", bytes(bit))
    zeroed = (f"bytes {a} to {b} zeroed", content[:a] + bytes(b - a) + content[b:])
    other = (f"bytes {a} to {b} by noise", content[:a] + random.randbytes(b - a) + content[b:])
    if same_length:
        return random.choice((flipped, flipped, zeroed, other))
    return random.choice(
        (
            flipped,
            flipped,
            zeroed,
            other,
            (f"cut after byte {a}", content[:a]),
            (f"bytes {a} to {b} lost", content[:a] + content[b:]),
            (f"bytes {a} to {b} twice", content[:b] + part + content[b:]),
            (f"noise put in at byte {a}", content[:a] + noise + content[a:]),
            ("emptied", b""),
            ("noise at the end", content + noise),
            ("a BOM at the start", b"\xef\xbb\xbf" + content),
            ("all noise", random.randbytes(200)),
        )
    )


def _mutate_json(content: bytes, random: Random) -> tuple[str, bytes]:
    try:
        value = json.loads(content)
        places = list(_places(value))
    except (ValueError, RecursionError):
        return _mutate_bytes(content, random)
    if not places:
        odd = random.choice(ODD_VALUES)
        return f"the whole is {_words(odd)}", _dumped(odd)
    holder, key = random.choice(places)
    operations: list[Callable[[Any, Any, Random], str]] = [_put, _put, _put]
    if isinstance(holder, dict):
        operations += [_rename, _double]
    done = random.choice([*operations, _drop])(holder, key, random)
    return done, _dumped(value)


def _places(value: Any) -> Any:
    """Yield (object or array, name or position) for everything inside a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield value, key
        yield from _places(item)


def _put(holder: Any, key: Any, random: Random) -> str:
    value = holder[key]
    near = [value + 1, -value, value * 1000] if type(value) is int else []
    odd = random.choice([*ODD_VALUES, *near])
    holder[key] = odd
    return f"{key} is {_words(odd)}"


def _drop(holder: Any, key: Any, random: Random) -> str:
    del holder[key]
    return f"{key} is lost"


def _rename(holder: Any, key: Any, random: Random) -> str:
    new = random.choice((f"{key}x", "", "../x", "a\x1b[31m\u202e", "[/b]\n", "\ud83d", key.upper()))
    holder[new] = holder.pop(key)
    return f"{key} is called {_words(new)}"


def _double(holder: Any, key: Any, random: Random) -> str:
    holder[f"@TWICE@{key}"] = random.choice(ODD_VALUES)
    return f"{key} is there twice"


def _dumped(value: Any) -> bytes:
    text = json.dumps(value).replace('"@TWICE@', '"')
    for stand_in, raw in _RAW.items():
        text = text.replace(stand_in, raw)
    return text.encode()


def _words(value: Any) -> str:
    return ascii(value)[:40]


def _mutate_header(content: bytes, random: Random) -> tuple[str, bytes]:
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    which = random.random()
    if which < 0.15:
        said = random.choice((0, 1, length - 1, length + 1, length + 8, 2**31, 2**63, 2**64 - 1))
        return f"header of {said} bytes", said.to_bytes(8, "little") + content[8:]
    if which < 0.25:
        done, data = _mutate_bytes(data, random)
    elif which < 0.4:
        done, header = _mutate_bytes(header, random)
    else:
        done, header = _mutate_json(header, random)
    return f"header: {done}", len(header).to_bytes(8, "little") + header + data
