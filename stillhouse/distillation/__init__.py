"""Distilling one or many teachers into one student: one file per method, loaded by name so that a stage depends on the code of
its own method only."""

METHODS = {
    "offline": ("Distillation", "DistillationConfig"),
    "on_policy": ("OnPolicyDistillation", "OnPolicyConfig"),
    "online": ("OnlineDistillation", "OnlineConfig"),
}
"""Module's name to its class and the class of its settings."""
