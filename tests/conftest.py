"""Settings for every test."""

from __future__ import annotations

import signal

from hypothesis import HealthCheck, settings

# A shell has what it starts in the background ignore SIGINT, and children inherit that: commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: a slow machine is no failure. A failing example is printed so that it can be repeated by hand.
settings.register_profile(
    "rewindfs", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.register_profile("fuzz", settings.get_profile("rewindfs"), max_examples=2000)
settings.load_profile("rewindfs")
