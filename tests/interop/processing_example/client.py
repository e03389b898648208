"""The forerunner's client, in Python 3: prints what the server says."""

import sys
from array import array

from brokerd_client.connection import Client

address = ("localhost", int(sys.argv[1]))
conn = Client(address, authkey="secret password")

print(conn.recv())  # => [2.25, None, 'junk', <class 'float'>]

print(conn.recvBytes())  # => b'hello'

arr = array("i", [0, 0, 0, 0, 0])
print(conn.recvBytesInto(arr))  # => 8
print(arr)  # => array('i', [42, 1729, 0, 0, 0])

conn.close()
