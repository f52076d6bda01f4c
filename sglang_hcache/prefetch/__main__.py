"""`python -m sglang_hcache.prefetch JSON`: a prefetcher as a server starts it. `hcache prefetcher` is for people."""

from __future__ import annotations

import sys

import msgspec

from sglang_hcache.prefetch.process import serve
from sglang_hcache.prefetch.server import ServerConfig

if __name__ == "__main__":
    sys.exit(serve(msgspec.json.decode(sys.argv[1], type=ServerConfig)))
