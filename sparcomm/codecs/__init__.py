"""How indices and values lie on the wire."""
