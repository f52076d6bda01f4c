"""While a request is queued: its pages are read, and it is held as long as they are worth waiting for."""
