"""One worker's end of nixl."""

from kvtransfer.nixl.driver import Driver
from kvtransfer.nixl.receiver import NixlReceiver
from kvtransfer.nixl.sender import NixlSender
from kvtransfer.port import Place, Port


def make_port(place: Place) -> Port:
    """Both sides share one agent, which the first that is used brings up. The receiver reads the sender's region, which
    is registered with it, and nothing else."""
    driver = Driver(place.region)
    return Port(NixlReceiver(place, driver), NixlSender(place, driver), converts=False)
