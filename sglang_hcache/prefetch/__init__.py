"""The prefetcher: a process that owns host memory and files, and its clients in the scheduler processes."""
