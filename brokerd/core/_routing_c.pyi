from brokerd.core._routing_py import RouteEntry as RouteEntry
from brokerd.core._routing_py import WriteBuffer as WriteBuffer
from brokerd.core._routing_py import feed as feed

NAME: str
