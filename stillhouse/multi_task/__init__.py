"""One network, or tied ones, that learn several environments at once; one file per method, loaded by name so that a stage depends on
the code of its own method only."""

METHODS = {
    "distral": ("distral", "DistralConfig"),
    "hard_sharing": ("hard_sharing", "HardSharingConfig"),
    "soft_sharing": ("soft_sharing", "SoftSharingConfig"),
}
"""Module's name to what makes its training, and the class of its settings.

The former is called with the settings, the learner's settings, the environments by name, the seed and the device, and
gives what has the attributes of :class:`stillhouse.multi_task.joint_training.JointTraining`.
"""
