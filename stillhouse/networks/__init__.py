"""Networks: an adapter per observation shape, a shared torso, a head per environment."""
