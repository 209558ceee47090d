"""Memory on the device: the slots that groups are copied into, and the experts that stay there."""
