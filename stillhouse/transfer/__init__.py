"""Transfer: moving a network to a target environment, and measuring what that gained."""
