"""dualsweep."""
