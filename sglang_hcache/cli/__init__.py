"""The command `hcache`: looks at, checks, shrinks and moves what is on disk, and advises. Imports neither SGLang nor torch."""
