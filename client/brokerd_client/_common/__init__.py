"""Parts that both clients share, besides the protocol."""
