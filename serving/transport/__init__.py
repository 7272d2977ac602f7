"""How calls of one message reach the server: by a completion queue of our own, or by threads."""
