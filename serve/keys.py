"""API keys: `python -m serve.keys new NAME` makes one; the service holds only their hashes."""

import hashlib
import hmac
import os
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from dml.names import unknown

ENVIRONMENT = "ONETHRESHOLD_KEYS"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Keys:
    """Who may use the service.

    Attributes:
        hashes: by name, the SHA-256 of its key in hexadecimal digits. A key is 256 random bits, so that no slow hash
            is needed against guessing. Empty: there are no keys, and only this machine may use the service.
    """

    hashes: Mapping[str, str]

    @classmethod
    def parse(cls, text: str, source: str) -> "Keys":
        """From lines NAME HASH; empty lines and those that begin with # are left out.

        Args:
            text: the lines.
            source: where they come from, for messages.

        Raises:
            ValueError: a line of another form, or a name given twice; what the line holds is not said.
        """
        hashes: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2 or not _NAME.fullmatch(words[0]) or not re.fullmatch("[0-9a-f]{64}", words[1]):
                form = "NAME and 64 hexadecimal digits, as python -m serve.keys new NAME prints them"
                raise ValueError(f"keys: line {number} of {source} is not {form}")
            if words[0] in hashes:
                raise ValueError(f"keys: {words[0]} is given twice in {source}, line {number}")
            hashes[words[0]] = words[1]
        return cls(hashes)

    @classmethod
    def find(cls, file: Path | None) -> "Keys":
        """Of a file, else of the lines in ONETHRESHOLD_KEYS, else none.

        Raises:
            ValueError: as in `parse`, or a file that cannot be read or holds no key.
        """
        if file is None:
            return cls.parse(os.environ.get(ENVIRONMENT, ""), ENVIRONMENT)
        try:
            found = cls.parse(file.read_text(), str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"keys: {file} cannot be read ({getattr(error, 'strerror', 'no text')})") from None
        if not found.hashes:
            raise ValueError(f"keys: {file} holds no key; python -m serve.keys new NAME prints a line for it")
        return found

    def lines(self) -> str:
        """As `parse` reads them."""
        return "\n".join(f"{name} {digest}" for name, digest in self.hashes.items())

    def name_of(self, authorization: str) -> str | None:
        """The name of the key in an Authorization header, Bearer KEY; None for any other."""
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return None
        presented = _digest(key.strip())
        # All of them, whichever fits: how long it takes tells nothing.
        fitting = [name for name, digest in self.hashes.items() if hmac.compare_digest(digest, presented)]
        return fitting[0] if fitting else None


def new(name: str) -> tuple[str, str]:
    """A fresh key, which is shown once, and the line by which the service knows it.

    Raises:
        ValueError: a name that is not made of letters, digits, '.', '_' and '-'.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"name: {name!r} is not made of 1 to 64 letters, digits, '.', '_' and '-'")
    key = "ot-" + secrets.token_urlsafe(32)
    return key, f"{name} {_digest(key)}"


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own: localhost, 127.0.0.0/8 or ::1."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a fresh key on stderr, where it is seen once, and on stdout the line for the file of keys."""
    words = list(sys.argv[1:] if argv is None else argv)
    usage = "usage: python -m serve.keys new NAME >> keys"
    if words in (["--help"], ["-h"]):
        print(usage)
        return
    try:
        if words[:1] != ["new"]:
            raise ValueError(unknown("command", words[0], ["new"]) if words else usage)
        if len(words) != 2:
            raise ValueError(usage)
        key, line = new(words[1])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"the key of {words[1]}, shown this once: {key}", file=sys.stderr)
    print(line)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


if __name__ == "__main__":
    main()
