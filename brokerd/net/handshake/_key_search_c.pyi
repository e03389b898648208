from brokerd.net.handshake._key_search_py import find as find
from brokerd.net.handshake._key_search_py import prepare as prepare

NAME: str
SLICE: int
