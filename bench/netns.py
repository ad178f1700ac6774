"""A slow link on this machine: a network namespace, a pair of virtual interfaces, and a token bucket on each."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

COMMAND_TIMEOUT_S = 10.0
BUCKET_BYTES = 256 * 1024
QUEUE_MS = 50
"""Of bytes that may wait for the bucket; past it packets are dropped, as by a switch."""


class NoNamespaces(Exception):
    """Namespaces or their interfaces cannot be made here; the message says why."""


@dataclass(frozen=True, slots=True)
class SlowLink:
    near_host: str
    """This side's address, for whoever is not in the namespace."""
    far_host: str
    inside: tuple[str, ...]
    """What to put before a command that is to run in the namespace."""


@contextmanager
def slow_link(bits_per_s: int) -> Iterator[SlowLink]:
    """Both directions as slow. Raises NoNamespaces, as it does without root."""
    number = os.getpid()
    name, near, far = f"baton-bench-{number}", f"bb{number}n", f"bb{number}f"
    network = f"198.18.{number >> 6 & 255}.{number << 2 & 252}"  # of those set aside for benchmarks (RFC 2544)
    base, last = network.rsplit(".", 1)
    link = SlowLink(f"{base}.{int(last) + 1}", f"{base}.{int(last) + 2}", ("ip", "netns", "exec", name))
    bucket = ["tbf", "rate", f"{bits_per_s}bit", "burst", str(BUCKET_BYTES), "latency", f"{QUEUE_MS}ms"]
    with ExitStack() as stack:
        _run(["ip", "netns", "add", name])
        stack.callback(_run, ["ip", "netns", "delete", name])
        _run(["ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", name])
        stack.callback(_run, ["ip", "link", "delete", near])
        for inside, interface, host in (((), near, link.near_host), (link.inside, far, link.far_host)):
            _run([*inside, "ip", "address", "add", f"{host}/30", "dev", interface])
            _run([*inside, "ip", "link", "set", interface, "up"])
            _run([*inside, "tc", "qdisc", "add", "dev", interface, "root", *bucket])
        _run([*link.inside, "ip", "link", "set", "lo", "up"])
        yield link


def _run(command: Sequence[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    except FileNotFoundError:
        raise NoNamespaces(f"the command {command[0]} is not there (package iproute2)") from None
    except subprocess.CalledProcessError as error:
        raise NoNamespaces(f"`{' '.join(command)}` failed: {error.stderr.strip()}") from None
