"""Telephony audio gateway: phone carriers on one side, voice services on the other. See gateway/README.md."""

__version__ = "0.1.0"
