from __future__ import annotations

from hypothesis import settings

settings.register_profile("hcache", deadline=None, print_blob=True)  # how long an example takes is nobody's subject
settings.load_profile("hcache")
