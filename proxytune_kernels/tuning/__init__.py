"""An expert from data: rows checked, the anti-expert tuned on them, a trio written."""
