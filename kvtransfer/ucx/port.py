"""One worker's end of ucx."""

from kvtransfer.port import Place, Port
from kvtransfer.ucx.context import Context
from kvtransfer.ucx.devices import net_devices
from kvtransfer.ucx.receiver import UcxReceiver
from kvtransfer.ucx.sender import UcxSender


def make_port(place: Place) -> Port:
    context = Context(net_devices(place.host, place.advertise_host))
    return Port(UcxReceiver(place, context), UcxSender(place, context))
