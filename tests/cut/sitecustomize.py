"""Python imports this at its start where this folder is on PYTHONPATH: a run whose links can be cut.

The connection of every process but process 0 to the coordinator goes through a small relay in that process's own
program, on a port of its own, until SIGUSR1: then the relay closes it and accepts no other. That cuts the process off
from heartbeats, barriers and the coordination service, as a network does that drops one host's link to process 0. The
links between processes by which gloo reduces are made directly and stay.
"""

import contextlib
import os
import signal
import socket
import sys
import threading

_ADDRESS = "--coordinator_address="


class Relay:
    def __init__(self, host, port):
        self._target, self._sockets = (host, port), []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                here = self._server.accept()[0]
                try:
                    there = socket.create_connection(self._target)
                except OSError:
                    here.close()
                    continue
                self._sockets += [here, there]
                for source, sink in ((here, there), (there, here)):
                    threading.Thread(target=_pump, args=(source, sink), daemon=True).start()

    def cut(self, *_):
        os.write(2, b"the link is cut\n")
        for each in [self._server, *self._sockets]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def _pump(source, sink):
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for each in (source, sink):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def _go_through_a_relay(words):
    for place, word in enumerate(words):
        if word.startswith(_ADDRESS) and "--process_id=0" not in words:
            host, _, port = word.removeprefix(_ADDRESS).rpartition(":")
            relay = Relay(host, int(port))
            words[place] = _ADDRESS + relay.address
            signal.signal(signal.SIGUSR1, relay.cut)


_go_through_a_relay(sys.argv)
