"""Who may open a disk: the lease file beside it, and how it passes from host to host."""
