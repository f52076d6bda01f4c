"""The command `hcache`: looks at, checks, shrinks and moves what is on disk. Imports neither SGLang nor torch."""
