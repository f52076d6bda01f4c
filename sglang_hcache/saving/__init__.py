"""From attention inputs, or K and V, on the device to pages committed to the store."""
