"""The network between workers, in virtual time."""

from dataclasses import dataclass

from baton.latency import TransferCost


class Link:
    """One direction of one worker's network interface; it carries what it is given in that order, at full speed.

    Two transfers at once share it: the bytes of each wait for those of the other that came before them.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0

    def send(self, start_s: float, size_bytes: float) -> float:
        """When the last of these bytes, all there at `start_s`, has passed."""
        self._free_s = max(self._free_s, start_s) + size_bytes / self._bytes_per_s
        return self._free_s


@dataclass(slots=True)
class Transfer:
    """One prompt's KV on its way from where it is computed to where it is used."""

    source: Link
    target: Link
    cost: TransferCost
    layers: int
    landed_s: float = 0.0
    """When all that was sent so far lies on the other side."""
    busy_s: float = 0.0
    """Spent on sending, and on waiting for others who send; not on waiting for what is still being computed."""
    size_bytes: int = 0

    def send(self, start_s: float, end_s: float, size_bytes: int) -> None:
        """KV that is computed from `start_s` to `end_s`, layer by layer.

        The slices of a layer leave as soon as they are computed, so all but the last layer's share of the bytes can
        be on its way before `end_s`; that last share needs its own time after it.
        """
        passed_s = max(self.source.send(start_s, size_bytes), self.target.send(start_s, size_bytes))
        last_layer_s = size_bytes / self.layers / self.cost.bytes_per_s
        self.landed_s = max(self.landed_s, passed_s, end_s + last_layer_s)
        self.busy_s += passed_s - start_s
        self.size_bytes += size_bytes
