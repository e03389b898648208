from brokerd.core._routing_py import feed as feed
from brokerd.core._routing_py import sort_frames as sort_frames

NAME: str
