"""How tensors travel between ranks: the contract (base), what backends share (common), and the backends."""
