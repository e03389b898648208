from brokerd.core._routing_py import RouteEntry as RouteEntry
from brokerd.core._routing_py import Tail as Tail
from brokerd.core._routing_py import feed as feed

NAME: str
