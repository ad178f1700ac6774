"""Which network devices UCX may use: those that the worker's host address lies on, and every RDMA device."""

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

ALL = "all"
_SIOCGIFADDR = 0x8915
_RDMA = Path("/sys/class/infiniband")


def net_devices(*hosts: str) -> str:
    """For UCX_NET_DEVICES: of the first host that is an address of one interface. Without one, any device."""
    for host in hosts:
        if interface := _interface_of(host):
            return ",".join([interface, *_rdma_devices()])
    return ALL


def _interface_of(host: str) -> str | None:
    """None for a wildcard, for a name that does not resolve, and for another machine's address."""
    try:
        address = ipaddress.ip_address(socket.gethostbyname(host))
    except (OSError, ValueError):
        return None
    for _, name in socket.if_nameindex():
        if address == _address_of(name) or (address.is_loopback and name == "lo"):
            return name
    return None


def _address_of(interface: str) -> ipaddress.IPv4Address | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            answer = fcntl.ioctl(sock.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:  # it has none
            return None
    return ipaddress.IPv4Address(answer[20:24])


def _rdma_devices() -> list[str]:
    ports = sorted(_RDMA.glob("*/ports/*")) if _RDMA.is_dir() else []
    return [f"{port.parts[-3]}:{port.name}" for port in ports]
