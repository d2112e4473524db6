"""What of a model matters least, and cutting it away."""
