"""The monitors of a job tell each other how far their ranks are, by datagrams to that of rank 0, and who is behind.

A datagram that is lost costs nothing: the next one comes in a few seconds. Nothing here ends a process.
"""

from __future__ import annotations

import json
import os
import select
import socket
import time
from typing import Any

from alignvlm.system.monitor.heart import Pulse
from alignvlm.system.monitor.processes import STATES

MAX_BYTES = 60_000
SEND_SECONDS = 5.0
"""How often a monitor speaks to that of rank 0; more often where limits are short."""
SILENT_SECONDS = 30.0
"""A monitor that has said nothing for so long is reported."""
ASK_SECONDS = 3.0
"""How long the answer of rank 0's monitor is waited for."""
TRACED_SECONDS = 15.0
"""How long a rank counts as held by a debugger after its monitor last said so."""
MOST_LINES = 16
State = dict[str, Any]
FIELDS = {
    "rank": int, "host": str, "section": str, "text": str, "age": float, "silent": float, "waiting": bool, "state": str,
    "traced": bool,
}  # fmt: skip
"""What a monitor says of its rank; `state` is a letter of STATES, `silent` how long nothing was heard of the rank, and
`traced` whether a debugger holds it."""


class Peers:
    """What one monitor knows of the others; that of rank 0 hears them all."""

    def __init__(self, pulse: Pulse, rank: int, size: int, listens: int) -> None:
        """`listens`: descriptor of the socket at which rank 0's monitor hears the others; -1 for those."""
        self._pulse = pulse
        self._is_hub = rank == 0 and size > 1
        self._heard: dict[int, tuple[float, State]] = {}
        self._still: tuple[float, float] | None = None
        self._traced_until = 0.0
        self._lag: str | None = None
        self._sent = -SEND_SECONDS
        self._socket: socket.socket | None = socket.socket(fileno=listens) if self._is_hub else None

    @property
    def are_met(self) -> bool:
        """Whether there are others, who know where rank 0's monitor is."""
        return self._pulse.hub is not None

    @property
    def still(self) -> float | None:
        """Seconds since any rank of the job has made progress; None when that is not known."""
        if self._still is None:
            return None
        moment, seconds = self._still
        return seconds + time.monotonic() - moment

    @property
    def is_traced(self) -> bool:
        """Whether a debugger holds a rank of the job, for which the others wait."""
        return time.monotonic() < self._traced_until

    def exchange(self, mine: State, seconds: float, until: int | None = None) -> bool:
        """Tell, and listen for so long; False at once when the process of the descriptor `until` has ended."""
        hub = self._pulse.hub
        if hub is not None:
            self._note(mine) if self._is_hub else self._send(hub, mine, min(SEND_SECONDS, 8 * seconds))
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            files = [each for each in (self._socket, until) if each is not None]
            ready, _, _ = select.select(files, [], [], left)
            if until in ready:
                return False
            if ready:
                self._receive(hub[2] if hub is not None else None)
        return True

    def lag(self, mine: State) -> str:
        """Which ranks are behind, one line each, as rank 0's monitor knows it."""
        hub = self._pulse.hub
        if hub is None:
            return ""
        if self._is_hub:
            self._note(mine)
            return lagging(self._states())
        self._send(hub, mine | {"ask": True}, 0.0)
        deadline = time.monotonic() + ASK_SECONDS
        while self._lag is None and time.monotonic() < deadline and self._socket is not None:
            if select.select([self._socket], [], [], 0.1)[0]:
                self._receive(hub[2])
        return self._lag or "the monitor of rank 0 does not answer: its host is gone or cut off. This rank only"

    def _note(self, state: State) -> None:
        self._heard[int(state["rank"])] = time.monotonic(), state
        self._hear_of_tracer(state["traced"])
        self._still = time.monotonic(), min(state["age"] + state["silent"] for state in self._states())

    def _hear_of_tracer(self, traced: bool) -> None:
        if traced:
            self._traced_until = time.monotonic() + TRACED_SECONDS

    def _states(self) -> list[State]:
        now = time.monotonic()
        return [state | {"silent": now - moment} for _, (moment, state) in sorted(self._heard.items())]

    def _send(self, hub: tuple[str, int, str], state: State, interval: float) -> None:
        host, port, token = hub
        now = time.monotonic()
        if now - self._sent < interval:
            return
        self._sent = now
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
                self._socket.connect((host, port))
            self._socket.send(json.dumps({"token": token, "state": state}).encode()[:MAX_BYTES])
        except OSError:  # rank 0 is gone, or the network for a while
            pass

    def _receive(self, token: str | None) -> None:
        """Take one datagram; what is not from a monitor of this job is left alone."""
        assert self._socket is not None
        try:
            data, sender = self._socket.recvfrom(MAX_BYTES)
            said = json.loads(data)
            if not isinstance(said, dict) or token is None or said.get("token") != token:
                return
            if not self._is_hub:
                self._still = time.monotonic(), float(said["still"])
                self._lag = said.get("lag")
                self._hear_of_tracer(said["traced"])
                return
            state = said["state"]
            self._note({name: kind(state[name]) for name, kind in FIELDS.items()})
            answer = {"token": token, "still": self.still, "traced": self.is_traced} | (
                {"lag": lagging(self._states())} if "ask" in state else {}
            )
            self._socket.sendto(json.dumps(answer).encode(), sender)
        except (OSError, ValueError, TypeError, KeyError):
            pass


def lagging(states: list[State]) -> str:
    """The ranks that the others wait for: silent or stopped ones, else those that do not wait while others do."""
    suspects = [
        [state for state in states if state["silent"] > SILENT_SECONDS],
        [state for state in states if state["state"] in ("T", "t")],
        [state for state in states if not state["waiting"]],
    ]
    found = next((some for some in suspects if 0 < len(some) < len(states)), None)
    head = [] if found else ["all ranks are at the same: a collective hangs, or the slowest of them computes"]
    found = found or states
    lines = head + [describe(state) for state in found[:MOST_LINES]]
    return "\n".join(lines + ([f"  … and {len(found) - MOST_LINES} more"] if len(found) > MOST_LINES else []))


def describe(state: State) -> str:
    """A rank, its host, what it is at, and what is odd about it."""
    facts = [f"{state['age']:.0f} s without progress"]
    facts += ["waiting for other ranks"] if state["waiting"] else []
    facts += [f"its process is {STATES[state['state']]}"] if state["state"] in STATES else []
    facts += [f"no word from its host for {state['silent']:.0f} s"] if state["silent"] > SILENT_SECONDS else []
    text = f", {state['text'][:800]}" if state["text"] else ""
    return f"  lagging: rank {state['rank']} on {state['host']}, in {state['section']}{text}: {', '.join(facts)}"


def bound(address: str) -> socket.socket:
    """A socket at a free port: on the loopback alone where the ranks meet there (`address`), else on all addresses."""
    if address in ("127.0.0.1", "localhost"):
        found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        found.bind(("127.0.0.1", 0))
        return found
    try:
        found = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        found.bind(("::", 0))
    except OSError:  # no IPv6 here
        found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        found.bind(("", 0))
    return found


def host() -> str:
    """The name of this machine."""
    return os.uname().nodename
