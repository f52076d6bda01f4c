"""On the path of servers under test: a fifth of their imports is the collection of garbage that is none."""

import gc

gc.set_threshold(50_000)
