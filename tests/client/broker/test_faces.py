"""The two faces side by side: the same names, signatures and docstrings."""

from __future__ import annotations

from typing import Any

import pytest

import brokerd_client
from brokerd_client import aio

CLIENTS = [
    pytest.param(brokerd_client.Client, id="blocking"),
    pytest.param(aio.Client, id="aio"),
]


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("method", ["send", "send_many", "publish"])
def test_send_with_receipt_keyword_is_refused(client: Any, method: str) -> None:
    """The receipt has methods of its own; the keyword is unknown."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'receipt'"):
        getattr(client, method)(None, "bob", "hello", receipt=True)
