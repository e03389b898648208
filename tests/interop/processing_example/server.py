"""The forerunner's server, in Python 3: three messages to whoever knows the key."""

from array import array

from brokerd_client.connection import Listener

address = ("localhost", 0)  # the family follows from the address: AF_INET
listener = Listener(address, authkey="secret password")
print(listener.address[1], flush=True)

conn = listener.accept()
print("connection accepted from", listener.last_accepted, flush=True)

conn.send([2.25, None, "junk", float])

conn.sendBytes(b"hello")

conn.sendBytes(array("i", [42, 1729]))

conn.close()
listener.close()
