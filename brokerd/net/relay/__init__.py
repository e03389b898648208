"""Channels: pairs of connections whose bytes are relayed."""
