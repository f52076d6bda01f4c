"""From pages in host memory to K and V in the device pool."""
