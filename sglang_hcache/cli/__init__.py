"""The command `hcache`: what is on disk, and what to put there. Imports neither SGLang nor torch."""
