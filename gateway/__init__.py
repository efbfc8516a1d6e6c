"""Telephony audio gateway: phone carriers on one side, voice services on the other. See gateway/README.md."""

import os

__version__ = "0.1.0"

# Before numpy is loaded: its products here are small, and a second thread for them doubles the added latency's p99.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
