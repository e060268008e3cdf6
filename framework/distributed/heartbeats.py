"""Which peers are silent: bookkeeping, with no threads and no network."""

from collections.abc import Iterable, Mapping


class Heartbeats:
    """When each peer was last heard of, by this process's own clock: clocks of two machines are never compared."""

    def __init__(self, peers: Iterable[int], deadline: float, now: float) -> None:
        """`deadline` in seconds of silence; `now` is this process's clock, as everywhere below."""
        self._deadline = deadline
        self._heard = {peer: (now, "") for peer in peers}
        self._looked = now

    def hear(self, beats: Mapping[int, str], now: float) -> None:
        """Takes what the peers last wrote; only what has changed is a sign of life."""
        for peer, (_, before) in self._heard.items():
            beat = beats.get(peer, before)
            if beat != before:
                self._heard[peer] = (now, beat)

    def missing(self, now: float) -> dict[int, float]:
        """Returns the silent ones and for how many seconds; call it often.

        Where this process itself was stopped meanwhile (a laptop asleep, a job suspended), nobody is blamed for it.
        """
        away = now - self._looked
        if away > self._deadline / 2:
            self._heard = {peer: (heard + away, beat) for peer, (heard, beat) in self._heard.items()}
        self._looked = now
        return {peer: now - heard for peer, (heard, _) in self._heard.items() if now - heard > self._deadline}
